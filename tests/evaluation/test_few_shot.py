"""Few-shot prompts: which examples, in which order, with or without pictures, and ranking of candidates."""

import pytest
import torch

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation.caption_task import CaptionTask
from isthmus.evaluation.controls import Control
from isthmus.evaluation.few_shot import FewShotTask, Support, as_shot, orders, permuted_answers, with_shots
from isthmus.evaluation.tasks import VqaTask
from isthmus.evaluation.turns import last_turn
from tests.data.helpers import assistant, png, user
from tests.narrow import must_be


class Numbered:
    """A picture whose place on a line is its number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def describe(self) -> str:
        return str(self.number)

    def read(self) -> bytes:
        return png()


def number_of(picture: Image) -> float:
    return must_be(Numbered, picture.source).number


def question(number: float, answer: str = "", *, name: str = "s") -> Record:
    picture = Image(Numbered(number), key=str(number))
    return Record(f"{name}{number}", (picture, user(f"what is {number}?"), assistant(answer or f"a{number}")))


def angle(pictures) -> torch.Tensor:
    angles = torch.tensor([number_of(p) / 10 for p in pictures])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


SUPPORT = [question(n) for n in range(12)]


def test_rices_puts_the_nearest_last_and_never_takes_the_question_itself():
    pool = Support(SUPPORT)
    chosen = pool.choose(question(4.2, name="q"), 4, angle)
    assert [number_of(r.images[0]) for r in chosen] == [6, 3, 5, 4]
    assert [number_of(r.images[0]) for r in pool.choose(SUPPORT[4], 2, angle)] in ([5, 3], [3, 5])
    assert pool.choose(question(1), 0, angle) == []


def test_random_shots_differ_by_question_and_repeat_by_seed():
    pool = Support(SUPPORT, seed=1)
    first = [[r.id for r in pool.choose(question(n, name="q"), 3)] for n in (20, 21, 22)]
    assert first == [[r.id for r in Support(SUPPORT, seed=1).choose(question(n, name="q"), 3)] for n in (20, 21, 22)]
    assert len({tuple(ids) for ids in first}) == 3
    assert len(Support(SUPPORT, pool=5).records) == 5
    with pytest.raises(DataError, match="needs 30 shots and the support set has 12"):
        pool.choose(question(20, name="q"), 30)


def test_the_same_shots_stand_before_all_questions_but_their_own():
    pool = Support(SUPPORT, seed=1)
    shared = pool.choose(question(20, name="q"), 3, same=True)
    assert shared == pool.choose(question(21, name="q"), 3, same=True)
    own = pool.choose(shared[0], 3, same=True)
    assert own[:2] == shared[1:]
    assert own[2] not in shared
    assert shared != Support(SUPPORT, seed=2).choose(question(20, name="q"), 3, same=True)


def test_shots_are_finished_turns_before_the_question():
    asked = Record("q", question(20).parts[:2])
    full = with_shots(asked, SUPPORT[:2])
    assert [p.text if isinstance(p, Text) else number_of(p) for p in full.parts] == [
        0, "what is 0?", "a0", 1, "what is 1?", "a1", 20, "what is 20?",
    ]  # fmt: skip
    assert not any(p.learn for p in full.texts)
    words = with_shots(asked, SUPPORT[:2], pictures=False)
    assert [number_of(p) for p in words.images] == [20]
    caption = Record("c", (Image(Numbered(1), role="text"), Text("a cat", learn=True)))
    assert [getattr(p, "text", p.role) for p in as_shot(caption)] == ["user", "a cat"]


def test_permuted_answers_are_the_same_answers():
    shuffled = permuted_answers(SUPPORT[:8], "seed")
    answers = [last_turn(r).answers[0] for r in shuffled]
    assert sorted(answers) == sorted(f"a{n}" for n in range(8))
    assert answers != [f"a{n}" for n in range(8)]
    assert [r.images for r in shuffled] == [r.images for r in SUPPORT[:8]]


def test_orders_are_different_permutations():
    found = orders(SUPPORT[:4], 6, "x")
    assert found[0] == SUPPORT[:4]
    assert len({tuple(r.id for r in o) for o in found}) == 6
    assert len(orders(SUPPORT[:2], 6, "x")) == 2
    assert orders([], 6, "x") == [[]]


class Fake:
    """Answers with what it was shown; scores a candidate by where it stands among the shots."""

    def __init__(self) -> None:
        self.asked: list[Record] = []

    def answer_records(self, records, **_):
        self.asked += records
        return [f"a{int(number_of(r.images[-1]))}" if r.images else "blind" for r in records]

    def vision_features(self, pictures):
        return angle(pictures)

    def score(self, parts, candidates):
        said = [p.text for p in parts if isinstance(p, Text) and p.role == "assistant"]
        return [float(said.index(c)) if c in said else -1.0 for c in candidates]


def task(controls=("blind", "shuffled"), **options) -> FewShotTask:
    records = [question(n, f"a{n}", name="q") for n in range(20, 24)]
    return FewShotTask(task=VqaTask(name="t", records=records, controls=controls), support=SUPPORT, **options)


def test_task_asks_with_shots_and_zero_shot_has_two_without_pictures():
    model = Fake()
    rows = [row for part in task(shots=3, select="rices").rows(model, (), chunk=2) for row in part]
    assert [row["correct"] for row in rows] == [True] * 4
    assert {row["blind"] for row in rows} <= {f"a{n}" for n in range(12)}  # the shots' pictures stay
    assert all(len(r.images) in (3, 4) and len(r.texts) == 7 for r in model.asked)
    model = Fake()
    rows = [row for part in task(shots=0).rows(model, (), chunk=8) for row in part]
    assert {len(r.texts) for r in model.asked} == {5}
    assert {len(r.images) for r in model.asked} == {0, 1}
    assert {row["blind"] for row in rows} == {"blind"}
    assert len({str(task(shots=n).describe()) for n in (0, 1, 2)}) == 3


def caption(number: float) -> Record:
    texts = Text((f"a{number}", f"an {number}"), role="text", learn=True)
    return Record(f"c{number}", (Image(Numbered(number), role="text", key=str(number)), texts))


@pytest.mark.parametrize(("prompt", "shots"), [("", 2), ("", 0), ("describe it.", 2), ("describe it.", 0)])
def test_captions_stand_behind_captions(prompt, shots):
    """As the paper's prompts for captions: a picture and what is said of it, the words asked in before it if any."""
    pictures = [caption(n) for n in range(20, 24)]
    controls: list[Control] = ["shuffled"] if not prompt else ["blind", "shuffled"]
    told = FewShotTask(
        task=CaptionTask(name="t", records=pictures, prompt=prompt, controls=controls, prior="a0"),
        support=[caption(n) for n in range(8)],
        shots=shots,
    )
    model = Fake()
    rows = [row for part in told.rows(model, (), chunk=8) for row in part]
    assert told.score(rows).to_dict()["n"] == 4
    assert [row["answer"] for row in rows] == ["a20", "a21", "a22", "a23"]
    heard = [getattr(p, "text", "[]") for p in model.asked[0].parts]
    before = [w for w in heard if w not in (prompt, "[]", "")]
    assert len(before) == (shots or 2)
    assert all(w.startswith("a") for w in before)
    one = [*(["[]"] if shots else []), *([prompt] if prompt or not shots else []), "a"]
    assert ["a" if w in before else w for w in heard] == [*one, *one, "[]", *([prompt] if prompt else [])]
    assert {p.role for p in model.asked[0].images} == {"user"}


