"""A judge behind a stand-in endpoint: scores in both orders, replies that cannot be read, and judges found out."""

import json
import re

import pytest
import yaml
from rich.console import Console

from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, DataError, EndpointError
from isthmus.evaluation.judge import Judge, Pair, parse
from isthmus.evaluation.judged import JudgedTask, score
from isthmus.evaluation.outputs import JudgedRow
from isthmus.evaluation.rescore import compare, rescore
from isthmus.evaluation.run import evaluate
from isthmus.recipes.tables import score_table
from tests.cli.test_cli import run
from tests.data.helpers import file_of, png, text_of
from tests.evaluation.fakes import Reader, facts_of, question
from tests.narrow import there
from tests.standin import StandIn

RIGHT = {"cat 0": "a cat", "cow 1": "a cow", "hen 2": "a hen", "dog 3": "a dog"}


def bench():
    """Four pictures of an animal each; the context says which it is."""
    kinds = ["conv", "detail", "complex", "conv"]
    return [
        question(int(word[-1]), word[:3], kind=kinds[int(word[-1])], context=f"The picture shows {animal}.")
        for word, animal in RIGHT.items()
    ]


def answers_of(body):
    content = body["messages"][-1]["content"]
    found = re.search(r"\[Assistant 1\]\n(.*)\n\[End.*\[Assistant 2\]\n(.*)\n\[End", content, re.DOTALL)
    return there(found).groups()


def fair(body):
    """8 to an answer that the context holds, 4 to another."""
    context = body["messages"][-1]["content"].split("[Question]")[0]
    first, second = (8 if answer in context else 4 for answer in answers_of(body))
    return f"{first} {second}\nBecause."


def judged(server, records=None, **options):
    judge = {"url": server.url, "model": "writer", "timeout": 5, **options.pop("judge", {})}
    return JudgedTask(name="bench", records=records or bench(), judge=judge, **options)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7\nGood.", (8, 7)),
        ("8, 7.5", (8, 7.5)),
        (" 8/10 7/10\n", (8, 7)),
        ("8", None),
        ("8 7 6", None),
        ("Scores: 8 7", None),
        ("11 3", None),
        ("0 3", None),
        ("", None),
    ],
)
def test_only_two_scores_are_read(text, scores):
    assert parse(text) == scores


def test_a_ratio_of_means_in_both_orders(tmp_path):
    """The model says cat to everything: right once of four. Means 5 and 8, not the mean of four ratios."""

    class Cat:
        def answer_records(self, records, **_):
            return ["cat"] * len(records)

    with StandIn(fair) as server:
        result = evaluate(Cat(), judged(server), tmp_path, model_hash="m")
        pairs = {answers_of(body) for body in server.requests}
        assert ("dog", "cat") in pairs
        assert ("cat", "dog") in pairs
    facts = facts_of(result.scores)
    assert facts["relative"] == pytest.approx((8 + 4 * 3) / (8 * 4))
    assert (facts["candidate"], facts["reference"], facts["n"], facts["excluded"]) == (5.0, 8.0, 4, 0)
    assert facts["kinds"]["conv"]["relative"] == pytest.approx(12 / 16)
    assert facts["orders"] == {"stays": 4, "first": 0, "second": 0, "mixed": 0}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["judge"]["model"] == "writer"
    assert len(manifest["judge"]["prompt_sha256"]) == 64
    assert "impartial" in manifest["judge"]["prompt"]["system"]
    assert "127.0.0.1" not in json.dumps(manifest), "another port is the same judge"
    assert rescore(tmp_path).scores.to_dict() == facts
    assert compare(tmp_path, tmp_path)[0].difference == 0


def test_means_come_before_their_ratio_and_both_orders_count_alike():
    told = [([10, 5], [7, 8]), ([2, 6], [8, 4])]  # the reference's score first, and the candidate's first
    rows: list[JudgedRow] = [
        {
            "id": str(n),
            "kind": "conv",
            "question": "?",
            "truth": ["a cat"],
            "answer": "a cat",
            "reference_first": {"scores": [float(s) for s in one], "tries": 1, "text": ""},
            "candidate_first": {"scores": [float(s) for s in two], "tries": 1, "text": ""},
        }
        for n, (one, two) in enumerate(told)
    ]
    found = score(rows).overall
    assert (found.candidate, found.reference) == (6.5, 6.0)
    assert found.relative == pytest.approx(13 / 12), "not the mean of 6/9 and 7/3"


