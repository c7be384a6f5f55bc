"""Samples that cannot be read: left out and counted, never a stop, unless there are too many."""

import json

import pytest
from PIL import Image as PilImage

from isthmus.data.images import FileImage
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Image, Record, Text
from isthmus.demo.scenes import SceneSource
from isthmus.errors import DataError
from isthmus.evaluation import VqaTask, evaluate
from isthmus.evaluation.rescore import rescore
from isthmus.evaluation.sound import Sound, all_answered, answered, first_sound
from tests.evaluation.fakes import vqa_scores


@pytest.fixture
def records(tmp_path):
    """Four questions; the picture of the second is truncated, that of the third is not there, the last has the
    second's."""
    for number in range(2):
        PilImage.effect_noise((40, 40), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])

    def record(number, name):
        parts = (Image(FileImage(tmp_path / name)), Text("what?", role="user"), Text("noise", role="assistant"))
        return Record(id=f"r{number}", parts=parts)

    return [record(n, name) for n, name in enumerate(["0.png", "1.png", "gone.png", "1.png"])]


def test_what_cannot_be_read_is_left_out_and_told(records, tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl")
    kept = Sound(records, quarantine)
    assert [kept[i].id for i in range(len(kept))] == ["r0"]
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(r["id"], r["reason"].split(":")[0]) for r in rows] == [
        ("r1", "broken image"),
        ("r2", "missing image"),
        ("r3", "broken image"),
    ]


def test_a_row_of_the_source_that_is_bad_is_left_out_too(records):
    class Source:
        name = "mine"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index:
                raise DataError("empty answer: there is none")
            return records[0]

    quarantine = Quarantine()
    assert len(Sound(Source(), quarantine)) == 1
    assert quarantine.example() == "empty answer: there is none"


def test_too_many_or_none_left_is_an_error(records):
    with pytest.raises(DataError, match=r"can be used: broken image"):
        Sound(records[1:], Quarantine())
    with pytest.raises(DataError, match=r"more than the allowed 1\.0%"):
        Sound([*records[:1] * 98, *records[1:3]], Quarantine())
    Sound([*records[:1] * 98, *records[1:3]], Quarantine(threshold=0.02))


def test_a_question_without_an_answer_is_left_out_where_one_is_due():
    def record(name, *texts, **meta):
        return Record(id=name, parts=tuple(Text(t, role=r) for r, t in texts), meta=meta)

    asked, said, silent = ("user", "what?"), ("assistant", "noise"), ("assistant", " ")
    records = [
        record("whole", asked, said),
        record("silent", asked, silent),
        record("none", asked),
        record("given", asked, silent, answers=["noise"]),
        record("earlier", asked, silent, asked, said),
    ]
    for demand, kept in [(None, 5), (answered, 3), (all_answered, 2)]:
        quarantine = Quarantine()
        assert len(Sound(records, quarantine, demand=demand)) == kept
        assert (quarantine.failures, set(quarantine.reasons())) == (5 - kept, {"empty answer"} if kept < 5 else set())


def test_pictures_are_left_closed_where_only_words_are_read(records):
    assert len(Sound(records, Quarantine(), pictures="none")) == 4


def test_the_first_that_can_be_read_without_looking_at_the_rest(records, tmp_path):
    assert [r.id for r in first_sound([*records[1:], *records[:1] * 3], 2)] == ["r0", "r0"]
    assert first_sound(records[1:], 2) == []
    (tmp_path / "0.png").unlink()

    class Endless(list):
        def __getitem__(self, index):
            assert index < 3, "looked at the rest"
            return Record(id=str(index), parts=())

    assert len(first_sound(Endless(range(9)), 3)) == 3


def test_pictures_made_in_the_program_are_not_drawn_for_it(monkeypatch):
    from isthmus.demo.scenes.draw import ScenePicture

    monkeypatch.setattr(ScenePicture, "read", lambda self: pytest.fail("drawn"))
    assert len(Sound(SceneSource("questions", split="test", count=5), Quarantine())) == 5


class Says:
    def answer_records(self, records, **decoding):
        return ["noise"] * len(records)


def test_manifest_and_scores_tell_how_many_were_left_out(records, tmp_path):
    quarantine = Quarantine(tmp_path / "out" / "quarantine.jsonl")
    task = VqaTask(name="noise", records=Sound(records, quarantine), controls=())
    for _ in range(2):  # a second call finds the same and counts nothing twice
        result = evaluate(Says(), task, tmp_path / "out", left_out=quarantine.failures)
        assert (result.left_out, vqa_scores(result).overall.n) == (3, 1)
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["left_out"] == 3
    assert rescore(tmp_path / "out").left_out == 3
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["left_out"] == 3
