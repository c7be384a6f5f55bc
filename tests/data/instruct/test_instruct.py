"""Instruction data by an endpoint and by templates: what is asked, what is kept, what it costs, and that it trains."""

import json
import re

import pytest

from isthmus.data.instruct import KINDS, Checks, copy_prompts, instruct, load_prompts
from isthmus.data.sources import open_source
from isthmus.demo.scenes.instruct import CATEGORIES, scene_symbols
from isthmus.endpoint import Endpoint
from isthmus.errors import ConfigError, EndpointError
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from tests.cli.test_cli import run
from tests.miniature import tree
from tests.standin import StandIn

PICTURES = [symbols for _, symbols in scene_symbols(6)]
SOURCE = {"kind": "scenes", "count": 6}


def author(body):
    """Writes what the captions say, by the kind that the system message is about."""
    system, symbols = body["messages"][0]["content"], body["messages"][-1]["content"]
    first = symbols.splitlines()[0]
    if "describe one picture" in system:
        return f"{first[0].upper()}{first[1:]}."
    shape = re.search(r"(cube|sphere|cylinder|cone|ring|star)", first)
    return f"Question:\nWhat is there?\n===\nAnswer:\nA {shape[1] if shape else 'thing'}, it seems."


def make(server, out, *, kinds=KINDS, **options):
    checks = Checks(categories=CATEGORIES)
    asked = Endpoint(server.url, "writer", timeout=5, retries=3)
    return instruct(PICTURES, load_prompts(kinds), asked, out, checks=checks, source=SOURCE, **options)


def rows(out):
    return json.loads((out / "instruct.json").read_text())


def test_rows_in_llavas_form_with_their_making(tmp_path):
    with StandIn(author) as server:
        report = make(server, tmp_path)
    found = rows(tmp_path)
    assert report.rows == {"conversation": 6, "detail": 6, "reasoning": 6}
    assert len({row["id"] for row in found}) == 18
    row = next(r for r in found if r["kind"] == "detail")
    assert row["conversations"][0]["value"].count("<image>") == 1
    assert row["source_id"] in row["id"]
    assert row["model"] == "writer"
    assert row["prompt_sha256"] == load_prompts(["detail"])["detail"].hash
    assert {r["conversations"][0]["value"].startswith("<image>") for r in found} == {True, False}, "before or behind"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"] == {"conversation": 6, "detail": 6, "reasoning": 6}
    assert (manifest["replies"], manifest["prompt_tokens"]) == (18, 1800)
    assert manifest["endpoint"] == server.url