def test_candidates_are_ranked_over_permutations():
    candidates = [f"a{n}" for n in range(12)]
    one = task(shots=3, candidates=candidates, controls=[])
    row = next(iter(one.rows(Fake(), (), chunk=1)))[0]
    (last,) = Support(SUPPORT).choose(must_be(Record, one.task.records[0]), 3)[-1:]
    assert row["answer"] == last_turn(last).answers[0]  # the only order: the last shot's scores highest
    many = task(shots=3, candidates=candidates, ensemble=6, controls=[])
    chosen = {last_turn(r).answers[0] for r in Support(SUPPORT).choose(must_be(Record, one.task.records[0]), 3)}
    assert next(iter(many.rows(Fake(), (), chunk=1)))[0]["answer"] in chosen


def test_likelihoods_are_averaged_over_permutations():
    calls = []

    class Wavering(Fake):
        def score(self, parts, candidates):
            calls.append(parts)
            return [1.0, 0.0] if len(calls) == 1 else [0.0, 5.0]

    many = task(shots=3, candidates=["a0", "a1"], ensemble=6, controls=[])
    assert next(iter(many.rows(Wavering(), (), chunk=1)))[0]["answer"] == "a1"
    assert len(calls) == 6


def test_ranking_with_zero_shots_has_no_examples():
    """The candidates say already what an answer looks like (2204.14198, table of prompts)."""
    seen: list[tuple[int, int]] = []

    class Ranks(Fake):
        def score(self, parts, candidates):
            seen.append((len(parts), sum(isinstance(p, Image) for p in parts)))
            return super().score(parts, candidates)

    rows = next(iter(task(shots=0, candidates=["a1", "a2"], controls=[]).rows(Ranks(), (), chunk=8)))
    assert {row["answer"] for row in rows} == {"a1"}
    assert set(seen) == {(2, 1)}  # the question's own picture and words
    assert len(seen) == 4


def test_bad_options_are_explained():
    for options, words in (
        ({"select": "nearest"}, "known: random, rices, same"),
        ({"shots": -1}, "0 or more"),
        ({"ensemble": 2}, "task.candidates"),
        ({"candidates": ["red", True]}, "must be texts, not .True.; quote them"),
        ({"candidates": "red"}, "must be texts, not 'red'"),
    ):
        with pytest.raises(ConfigError, match=words):
            task(**options)
    with pytest.raises(DataError, match="there are none"):
        FewShotTask(task=VqaTask(name="t", records=SUPPORT), support=[]).pool.choose(SUPPORT[0], 1)

    class Plain:
        def answer_records(self, records, **_):
            return [""] * len(records)

    with pytest.raises(CapabilityError, match="vision_features"):
        next(iter(task(shots=1, select="rices").rows(Plain(), (), chunk=1)))
    with pytest.raises(CapabilityError, match="Task 't': this model gives no log-likelihoods"):
        next(iter(task(shots=1, candidates=["a0", "a1"]).rows(Plain(), (), chunk=1)))
