"""Rules of VqaTask, yes/no, choices by likelihood, conversations: on models that answer by looking words up."""

import json

import pytest

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation import AnswerPrior, VqaTask, evaluate
from isthmus.evaluation.answer_tasks import BinaryTask, ConversationTask, LikelihoodTask
from tests.evaluation.fakes import Reader, Word, facts_of, question, vqa_scores, word_of


class Says(Reader):
    """Answers with ``words[picture]``, and without a picture with ``blind``."""

    def __init__(self, blind: str = "", **words: str) -> None:
        super().__init__(blind)
        self.words = words

    def answer_records(self, records, **decoding):
        return [self.words.get(a, a) for a in super().answer_records(records, **decoding)]


def test_the_rule_of_a_vqa_task_gives_the_points(tmp_path):
    records = [question(0, "hot-dog", answers=["hot dog"] * 4 + ["sausage"] * 6), question(1, "cat")]
    task = VqaTask(name="v", records=records, rule="vqa", controls=())
    result = evaluate(Reader(), task, tmp_path)
    assert result.rows[0]["correct"] == 1.0
    assert vqa_scores(result).overall.accuracy == pytest.approx(0.5), "one answer alone has no other to agree with"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rule"] == "vqa"
    assert manifest["scorer"] == {"name": "vqa", "version": 1, "rule": "vqa 1"}
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        VqaTask(name="v", records=records, rule="exakt")


def test_letters_are_read_from_free_answers_and_gibberish_is_counted(tmp_path):
    records = [
        question(i, w, choices=["a cat", "a dog"], answers=["B"]) for i, w in enumerate(["B.", "dog", "A", "??"])
    ]
    scores = vqa_scores(evaluate(Reader("A"), VqaTask(name="c", records=records, rule="choice"), tmp_path)).overall
    assert (scores.accuracy, scores.unparsable, scores.blind) == (0.5, 1, 0.0)


