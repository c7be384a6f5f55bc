"""Score folders without a model: the same scores again, other rules beside them, and two folders in pairs."""

import json

import pytest

from isthmus.data.record import Image, Record, Text
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import AnswerPrior, LinearProbeTask, RetrievalTask, VqaTask, ZeroShotTask, evaluate
from isthmus.evaluation.answer_tasks import BinaryTask, ConversationTask, LikelihoodTask
from isthmus.evaluation.caption_task import CaptionTask
from isthmus.evaluation.grouped import CircularTask, MmeTask
from isthmus.evaluation.matching import MatchingTask
from isthmus.evaluation.rerank import RerankTask
from isthmus.evaluation.rescore import compare, read_folder, rescore
from isthmus.evaluation.scorers import KINDS
from tests.evaluation.fakes import Reader, Space, Word, animals, question
from tests.evaluation.test_answer_tasks import Remembers, Says, Weigher, talk
from tests.evaluation.test_rerank import Judge
from tests.evaluation.test_rerank import records as pictures_of_words
from tests.evaluation.test_run import pictured

CAPTIONED = [Record(id=w, parts=(Image(Word(w)), Text((f"a {w} here", w), learn=True))) for w in ("cat", "dog")]
CHOSEN = [question(i, w, choices=["cat", "dog"], answers=[w]) for i, w in enumerate(["cat", "dog"])]
GROUPED = {"group": "g", "choices": ["cat", "dog"]}
TASKS = [
    (Reader(), VqaTask(name="t", records=animals(), prior=AnswerPrior.fit(animals()))),
    (Reader("no"), BinaryTask(name="t", records=[question(i, w, answers=[w]) for i, w in enumerate(["yes", "no"])])),
    (Reader("no"), MmeTask(name="t", records=[question(i, w, group="g") for i, w in enumerate(["yes", "no"])])),
    (Reader(), CircularTask(name="t", records=[question(i, w, **GROUPED) for i, w in enumerate(["cat", "dog"])])),
    (Weigher(), LikelihoodTask(name="t", records=CHOSEN)),
    (Remembers("dog"), ConversationTask(name="t", records=[talk(0, "cat", ""), talk(1, "dog", "")])),
    (Reader("?"), CaptionTask(name="t", records=CAPTIONED, prompt="What?", prior="a bird")),
    (Space("cat", "dog"), RetrievalTask(name="t", records=CAPTIONED)),
    (Space("cat", "dog"), ZeroShotTask(name="t", records=pictured(2, "cat", "dog"))),
    (
        Space("cat", "dog"),
        LinearProbeTask(name="t", records=pictured(2, "cat", "dog"), train=pictured(4, "cat", "dog")),
    ),
    (Judge(), RerankTask(name="t", records=pictures_of_words(2), rerank=3)),
    (Space("cat", "dog"), MatchingTask(name="t", records=CAPTIONED)),
]


@pytest.mark.parametrize(("model", "task"), TASKS, ids=[t.kind for _, t in TASKS])
def test_every_kind_of_task_is_scored_again_without_its_model(tmp_path, model, task):
    evaluate(model, task, tmp_path)
    before = (tmp_path / "scores.json").read_bytes()
    (tmp_path / "scores.json").unlink()
    rescore(tmp_path)
    assert (tmp_path / "scores.json").read_bytes() == before
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["scorer"]["version"] == KINDS[task.kind].version == task.version
    if task.outcomes(read_folder(tmp_path).rows, manifest) is None:
        with pytest.raises(ConfigError, match="cannot be paired"):
            compare(tmp_path, tmp_path)
    else:
        assert all(d.difference == 0 and d.p == 1.0 for d in compare(tmp_path, tmp_path, draws=200))


def test_all_kinds_are_tried():
    """Answers that are judged need an endpoint: see test_judge.py."""
    assert {t.kind for _, t in TASKS} == set(KINDS) - {"judged"}


def test_another_rule_stands_beside_the_first(tmp_path):
    records = [question(i, "Yes", answers=["yes"] * 10) for i in range(3)] + [question(3, "no", answers=["no"] * 10)]
    evaluate(Reader(), VqaTask(name="t", records=records), tmp_path)
    first = (tmp_path / "scores.json").read_bytes()
    found = rescore(tmp_path, rule="vqa").scores.to_dict()
    assert json.loads(first)["accuracy"] == 1.0
    assert found["accuracy"] == 0.25, "ten equal answers are not normalised by the official rule"
    assert (tmp_path / "scores.json").read_bytes() == first
    assert json.loads((tmp_path / "scores.vqa.json").read_text())["scorer"]["rule"] == "vqa 1"
    with pytest.raises(ConfigError, match="no scoring rule 'vqqa'"):
        rescore(tmp_path, rule="vqqa")


def test_a_rule_where_there_is_none_is_refused(tmp_path):
    evaluate(Space("cat", "dog"), RetrievalTask(name="t", records=CAPTIONED), tmp_path)
    with pytest.raises(ConfigError, match="one rule only"):
        rescore(tmp_path, rule="vqa")


def test_folders_that_cannot_be_scored(tmp_path):
    evaluate(Reader(), VqaTask(name="t", records=animals()), tmp_path / "runs" / "a")
    with pytest.raises(DataError, match=r"no manifest\.json\. It holds score folders of its own: a"):
        read_folder(tmp_path / "runs")
    folder = tmp_path / "runs" / "a"
    lines = (folder / "outputs.jsonl").read_text().splitlines(keepends=True)
    for content, words in [
        (lines[:-1], "9 of 10 items have an output"),
        ([*lines, lines[0]], "the id 'q0' is there twice"),
        ([*lines[:-1], "{"], "line 10 is damaged"),
    ]:
        (folder / "outputs.jsonl").write_text("".join(content))
        with pytest.raises(DataError, match=words):
            rescore(folder)


