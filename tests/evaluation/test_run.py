import json

import pytest

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation import AnswerPrior, LinearProbeTask, RetrievalTask, VqaTask, ZeroShotTask, evaluate
from isthmus.evaluation.rescore import rescore
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.zero_shot import ClassScores
from tests.evaluation.fakes import Reader, Space, Word, animals, question, vqa_scores
from tests.evaluation.test_answer_tasks import Says
from tests.narrow import must_be, there


def vqa(**changes) -> VqaTask:
    options = {"name": "animals", "records": animals(), "prior": AnswerPrior.fit(animals()), **changes}
    return VqaTask(**options)


def lines(folder):
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]


def test_a_vqa_task_writes_manifest_outputs_and_scores(tmp_path):
    model, seen = Reader(), []
    result = evaluate(model, vqa(decoding={"max_new_tokens": 4}), tmp_path, chunk=4, progress=lambda *p: seen.append(p))
    scores = vqa_scores(result).overall
    assert (scores.accuracy, scores.blind, scores.prior) == (1.0, 0.6, 0.6)
    assert scores.gain == pytest.approx(1.0 - max(0.6, there(scores.shuffled)))
    assert set(vqa_scores(result).kinds) == {"what", "which"}
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert model.decodings[0] == {"max_new_tokens": 4}
    first = lines(tmp_path)[0]
    assert first["shuffled"] is not None
    assert {k: first[k] for k in ("id", "question", "truth", "answer", "kind", "correct", "blind", "prior")} == {
        "id": "q0", "question": "What is it?", "truth": ["cat"], "answer": "cat", "kind": "which", "correct": True,
        "blind": "cat", "prior": "cat",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["decoding"] == {"max_new_tokens": 4}
    assert manifest["seed"] == 0
    assert len(manifest["data"]) == 64
    assert manifest["versions"]["torch"]
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == 1.0


def test_shuffled_pictures_are_those_of_another_sample(tmp_path):
    records = [question(i, str(i)) for i in range(12)]
    rows = evaluate(Reader(), vqa(records=records), tmp_path).rows
    assert all(r.get("shuffled") != r["answer"] for r in rows)
    assert sorted(there(r.get("shuffled")) for r in rows) == sorted(r["answer"] for r in rows)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path):
    whole = evaluate(Reader(), vqa(), tmp_path / "whole", chunk=4)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Reader(limit=17), vqa(), folder, chunk=4)
    assert len(lines(folder)) == 4
    with (folder / "outputs.jsonl").open("a") as file:
        file.write('{"id": "q4", "answ')
    again = Reader()
    resumed = evaluate(again, vqa(), folder, chunk=4)
    assert set(again.asked) == {f"q{i}" for i in range(4, 10)}
    assert resumed.rows == whole.rows
    assert resumed.scores == whole.scores
    for name in ("outputs.jsonl", "scores.json", "manifest.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_evaluation_asks_nothing_more(tmp_path):
    first = evaluate(Reader(), vqa(), tmp_path)
    assert evaluate(object(), vqa(), tmp_path).scores == first.scores


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"decoding": {"max_new_tokens": 9}}, "decoding"),
        ({"records": animals()[:9]}, "data"),
        ({"prior": None}, "prior"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(tmp_path, changes, key):
    evaluate(Reader(), vqa(), tmp_path)
    with pytest.raises(ConfigError, match=key):
        evaluate(Reader(), vqa(**changes), tmp_path)


def test_another_model_is_refused_where_its_hash_is_given(tmp_path):
    evaluate(Reader(), vqa(), tmp_path, model_hash="abc")
    with pytest.raises(ConfigError, match='model: "abc" there, "def" now'):
        evaluate(Reader(), vqa(), tmp_path, model_hash="def")


@pytest.mark.parametrize(("line", "message"), [("nonsense", "line 1 is damaged"), ('{"id": "x"}', "not in the data")])
def test_damaged_outputs_are_named_by_line(tmp_path, line, message):
    evaluate(Reader(), vqa(), tmp_path)
    (tmp_path / "outputs.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        evaluate(Reader(), vqa(), tmp_path)


def test_empty_answers_are_counted_and_wrong(tmp_path):
    records = [question(i, w) for i, w in enumerate(["cat", "", "dog"])]
    records[1] = Record(id="q1", parts=(*records[1].parts[:2], Text("owl", role="assistant", learn=True)))
    scores = vqa_scores(evaluate(Reader(), vqa(records=records), tmp_path)).overall
    assert (scores.empty, scores.n) == (1, 3)
    assert scores.accuracy == pytest.approx(2 / 3)


class Wavers(Reader):
    def gaps(self, records, **decoding):
        return [1e-6 if r.id == "q3" else 0.5 for r in records]


def test_answers_to_which_another_was_near_are_counted_when_asked_for(tmp_path):
    evaluate(Wavers(), vqa(gaps=True), tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["near"] == 1
    assert lines(tmp_path)[3]["gap"] == 1e-6
    before = (tmp_path / "scores.json").read_bytes()
    rescore(tmp_path)
    assert (tmp_path / "scores.json").read_bytes() == before
    with pytest.raises(CapabilityError, match="gives no gaps"):
        evaluate(Reader(), vqa(gaps=True), tmp_path / "other")


def test_text_alone_is_scored_against_its_prior(tmp_path):
    parts = (Text("Say cat.", role="user"), Text("cat", role="assistant", learn=True))
    records = [Record(id="t", parts=parts)]
    scores = vqa_scores(evaluate(Reader(), vqa(records=records, controls=()), tmp_path / "a")).overall
    assert (scores.blind, scores.shuffled, scores.prior) == (None, None, 1.0)
    with pytest.raises(DataError, match="'t' has no picture"):
        evaluate(Reader(), vqa(records=records), tmp_path / "b")


def test_a_model_that_cannot_is_told_what_is_needed(tmp_path):
    with pytest.raises(CapabilityError, match="answer_records"):
        evaluate(Space("cat"), vqa(), tmp_path)


def test_too_few_answers_are_refused(tmp_path):
    class Short:
        def answer_records(self, records, **decoding):
            return ["cat"]

    with pytest.raises(CapabilityError, match="1 answers to 30"):
        evaluate(Short(), vqa(), tmp_path)


def test_ids_must_differ_and_controls_be_known(tmp_path):
    with pytest.raises(DataError, match="'q0'"):
        evaluate(Reader(), vqa(records=animals() + animals()[:1]), tmp_path)
    with pytest.raises(ConfigError, match="'blind'"):
        vqa(controls=["blnd"])


def caption_record(name, word, *captions, number=0):
    return Record(id=name, parts=(Image(Word(word, number)), Text(captions, learn=True)))


def test_retrieval_joins_the_records_of_one_picture(tmp_path):
    records = [
        caption_record("a", "cat", "a cat", "cat two"),
        caption_record("b", "dog", "a dog"),
        caption_record("a again", "cat", "cat three"),
    ]
    result = evaluate(Space("cat", "dog"), RetrievalTask(name="r", records=records), tmp_path)
    assert [r["id"] for r in result.rows] == ["a", "b"]
    assert result.rows[0]["captions"] == ["a cat", "cat two", "cat three"]
    scores = must_be(RetrievalScores, result.scores)
    assert (scores.image_to_text.n, scores.text_to_image.n) == (2, 4)
    assert scores.to_dict()["recall_at_1"] == 1.0


def test_retrieval_wants_one_picture_and_a_caption(tmp_path):
    bare = Record(id="bare", parts=(Image(Word("cat")),))
    with pytest.raises(DataError, match="'bare' has no caption"):
        evaluate(Space("cat"), RetrievalTask(name="r", records=[bare]), tmp_path)
    with pytest.raises(DataError, match="0 pictures"):
        evaluate(Space("cat"), RetrievalTask(name="r", records=[Record(id="t", parts=(Text("cat"),))]), tmp_path)
    with pytest.raises(ConfigError, match="cosine"):
        RetrievalTask(name="r", records=[], similarity="cosin")  # pyright: ignore[reportArgumentType]


def pictured(count, *words):
    return [Record(id=f"{w}{i}", parts=(Image(Word(w, i)),), meta={"class": w}) for w in words for i in range(count)]


def test_zero_shot_by_names(tmp_path):
    records = [*pictured(3, "cat", "dog"), Record(id="odd", parts=(Image(Word("cat", 99)),), meta={"class": "dog"})]
    task = ZeroShotTask(name="z", records=records, classes=["cat", "dog", "owl"])
    result = evaluate(Space("cat", "dog", "owl"), task, tmp_path, chunk=2)
    scores = must_be(ClassScores, result.scores)
    assert scores.top_1 == pytest.approx(6 / 7)
    assert scores.majority == pytest.approx(4 / 7)
    assert [r["correct"] for r in result.rows] == [True] * 6 + [False]
    assert result.rows[0]["answers"][0] == "cat"


def test_zero_shot_refuses_unknown_and_missing_classes(tmp_path):
    with pytest.raises(DataError, match="'dog' is unknown"):
        evaluate(Space("cat", "dog"), ZeroShotTask(name="z", records=pictured(1, "dog"), classes=["dot"]), tmp_path)
    with pytest.raises(DataError, match="no class"):
        evaluate(Space("cat"), ZeroShotTask(name="z", records=animals()), tmp_path / "b")


def test_linear_probe_on_features(tmp_path):
    task = LinearProbeTask(name="p", records=pictured(4, "cat", "dog"), train=pictured(10, "cat", "dog"))
    result = evaluate(Space("cat", "dog"), task, tmp_path)
    assert must_be(ClassScores, result.scores).top_1 == 1.0
    assert result.rows[0]["strength"] > 0


def test_a_folder_without_outputs_yet_takes_a_new_manifest(tmp_path):
    with pytest.raises(DataError):
        evaluate(Reader(), vqa(records=[animals()[0]]), tmp_path)
    assert vqa_scores(evaluate(Reader(), vqa(), tmp_path)).overall.n == 10


def test_outputs_without_a_manifest_are_refused(tmp_path):
    evaluate(Reader(), vqa(), tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="without a manifest"):
        evaluate(Reader(), vqa(), tmp_path)


def test_odd_characters_come_back_as_they_were(tmp_path):
    """Ends of lines that are none in JSON, and half of a surrogate pair, which UTF-8 does not take."""
    odd = "a\u2028b\x85c\x0bd\ud83d"
    records = [question(i, "cat", ask=f"What {odd}?", answers=[odd]) for i in range(3)]
    evaluate(Says(cat=odd), vqa(records=records, controls=()), tmp_path)
    again = rescore(tmp_path)
    rows = [dict(row) for row in again.rows]
    assert [(r["answer"], r["question"]) for r in rows] == [(odd, f"What {odd}?")] * 3
    assert vqa_scores(again).overall.accuracy == 1.0
    assert evaluate(object(), vqa(records=records, controls=()), tmp_path).rows == again.rows