def test_the_request_holds_system_examples_and_symbols(tmp_path):
    with StandIn(author) as server:
        make(server, tmp_path, kinds=["detail"], concurrency=1)
    body = server.requests[0]
    assert [m["role"] for m in body["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert body["messages"][-1]["content"] == PICTURES[0].text(boxes=True)
    assert "[0." in body["messages"][-1]["content"]


def test_refused_replies_are_counted_and_listed(tmp_path):
    with StandIn(lambda body: "I'm sorry, I cannot see it.", faults=["length"]) as server:
        report = make(server, tmp_path, kinds=["detail"], concurrency=1)
    assert rows(tmp_path) == []
    assert report.refused == {"cut": 1, "refusal": 5}
    lines = (tmp_path / "making/quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[0])["reason"].startswith("cut: ")


def test_a_refused_reply_is_asked_for_anew(tmp_path):
    """The second attempt has another seed; only what was refused is asked again."""

    def second_time(body):
        return author(body) if body["seed"] == 1 else "0.123, 0.456"

    with StandIn(second_time) as server:
        report = make(server, tmp_path, kinds=["detail"], attempts=2)
        assert report.rows == {"detail": 6}
        assert len(server.requests) == 12
        assert make(server, tmp_path, kinds=["detail"], attempts=3).sent == 0


def test_going_on_asks_only_what_is_missing(tmp_path):
    with StandIn(author, faults=["", "", "", "404"]) as server:
        with pytest.raises(EndpointError, match="no model"):
            make(server, tmp_path, concurrency=1)
        assert len(rows(tmp_path)) == 3, "what was answered is written all the same"
        report = make(server, tmp_path)
        assert (report.sent, len(rows(tmp_path))) == (15, 18)
        assert set(server.served.values()) == {1}


def test_one_folder_holds_one_making(tmp_path):
    with StandIn(author) as server:
        make(server, tmp_path, kinds=["detail"])
        with pytest.raises(ConfigError, match="another seed"):
            make(server, tmp_path, kinds=["detail"], seed=1)
        with pytest.raises(ConfigError, match="another prompts"):
            make(server, tmp_path)


def test_prompts_of_ones_own(tmp_path):
    copy_prompts(tmp_path)
    with pytest.raises(ConfigError, match="there already"):
        copy_prompts(tmp_path)
    assert load_prompts(KINDS, tmp_path) == load_prompts(KINDS)
    (tmp_path / "detail.yaml").write_text('system: Say what you see.\nquestions: ["What is it?"]\n')
    own = load_prompts(["detail"], tmp_path)["detail"]
    assert own.request(PICTURES[0]).messages[0]["content"] == "Say what you see."
    assert own.hash != load_prompts(["detail"])["detail"].hash
    for content, words in {"system: ''": "a text", "sistem: x": "did you mean 'system'", "[1]": "keys"}.items():
        (tmp_path / "detail.yaml").write_text(content)
        with pytest.raises(ConfigError, match=words):
            load_prompts(["detail"], tmp_path)
    with pytest.raises(ConfigError, match="--copy-prompts"):
        load_prompts(["detail"], tmp_path / "nowhere")


def test_the_command_with_an_endpoint(tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    with StandIn(author, faults=["500", "cut"]) as server:
        command = ["data", "instruct", "--scenes", 3, "--endpoint", server.url, "--model", "writer", "--out", out]
        prices = ["--price-in", 1, "--price-out", 2, "--json", tmp_path / "facts.json"]
        code, said, _ = run(monkeypatch, capsys, *command, *prices)
        assert code == 0
        assert "9 samples (3 conversation, 3 detail, 3 reasoning)" in said
        assert "In a recipe: {kind: llava" in said
        assert "9 replies, 900 tokens read, 180 written, cost 0.0013." in said
        again, _, _ = run(monkeypatch, capsys, *command, *prices)
        assert again == 0
        assert sum(server.served.values()) == 9
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["cost"] == pytest.approx(0.00126)
    from isthmus.data.sources.guess import guess

    source = open_source(guess(out))
    assert len(source) == 9
    raw = source[0].images[0].source.read()
    assert isinstance(raw, bytes)
    assert raw.startswith(b"\x89PNG")


def test_where_no_reply_passes_no_recipe_is_proposed(tmp_path, monkeypatch, capsys):
    """As with a small model, whose every reply is prose."""
    with StandIn(lambda body: "The picture is nice.") as server:
        asked = ["--endpoint", server.url, "--model", "writer", "--scenes", 2, "--kind", "conversation"]
        code, said, _ = run(monkeypatch, capsys, "data", "instruct", *asked, "--out", tmp_path / "data")
    assert code == 0
    assert "0 samples (nothing)" in said
    assert "nothing is there to train on: try another model, or --attempts 3" in said
    assert "In a recipe" not in said


def test_an_endpoint_that_is_slow_is_told_with_what_to_do(tmp_path, monkeypatch, capsys):
    with StandIn(author, faults=["slow"] * 9) as server:
        asked = ["--endpoint", server.url, "--model", "writer", "--scenes", 2, "--kind", "detail", "--retries", 0]
        code, _, said = run(
            monkeypatch, capsys, "data", "instruct", *asked, "--timeout", 0.1, "--out", tmp_path / "data"
        )
    assert code == 2
    assert "took longer than 0.1 s" in said
    assert "The same command repeats them again; a slow endpoint wants more time (--timeout 600)" in " ".join(
        said.split()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scenes", 2], "--endpoint URL and --model NAME, or --offline"),
        (["--scenes", 2, "--data", "x"], "either --data"),
        (["--offline", "--data", "x"], "give --scenes N"),
        (["--offline", "--scenes", 2, "--model", "x"], "runs no model"),
        (["--offline", "--scenes", 2, "--kind", "detial"], "did you mean 'detail'"),
        (["--offline", "--scenes", 2, "--split", "tset"], "did you mean 'test'"),
        (["--data", "nowhere", "--endpoint", "http://x", "--model", "m"], "no data at nowhere"),
        (["--scenes", 2, "--endpoint", "x", "--model", "m"], "no URL"),
        (["--scenes", 2, "--endpoint", "http://x", "--model", "m", "--budget", 1], "prices"),
    ],
)
def test_the_command_explains_what_is_wrong(tmp_path, monkeypatch, capsys, options, words):
    code, _, said = run(monkeypatch, capsys, "data", "instruct", "--out", tmp_path / "x", *options)
    assert code == 2
    assert words in " ".join(said.split())


def test_offline_data_train_a_tiny_llava(tmp_path, monkeypatch, capsys, story):
    """All three kinds from the scenes' truth, the same in every run, and a recipe that reads and learns them."""
    for name in ("one", "two"):
        code, said, _ = run(
            monkeypatch, capsys, "data", "instruct", "--offline", "--scenes", 8, "--out", tmp_path / name
        )
        assert (code, "24 samples" in said) == (0, True)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert {r["kind"] for r in rows(tmp_path / "one")} == set(KINDS)
    spec = {"kind": "llava", "file": str(tmp_path / "one/instruct.json"), "image_folder": str(tmp_path / "one/images")}
    source = open_source(spec)
    assert {source[i].meta["kind"] for i in range(len(source))} == set(KINDS)
    recipe = tree("llava", story)
    recipe["stages"] = [recipe["stages"][1] | {"data": [spec]}]
    recipe["evaluate"] = []
    train(parse_recipe(recipe), tmp_path / "run", progress=False)
    assert (tmp_path / "run/model").is_dir()


def test_templates_are_true():
    """Each answer of the templates stands in the scene's own description, or is a count, a yes or a no."""
    from isthmus.demo.scenes.instruct import written
    from isthmus.demo.scenes.words import describe

    for scene, symbols in scene_symbols(12):
        told = describe(scene)
        answer = written(scene, symbols, "detail").turns[0][1]
        assert answer == told
        reasoned = written(scene, symbols, "reasoning").turns[0]
        assert reasoned[0].endswith("explain.")
        assert ", so the answer is " in reasoned[1]
        for _, short in written(scene, symbols, "conversation").turns:
            known = ("yes", "no", "0", "1", "2", "3", "4", "left", "right", "above", "below", "nothing")
            assert short in known or short in told