def test_mixed_data_keep_the_answers_of_records_without_pictures(tmp_path):
    bare = [Record(id=f"t{i}", parts=(Text(f"Say {w}", role="user"), Text(w, role="assistant", learn=True)))
            for i, w in enumerate(["cat", "dog"])]  # fmt: skip
    records = [question(0, "cat"), *bare, question(1, "dog")]
    with pytest.raises(DataError, match="'t0' has no picture"):
        evaluate(Reader(), VqaTask(name="m", records=records), tmp_path / "a")
    rows = evaluate(Reader("cat"), VqaTask(name="m", records=records, mixed=True), tmp_path / "b").rows
    assert [(r["answer"], r.get("blind"), r.get("shuffled")) for r in rows] == [
        ("cat", "cat", "dog"), ("cat", "cat", "cat"), ("cat", "cat", "cat"), ("dog", "cat", "cat"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no sample has a picture"):
        evaluate(Reader(), VqaTask(name="m", records=bare, mixed=True), tmp_path / "c")


def test_yes_or_no_with_its_controls(tmp_path):
    records = [
        question(i, w, kind="popular", ask="Is there a dog?", answers=[w]) for i, w in enumerate(["yes", "no"] * 3)
    ]
    prior = AnswerPrior.fit(records[:1])
    result = evaluate(Says("no", yes="Yes, one."), BinaryTask(name="pope", records=records, prior=prior), tmp_path)
    facts = facts_of(result.scores)
    assert (facts["accuracy"], facts["blind"], facts["prior"]) == (1.0, 0.5, 0.5)
    assert facts["kinds"]["popular"]["f1"] == 1.0
    assert json.loads((tmp_path / "manifest.json").read_text())["kind"] == "binary"


class Weigher:
    """Log-likelihood -1 for the word in the picture, -2 for the first candidate, else -3; blind: all alike."""

    def score(self, parts, candidates):
        seen = [word_of(p) for p in parts if isinstance(p, Image)]
        if not seen:
            return [-1.0] * len(candidates)
        return [-1.0 if c in seen else -2.0 if i == 0 else -3.0 for i, c in enumerate(candidates)]


def test_choices_by_likelihood(tmp_path):
    records = [question(i, w, choices=["cat", "dog"], answers=[w]) for i, w in enumerate(["dog", "dog", "cat", "owl"])]
    records[3] = question(3, "owl", choices=["cat", "dog"], answers=["dog"])
    task = LikelihoodTask(name="l", records=records)
    result = evaluate(Weigher(), task, tmp_path)
    assert [r["answer"] for r in result.rows] == ["B", "B", "A", "A"]
    assert result.rows[0]["log_likelihoods"] == [-2.0, -1.0]
    assert all(r.get("blind") == "" for r in result.rows), "two likeliest choices are no answer"
    assert (vqa_scores(result).overall.accuracy, vqa_scores(result).overall.blind) == (0.75, 0.0)
    with pytest.raises(DataError, match="'q0' has no `choices`"):
        evaluate(Weigher(), LikelihoodTask(name="l", records=[question(0, "x")], controls=()), tmp_path / "x")
    with pytest.raises(ConfigError, match="text or letter"):
        LikelihoodTask(name="l", records=records, answer_with="number")  # pyright: ignore[reportArgumentType]


def test_a_truth_that_is_no_choice_is_met_before_any_is_weighed(tmp_path):
    class Never(Weigher):
        def score(self, parts, candidates):
            raise AssertionError("asked")

    records = [question(0, "a", choices="ab", answers=["a"]), question(1, "1", choices="ab", answers=["1"])]
    with pytest.raises(DataError, match="'q1' has the truth '1', which is none of its choices"):
        evaluate(Never(), LikelihoodTask(name="l", records=records), tmp_path)


def test_likelihood_per_character_and_of_letters(tmp_path):
    class Longer:
        def score(self, parts, candidates):
            return [-float(len(c)) * (0.5 if c == "a long answer" else 1) for c in candidates]

    records = [question(0, "x", choices=["no", "a long answer"], answers=["B"])]
    first = evaluate(Longer(), LikelihoodTask(name="l", records=records, controls=()), tmp_path / "a")
    second = evaluate(Longer(), LikelihoodTask(name="l", records=records, controls=(), per="character"), tmp_path / "b")
    assert (first.rows[0]["answer"], second.rows[0]["answer"]) == ("A", "B")

    class Nan:
        def score(self, parts, candidates):
            return [float("nan")] * len(candidates)

    with pytest.raises(CapabilityError, match="log-likelihoods of 2 candidates"):
        evaluate(Nan(), LikelihoodTask(name="l", records=records, controls=()), tmp_path / "c")


def talk(number: int, word: str, colour: str) -> Record:
    """A first question about the picture, and a follow-up that only the first answer makes answerable."""
    return Record(
        id=f"c{number}",
        parts=(
            Image(Word(word, number)),
            Text("What is it?", role="user"),
            Text(word, role="assistant", learn=True),
            Text("Spell it.", role="user"),
            Text("-".join(word), role="assistant", learn=True),
        ),
        meta={"kinds": ("what", "spell")},
    )


class Remembers:
    """Names the picture (``wrong`` for pictures in ``blind_to``); spells the last thing it said itself."""

    def __init__(self, *blind_to: str) -> None:
        self.blind_to, self.prompts = blind_to, []

    def answer_records(self, records, **decoding):
        self.prompts += [[p.text for p in r.parts if isinstance(p, Text)] for r in records]
        answers = []
        for record in records:
            said = [t.text for t in record.texts if t.role == "assistant"]
            if "Spell" in record.texts[-1].text:
                answers.append("-".join(said[-1]) if said else "what?")
            else:
                seen = word_of(record.images[0]) if record.images else ""
                answers.append("wrong" if seen in self.blind_to else seen)
        return answers


@pytest.mark.parametrize(("history", "spelt"), [("own", 0.5), ("true", 1.0)])
def test_a_conversation_with_a_memory_of_ones_own_or_the_true_one(tmp_path, history, spelt):
    records = [talk(0, "cat", "red"), talk(1, "dog", "blue")]
    task = ConversationTask(name="t", records=records, history=history)
    result = evaluate(Remembers("dog"), task, tmp_path)
    assert [r["id"] for r in result.rows] == ["c0/1", "c0/2", "c1/1", "c1/2"]
    facts = facts_of(result.scores)
    assert facts["turns"] == {"1": 0.5, "2": spelt}
    assert facts["kinds"]["spell"]["accuracy"] == spelt
    assert facts["follow_ups"]["alone"] == 0.0
    assert facts["follow_ups"]["gain_of_history"] == spelt, "a follow-up needs what was said before"
    blind = {"own": "(no answer)", "true": "cat"}[history]
    assert result.rows[1].get("blind") == "-".join(blind)
    assert result.rows[0]["alone"] == result.rows[0]["answer"]


def test_an_interrupted_conversation_goes_on_with_whole_records(tmp_path):
    records = [talk(i, w, "") for i, w in enumerate(["cat", "dog", "owl"])]
    task = ConversationTask(name="t", records=records)
    whole = evaluate(Remembers(), task, tmp_path / "whole", chunk=4)
    evaluate(Remembers(), task, tmp_path / "cut", chunk=4)
    lines = (tmp_path / "cut/outputs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/outputs.jsonl").write_text("".join(lines[:3]))
    assert evaluate(Remembers(), task, tmp_path / "cut", chunk=4).rows == whole.rows
    with pytest.raises(ConfigError, match="own or true"):
        ConversationTask(name="t", records=records, history="none")  # pyright: ignore[reportArgumentType]
    as_yaml_reads_it = ConversationTask(name="t", records=records, history=True)  # pyright: ignore[reportArgumentType]
    assert as_yaml_reads_it.history == "true"


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (BinaryTask(name="t", records=[question(0, "no"), question(1, "blue")]), "'q1' has the truth 'blue'"),
        (VqaTask(name="t", records=[question(0, "A", choices="AB"), question(1, "A")], rule="choice"), "'q1' has no"),
    ],
)
def test_what_the_rule_cannot_score_is_met_before_the_model_is_asked(tmp_path, task, words):
    model = Reader()
    with pytest.raises(DataError, match=words):
        evaluate(model, task, tmp_path)
    assert not model.asked


def test_a_conversation_has_no_choices():
    with pytest.raises(ConfigError, match="no choices; take another rule"):
        ConversationTask(name="t", records=[talk(0, "cat", "")], rule="choice")