def test_outputs_of_another_form_are_named(tmp_path):
    evaluate(Reader(), VqaTask(name="t", records=animals()[:1], controls=()), tmp_path)
    outputs, manifest = tmp_path / "outputs.jsonl", tmp_path / "manifest.json"
    row, facts = json.loads(outputs.read_text()), json.loads(manifest.read_text())
    for content, words in [
        (json.dumps({"id": "q0"}), "do not hold what a task of kind 'vqa' is scored by .*KeyError"),
        (json.dumps(row | {"truth": 3}), "do not hold .*TypeError"),
        (json.dumps([1]), "line 1 is damaged"),
        ("\udcff", "line 1 is damaged"),
    ]:
        outputs.write_bytes(content.encode(errors="surrogateescape") + b"\n")
        with pytest.raises(DataError, match=words):
            rescore(tmp_path)
    outputs.write_text(json.dumps(row) + "\n")
    manifest.write_text(json.dumps(facts | {"seed": "x"}))
    with pytest.raises(DataError, match="its outputs and its manifest do not hold"):
        rescore(tmp_path)
    manifest.write_text("[1]")
    with pytest.raises(ConfigError, match="is no manifest but a list"):
        evaluate(Reader(), VqaTask(name="t", records=animals()[:1], controls=()), tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        rescore(tmp_path)


class Often(Reader):
    """Right in all but every ``n``-th question."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def answer_records(self, records, **decoding):
        said = super().answer_records(records, **decoding)
        return ["?" if int(r.id[1:]) % self.n == 0 else a for r, a in zip(records, said, strict=True)]


def test_two_folders_in_pairs(tmp_path):
    records = [question(i, "cat") for i in range(200)]
    for name, n in (("a", 4), ("b", 20), ("c", 21)):
        evaluate(Often(n), VqaTask(name="t", records=records, controls=()), tmp_path / name)
    (better,) = compare(tmp_path / "a", tmp_path / "b")
    assert (better.first, better.second) == (0.75, 0.95)
    assert better.difference == pytest.approx(0.2)
    assert 0.13 < better.interval[0] < 0.2 < better.interval[1] < 0.27
    assert better.p < 0.001
    (back,) = compare(tmp_path / "b", tmp_path / "a")
    assert back.difference == pytest.approx(-better.difference)
    assert back.interval == pytest.approx((-better.interval[1], -better.interval[0]), abs=0.01)
    (equal,) = compare(tmp_path / "b", tmp_path / "c")
    assert equal.p > 0.5, "the same number of mistakes in other places"


def test_folders_of_several_seeds_count_as_their_mean(tmp_path):
    records = [question(i, "cat") for i in range(200)]
    for name, n in (("a0", 4), ("a1", 5), ("b0", 20), ("b1", 10)):
        evaluate(Often(n), VqaTask(name="t", records=records, controls=()), tmp_path / name)
    sides = [[tmp_path / f"{side}{seed}" for seed in (0, 1)] for side in "ab"]
    (found,) = compare(*sides)
    assert (found.first, found.second) == pytest.approx(((0.75 + 0.8) / 2, (0.95 + 0.9) / 2))
    (single,) = compare(sides[0][0], sides[1][0])
    width, narrow = (d.interval[1] - d.interval[0] for d in (single, found))
    assert narrow < width  # two answers to a question say more than one, and no more than that


def test_only_like_is_paired_with_like(tmp_path):
    evaluate(Reader(), VqaTask(name="t", records=animals()), tmp_path / "a")
    evaluate(Reader(), VqaTask(name="t", records=animals()[:9]), tmp_path / "b")
    evaluate(Reader(), VqaTask(name="t", records=animals(), rule="gqa"), tmp_path / "c")
    other = [question(i, "owl") for i in range(10)]
    evaluate(Reader(), VqaTask(name="t", records=other), tmp_path / "d")
    for name, error, words in [
        ("b", DataError, "1 are in one only, the first is 'q9'"),
        ("c", ConfigError, "one kind and rule"),
        ("d", DataError, "'q0' with different truths"),
    ]:
        with pytest.raises(error, match=words):
            compare(tmp_path / "a", tmp_path / name)


def test_two_folders_by_another_rule(tmp_path):
    records = [question(i, "cat", answers=["cat"] * 10) for i in range(4)]
    for name, said, rule in (("a", "Cat", "exact"), ("b", "dog", "vqa")):
        model = Says(cat=said)
        evaluate(model, VqaTask(name="t", records=records, controls=(), rule=rule), tmp_path / name)
    (exact,) = compare(tmp_path / "a", tmp_path / "b", rule="exact")
    assert (exact.first, exact.second) == (1.0, 0.0)
    (official,) = compare(tmp_path / "a", tmp_path / "b", rule="vqa")
    assert official.first == 0.0, "ten equal answers are not normalised by the official rule"
    with pytest.raises(ConfigError, match="no scoring rule 'vqqa'"):
        compare(tmp_path / "a", tmp_path / "b", rule="vqqa")


@pytest.mark.parametrize("rule", [5, ["a"], True])
def test_a_rule_that_is_no_name_is_refused(tmp_path, rule):
    evaluate(Reader(), VqaTask(name="t", records=animals()), tmp_path)
    with pytest.raises(ConfigError, match="There is no scoring rule"):
        rescore(tmp_path, rule=rule)


def test_a_rule_that_does_not_fit_the_rows_names_one(tmp_path):
    evaluate(Reader(), VqaTask(name="t", records=animals()), tmp_path)
    with pytest.raises(DataError, match="'q0' has no `choices`"):
        rescore(tmp_path, rule="choice")
