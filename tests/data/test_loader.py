"""Loader: each sample once, exact resume, grouping by modality, counted gaps, a thread that ends."""

import itertools
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.batch import Batch
from isthmus.data.images import BytesImage, FileImage, ImageTransform
from isthmus.data.loader import Loader, Position, in_background
from isthmus.data.mix import Mix, Source
from isthmus.data.processor import SpliceProcessor, TextProcessor
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Image, Record, Text
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import assistant, byte_level, picture, user

TOKENIZER = byte_level()
PROCESSOR = SpliceProcessor(TOKENIZER, ImageTransform.clip(8), num_tokens=4, template="vicuna_bare", max_length=256)
TEXT = TextProcessor(TOKENIZER, max_length=256)


class Listed(Source):
    def __init__(self, records, name="listed"):
        self.records, self.name = records, name

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if isinstance(self.records[index], DataError):
            raise self.records[index]
        return self.records[index]


def texts(count: int, name: str = "texts") -> Listed:
    return Listed(
        [Record(f"{name}/{i}", (Text("no " * (1 + i * 7 % 11), learn=True),), name) for i in range(count)], name
    )


def talks(seeing: int, blind: int) -> Listed:
    return Listed(
        [
            Record(
                f"r{i}", (*([picture()] if i < seeing else []), user("what?"), assistant("no " * (1 + i % 9))), "talks"
            )
            for i in range(seeing + blind)
        ]
    )


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        x.ids == y.ids and x.keys == y.keys and all(torch.equal(x.text[k].ids, y.text[k].ids) for k in x.text)
        for x, y in zip(a, b, strict=True)
    )


def one_epoch(loader: Loader, epoch: int = 0) -> list[list[Batch]]:
    steps = []
    for position, batches in loader.steps(Position(epoch, 0)):
        steps.append(batches)
        if position == Position(epoch + 1, 0):
            return steps
    raise AssertionError


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3))
def test_each_sample_once_an_epoch(count, size, by_tokens, group, seed):
    rule: dict[str, Any] = (
        {"batch_tokens": 16 * size, "group": True} if by_tokens else {"batch_size": size, "group": group}
    )
    loader = Loader(texts(count), TEXT, seed=seed, prefetch=0, **rule)
    for epoch in (0, 1):
        ids = [i for batches in one_epoch(loader, epoch) for b in batches for i in b.ids]
        assert Counter(ids) == Counter(f"texts/{i}" for i in range(count))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), st.integers(1, 7), st.integers(0, 25), st.integers(1, 3), st.booleans())
def test_resume_is_the_uninterrupted_stream(count, size, cut, accumulate, group):
    def loader():
        mix = Mix([texts(count), texts(5, "more")], [1, 0.5])
        return Loader(mix, TEXT, batch_size=size, accumulate=accumulate, group=group, prefetch=0, seed=3)

    whole = list(itertools.islice(loader().steps(), cut + 5))
    saved = whole[cut - 1][0].to_dict() if cut else Position().to_dict()
    resumed = loader()
    rest = list(itertools.islice(resumed.steps(resumed.position(saved)), 5))
    assert [p for p, _ in rest] == [p for p, _ in whole[cut:]]
    assert all(same(a, b) for (_, a), (_, b) in zip(rest, whole[cut:], strict=True))
    assert list(itertools.islice(loader().positions(), cut + 5)) == [p for p, _ in whole]


def test_alternatives_follow_the_seed_and_change_with_the_epoch():
    def stream(seed):
        many = Listed([Record(f"m{i}", (Text(("yes", "no", "red", "blue", "cube"), learn=True),)) for i in range(30)])
        steps = itertools.islice(Loader(many, TEXT, batch_size=30, seed=seed, prefetch=0).steps(), 2)
        return [dict(zip(b.ids, b.text["lm"].ids.tolist(), strict=True)) for _, (b,) in steps]

    first, second = stream(0)
    assert stream(0) == [first, second]
    assert first != second
    assert stream(1)[0] != first
    assert len({tuple(row) for row in first.values()}) == 5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(1, 7))