def test_unreadable_replies_are_asked_again_then_excluded(tmp_path):
    """Every first reply is prose; about the hen no reply can be read."""

    def odd(body):
        return fair(body) if body["seed"] and "a hen" not in body["messages"][-1]["content"] else "Both are good."

    with StandIn(odd) as server:
        facts = facts_of(evaluate(Reader(), judged(server, sanity=False), tmp_path).scores)
    assert (facts["n"], facts["excluded"], facts["retried"]) == (3, 1, 8)
    assert facts["relative"] == 1.0
    assert facts["kinds"]["complex"] == {
        "relative": None,
        "relative_interval": None,
        "candidate": None,
        "reference": None,
        "n": 0,
        "excluded": 1,
    }


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda body: "9 5", "same scores"),
        (lambda body: f"{8 + len(answers_of(body)[0]) % 2} 5", "stands first"),
        (lambda body: "7 7", "same scores"),
        (lambda body: f"3 {8 + len(answers_of(body)[0]) % 2}", "stands second"),
        (lambda body: "I like both.", "nothing that can be read"),
        (lambda body: " ".join(reversed(fair(body).split("\n")[0].split(" "))), "only in 0"),
    ],
    ids=["constant", "first", "tie", "second", "prose", "perverse"],
)
def test_judges_that_do_not_judge_are_found_out(tmp_path, reply, words):
    records = bench()
    records[0] = question(0, "ox", kind="conv", context="The picture shows an ox.")  # answers of several lengths
    with StandIn(reply) as server:
        with pytest.raises(EndpointError, match=words) as found:
            evaluate(Reader(), judged(server, records), tmp_path)
        shown = re.search(r"It wrote, for instance: '(.+?)'\. Its scores", str(found.value))
        assert there(shown)[1].replace("\\n", "\n") in {reply(body) for body in server.requests}
        assert len(server.requests) <= 2 * 4 * 3, "found out before the work is paid for"
        if words == "stands first":
            facts = facts_of(evaluate(Reader(), judged(server, records, sanity=False), tmp_path / "all").scores)
            assert facts["orders"]["first"] == facts["n"] == 4


def test_an_endpoint_that_is_gone_keeps_what_was_judged(tmp_path):
    """Four questions are judged, of the fifth no reply comes; the same call then asks about that one alone."""
    records = [*bench(), question(4, "pig", kind="conv", context="The picture shows a pig.")]
    patient = {"retries": 0}
    with StandIn(fair) as server:
        server.faults = [""] * 8 + ["500"] * 2
        with pytest.raises(EndpointError, match=r"answered q4 with 500 .* is kept, and the same command goes on"):
            evaluate(Reader(), judged(server, records, sanity=False, judge=patient), tmp_path)
        assert len((tmp_path / "outputs.jsonl").read_text().splitlines()) == 4
        asked = len(server.requests)
        server.faults = []
        facts = facts_of(evaluate(Reader(), judged(server, records, sanity=False, judge=patient), tmp_path).scores)
        assert (facts["n"], len(server.requests) - asked) == (5, 2)
    with pytest.raises(EndpointError, match=r"is a server running at that URL\? What was judged before is kept"):
        evaluate(Reader(), judged(server, sanity=False, judge=patient), tmp_path / "none")
    with StandIn(fair) as server:
        server.faults = ["slow"] * 99
        slow = judged(server, sanity=False, judge={"retries": 0, "timeout": 0.1})
        with pytest.raises(EndpointError, match=r"took longer than 0.1 s .*\(--set task.judge.timeout"):
            evaluate(Reader(), slow, tmp_path / "slow")


def test_what_no_scores_could_be_read_of_is_told_with_where_to_look(tmp_path):
    with StandIn(lambda body: "Both." if "a hen" in body["messages"][-1]["content"] else fair(body)) as server:
        facts = facts_of(evaluate(Reader(), judged(server, sanity=False), tmp_path).scores)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(score_table("bench", facts))
    said = " ".join(shown.get().split())
    assert "; 1 question excluded, of which no two scores could be read (outputs.jsonl)" in said


def test_a_fair_judge_passes():
    pair = Pair("p", "conv", "The picture shows a cat.", "What is it?", "cat", "hen")
    with StandIn(fair) as server:
        assert Judge(url=server.url, model="writer").probe([pair] * 3) == {"right": 3}


def test_braces_of_an_answer_are_no_places():
    with StandIn(lambda body: "5 5") as server:
        Judge(url=server.url, model="writer").reviews([Pair("p", "new", "c", "q", "{second} {0}", "two")])
        assert answers_of(server.requests[0]) == ("{second} {0}", "two")
        assert "helpful" in server.requests[0]["messages"][-1]["content"], "an unknown category takes the other rule"


