import json

import pytest

from isthmus.data.record import Image, Record, Text
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import evaluate
from isthmus.evaluation.caption_task import CaptionTask, typical_caption
from isthmus.evaluation.captions import NAMES
from tests.evaluation.fakes import Reader, Word, facts_of

SAID = {"cat": "a cat sleeps on a red mat", "dog": "two dogs run after a ball", "owl": "an owl sits in the old tree"}


def caption_record(name, word, *captions):
    return Record(id=name, parts=(Image(Word(word)), Text(captions, learn=True)))


def records():
    return [caption_record(w, w, SAID[w], f"there is {SAID[w]}") for w in SAID]


class Writer(Reader):
    def answer_records(self, records, **decoding):
        assert all(t.text == "Describe it." for r in records for t in r.texts)
        return [SAID.get(w, "a thing") for w in super().answer_records(records, **decoding)]


def test_captions_stand_beside_what_is_written_without_looking(tmp_path):
    task = CaptionTask(name="c", records=records(), prompt="Describe it.", prior=SAID["dog"])
    result = evaluate(Writer("?"), task, tmp_path)
    facts = facts_of(result.scores)
    assert facts["ROUGE_L"] == pytest.approx(1.0)
    assert set(facts["controls"]) == {"blind", "shuffled", "prior"}
    assert set(facts["controls"]["blind"]) == set(NAMES)
    assert facts["best_without_looking"] == max(c["CIDEr"] for c in facts["controls"].values())
    assert facts["gain"] == pytest.approx(facts["CIDEr"] - facts["best_without_looking"])
    assert facts["gain_interval"][0] <= facts["gain"] <= facts["gain_interval"][1] + 1e-9
    assert facts["gain"] > 1
    row = result.rows[0]
    assert (row["answer"], row.get("blind"), row.get("prior")) == (SAID["cat"], "a thing", SAID["dog"])
    assert row.get("shuffled") in (SAID["dog"], SAID["owl"])
    assert json.loads((tmp_path / "manifest.json").read_text())["question"] == "Describe it."


def test_records_of_one_picture_are_one_item_with_all_captions(tmp_path):
    twice = [*records(), caption_record("again", "cat", "a cat on a mat")]
    rows = evaluate(Writer("?"), CaptionTask(name="c", records=twice, prompt="Describe it."), tmp_path).rows
    assert [r["id"] for r in rows] == ["cat", "dog", "owl"]
    assert rows[0]["truth"] == [SAID["cat"], f"there is {SAID['cat']}", "a cat on a mat"]


def test_an_answer_in_a_conversation_is_a_caption_and_is_not_shown(tmp_path):
    spoken = [
        Record(id=w, parts=(Image(Word(w)), Text("What?", role="user"), Text(SAID[w], role="assistant", learn=True)))
        for w in SAID
    ]
    result = evaluate(Writer("?"), CaptionTask(name="c", records=spoken, prompt="Describe it."), tmp_path)
    assert result.scores.to_dict()["Bleu_4"] == pytest.approx(1.0)


def test_without_a_prompt_there_is_no_blind_caption(tmp_path):
    with pytest.raises(ConfigError, match="nothing is left of the question"):
        CaptionTask(name="c", records=records())
    task = CaptionTask(name="c", records=records(), controls=["shuffled"])
    facts = facts_of(evaluate(Writer("?"), task, tmp_path).scores)
    assert set(facts["controls"]) == {"shuffled"}


def test_without_controls_there_is_no_gain(tmp_path):
    task = CaptionTask(name="c", records=records(), prompt="Describe it.", controls=())
    facts = evaluate(Writer("?"), task, tmp_path).scores.to_dict()
    assert (facts["gain"], facts["gain_interval"], facts["controls"]) == (None, None, {})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Record(id="bare", parts=(Text("a cat", learn=True),)), "'bare' has 0 pictures"),
        (Record(id="mute", parts=(Image(Word("cat")), Text(".", learn=True))), "'mute' has no caption"),
    ],
)
def test_records_that_are_no_captions(tmp_path, record, words):
    with pytest.raises(DataError, match=words):
        evaluate(Writer(), CaptionTask(name="c", records=[record], prompt="Describe it."), tmp_path)


def test_the_typical_caption_says_what_most_say():
    captions = ["a man rides a wave", "a man rides a horse", "a man rides a bike", "three owls", "a dog"]
    found = typical_caption([caption_record(str(i), "x", c) for i, c in enumerate(captions)])
    assert found in captions[:3]
    with pytest.raises(DataError, match="there are none"):
        typical_caption([])