def test_only_the_last_batch_mixes_modalities(seeing, blind, size):
    if not seeing + blind:
        return
    loader = Loader(talks(seeing, blind), PROCESSOR, batch_size=size, prefetch=0)
    plan = list(loader.plan(0))
    kinds = [{visit.index < seeing for visit in batch} for batch in plan]
    rest = -(-(seeing % size + blind % size) // size)
    assert all(len(kind) == 1 for kind in kinds[: len(kinds) - rest])
    assert all(len(batch) == size for batch in plan[:-1])
    assert Counter(v.index for b in plan for v in b) == Counter(range(seeing + blind))


def test_token_budget_holds_and_lengths_are_grouped():
    loader = Loader(texts(300), TEXT, batch_tokens=64, prefetch=0)
    batches = [b for step in one_epoch(loader) for b in step]
    assert all(b.text["lm"].ids.numel() <= 64 for b in batches)
    real = sum(int(b.text["lm"].lengths.sum()) for b in batches)
    padded = sum(b.text["lm"].ids.numel() for b in batches)
    assert real / padded > 0.95
    alone = Loader(texts(3), TEXT, batch_tokens=2, prefetch=0)
    assert [len(b) for step in one_epoch(alone) for b in step] == [1, 1, 1]


def test_planning_decodes_no_picture():
    class Forbidden:
        def describe(self):
            return "forbidden"

        def read(self):
            raise AssertionError("planning read a picture")

    records = [Record(f"r{i}", (Image(Forbidden()), user("what?"), assistant("yes"))) for i in range(20)]
    loader = Loader(Listed(records), PROCESSOR, batch_tokens=100, prefetch=0)
    assert sum(map(len, loader.plan(0))) == 20
    assert len(list(itertools.islice(loader.positions(), 30))) == 30


def test_a_planned_sample_is_made_once():
    class Counting(TextProcessor):
        made = 0

        def example(self, record, draw=0):
            self.made += 1
            return super().example(record, draw)

    processor = Counting(TEXT.tokenizer)
    assert len(one_epoch(Loader(texts(40), processor, batch_size=4, prefetch=0))) == 10
    assert processor.made == 40


def test_micro_batches_share_the_step():
    whole = list(itertools.islice(Loader(texts(20), TEXT, batch_size=8, prefetch=0).steps(), 3))
    split = list(itertools.islice(Loader(texts(20), TEXT, batch_size=8, accumulate=3, prefetch=0).steps(), 3))
    for (position, (batch,)), (again, micro) in zip(whole, split, strict=True):
        assert position == again
        assert tuple(i for b in micro for i in b.ids) == batch.ids
        assert sum(b.supervised() for b in micro) == batch.supervised()
        assert len(micro) == min(3, len(batch))


def test_bad_samples_are_counted_gaps_and_the_plan_stays(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    good = [Record(f"good{i}", (picture(), user("what?"), assistant("yes"))) for i in range(21)]
    bad = {
        3: Record("truncated", (Image(BytesImage(b"\x89PNG\r\n", "t.png")), user("q"), assistant("a"))),
        8: Record("absent", (Image(FileImage(tmp_path / "absent.png")), user("q"), assistant("a"))),
        11: Record("wordless", (picture(), user("q"), assistant(" "))),
        15: DataError("placeholder mismatch: the text has 2 <image> and the sample 1 pictures"),
    }
    records = [bad.get(i, r) for i, r in enumerate(good)]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    loader = Loader(Listed(records), PROCESSOR, batch_size=5, quarantine=quarantine, group=False)
    clean = Loader(Listed(good), PROCESSOR, batch_size=5, group=False)
    assert list(loader.plan(0)) == list(clean.plan(0))
    ids = [[i for b in step for i in b.ids] for step in loader.epoch()]
    expected = [[i for b in step for i in b.ids if int(i[4:]) not in bad] for step in clean.epoch()]
    assert ids == [row for row in expected if row]
    assert quarantine.reasons() == {"broken image": 1, "missing image": 1, "empty answer": 1, "placeholder mismatch": 1}
    assert (quarantine.failures, quarantine.samples) == (4, 21)
    text = (tmp_path / "q.jsonl").read_text()
    assert all(name in text for name in ("truncated", "absent", "wordless", "listed[15]"))
    list(loader.epoch())
    assert text == (tmp_path / "q.jsonl").read_text()


def test_too_many_bad_samples_stop_the_run(tmp_path):
    records = [DataError("missing image: gone") if i % 10 == 0 else r for i, r in enumerate(texts(200).records)]
    loader = Loader(Listed(records), TEXT, batch_size=20, quarantine=Quarantine(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match=r"of \d+ samples are bad.*missing image.*q\.jsonl"):
        list(itertools.islice(loader.steps(), 12))


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_a_source_of_nothing_but_bad_samples_ends(part):
    loader = Loader(Listed([DataError("missing image: gone")] * 6), TEXT, batch_size=2, prefetch=0, part=part)
    with pytest.raises(DataError, match="not one sample of a full epoch"):
        list(itertools.islice(loader.steps(), 20))
    assert list(loader.epoch()) == []


def test_evaluation_order():
    loader = Loader(texts(7), TEXT, batch_size=3, shuffle=False, group=False)
    assert [i for (b,) in loader.epoch() for i in b.ids] == [f"texts/{i}" for i in range(7)]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "isthmus-loader"]


def test_the_thread_changes_nothing_and_ends():
    ahead = Loader(texts(40), TEXT, batch_size=4, prefetch=3).steps()
    plain = Loader(texts(40), TEXT, batch_size=4, prefetch=0).steps()
    for _ in range(15):
        (p, a), (q, b) = next(ahead), next(plain)
        assert p == q
        assert same(a, b)
    assert len(threads()) == 1
    ahead.close()
    assert not threads()


def test_prefetching_is_bounded_and_hands_over_errors():
    made = []

    def numbers():
        for n in range(100):
            made.append(n)
            yield n
            if n == 10:
                raise DataError("stop here")

    stream = in_background(numbers, 2)
    assert next(stream) == 0
    time.sleep(0.2)
    assert len(made) <= 5
    with pytest.raises(DataError, match="stop here"):
        list(stream)
    assert not threads()
    assert list(in_background(lambda: iter(range(5)), 1)) == list(range(5))


def test_configuration_errors():
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "exactly one"),
        ({"batch_size": 2, "batch_tokens": 9}, "exactly one"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 1, "accumulate": 0}, "at least 1"),
        ({"batch_tokens": 9, "group": False}, "needs group"),
        ({"batch_size": 1, "shuffle": False}, "needs group=False"),
    ]
    for options, words in refused:
        with pytest.raises(ConfigError, match=words):
            Loader(texts(3), TEXT, **options)