def test_a_prompt_of_ones_own(tmp_path):
    path = tmp_path / "judge.yaml"
    good = {"system": "s", "rules": {"other": "r"}, "layout": "{context}{question}{first}{second}{rule}"}
    path.write_text(yaml.safe_dump(good))
    with StandIn(lambda body: "5 5") as server:
        own = Judge(url=server.url, model="writer", prompt=str(path))
        own.reviews([Pair("p", "conv", "C", "Q", "A", "B")])
        assert server.requests[0]["messages"][1]["content"] == "CQABr"
    for change, words in (
        ({"rules": {}}, "one called `other`"),
        ({"layout": "x"}, "{context}"),
        ({"rule": 1}, "did you"),
    ):
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(ConfigError, match=words):
            Judge(url="http://x", model="m", prompt=str(path))


def test_what_a_judge_needs():
    with pytest.raises(ConfigError, match="--judge URL"):
        JudgedTask(name="t", records=bench(), judge={"url": "http://x"})
    with pytest.raises(ConfigError, match=r"judge: unknown option 'modle'; did you mean 'model'"):
        JudgedTask(name="t", records=bench(), judge={"url": "http://x", "model": "m", "modle": 1})
    with pytest.raises(ConfigError, match=r"judge: timeout: .*float"):
        JudgedTask(name="t", records=bench(), judge={"url": "http://x", "model": "m", "timeout": "soon"})
    with pytest.raises(DataError, match="no `context`"):
        JudgedTask(name="t", records=[question(0, "cat")], judge={"url": "http://x", "model": "m"}).describe()
    with pytest.raises(DataError, match="empty"):
        score([])


def write_bench(folder):
    """LLaVA-Bench's three files, about two pictures."""
    asked, given, told = [], [], []
    for number, (colour, word) in enumerate((((255, 0, 0), "red"), ((0, 0, 255), "blue"))):
        (folder / f"{number}.png").write_bytes(png(colour, (64, 64)))
        asked.append({"question_id": number, "image": f"{number}.png", "text": "What colour?", "category": "conv"})
        given.append({"question_id": number, "text": word})
        box = {"category": "square", "bbox": [0, 0, 1, 1]}
        told.append({"id": number, "image": f"{number}.png", "captions": [f"It is {word}."], "instances": [box]})
    for name, rows in (("q", asked), ("r", given), ("c", told)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"kind": "llava-bench", "questions": "q.jsonl", "references": "r.jsonl", "contexts": "c.jsonl"}


def test_llava_bench_puts_its_files_together(tmp_path):
    spec = write_bench(tmp_path)
    source = open_source(spec, data_root=tmp_path)
    assert source[0].meta["context"] == "It is red.\n\nsquare: [0.000, 0.000, 1.000, 1.000]"
    assert source[0].meta["kind"] == "conv"
    assert text_of(source[1].parts[-1]) == "blue"
    (tmp_path / "r.jsonl").write_text('{"question_id": 0, "text": "red"}')
    with pytest.raises(DataError, match=r"question 1 of q\.jsonl has no reference"):
        open_source(spec, data_root=tmp_path)


def test_llavas_own_files_fit_together(real_data):
    folder = real_data / "formats/llava"
    names = {"questions": "qa90_questions", "references": "qa90_gpt4_answer", "contexts": "caps_boxes_coco2014_val_80"}
    spec = {"kind": "llava-bench", **{k: f"{v}.jsonl" for k, v in names.items()}, "image_name": "COCO_val2014_{image}"}
    source = open_source(spec, data_root=folder)
    assert len(source) == 90
    assert file_of(source[0].images[0]).name == "COCO_val2014_000000441147.jpg"


def test_the_command_shows_relative_scores(story, tmp_path, monkeypatch, capsys):
    spec = {k: v if k == "kind" else str(tmp_path / v) for k, v in write_bench(tmp_path).items()}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(spec))
    with StandIn(fair) as server:
        command = ["eval", story / "llava", "--data", tmp_path / "bench.yaml", "--judge", server.url]
        more = ["--judge-model", "writer", "--set", "task.decoding={max_new_tokens: 2}", "--out", tmp_path / "out"]
        more += ["--set", "task.judge.max_tokens=77"]
        code, said, wrong = run(monkeypatch, capsys, *command, *more)
        assert (code, wrong) == (0, "")
        assert "relative" in said
        assert {body["max_tokens"] for body in server.requests} == {77}
        asked = len(server.requests)
        code, _, _ = run(monkeypatch, capsys, *command, *more)
        assert (code, len(server.requests)) == (0, asked), "what was judged is not asked again"
    code, _, wrong = run(monkeypatch, capsys, *command)
    assert (code, "--judge-model" in wrong) == (2, True)
    code, _, wrong = run(monkeypatch, capsys, "eval", story / "llava", "--judge", "http://x")
    assert (code, "--data" in wrong) == (2, True)
