"""A file of requests: answered through the server's checks, resumed, and refused where it is no such file."""

import json

import pytest

from isthmus.errors import DataError
from isthmus.serving.api import create_app
from isthmus.serving.batch import models_of, run_batch
from isthmus.serving.limits import Limits
from tests.cli.test_cli import run
from tests.serving.helpers import asked, models, shown

CHAT = "/v1/chat/completions"


def line(name, body, url=CHAT):
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def lines(count=5, model="llava"):
    found = [line(f"c{n}", {"model": model, "messages": asked("what?", n), "max_tokens": 4 + n}) for n in range(count)]
    found.append(line("e", {"model": "clip", "input": ["a red cube", shown(1)]}, "/v1/embeddings"))
    found.append(line("bad", {"model": model, "messages": [], "max_tokens": 4}))
    return found


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def app(**limits):
    return create_app({n: models()[n] for n in ("llava", "clip")}, limits=Limits(**limits))


def answers(path):
    return {row["custom_id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_every_request_gets_the_servers_answer(served, tmp_path):
    rows = lines()
    outcome = run_batch(app(queue=2), written(tmp_path / "r.jsonl", rows), tmp_path / "a.jsonl", together=4)
    assert (outcome.requests, outcome.before, outcome.answered, outcome.failed) == (7, 0, 7, 1)
    found = answers(tmp_path / "a.jsonl")
    assert found.keys() == {row["custom_id"] for row in rows}
    for row in rows[:5]:
        expected = served.post(CHAT, row["body"]).json["choices"]
        assert found[row["custom_id"]]["response"]["body"]["choices"] == expected
        assert found[row["custom_id"]]["error"] is None
    assert found["e"]["response"]["body"]["data"][1]["shape"] == [24]
    assert (found["bad"]["response"]["status_code"], found["bad"]["error"]["code"]) == (400, "invalid_value")


def test_a_run_goes_on_where_it_stopped(tmp_path):
    requests, out = written(tmp_path / "r.jsonl", lines()), tmp_path / "a.jsonl"
    run_batch(app(), requests, out, together=2)
    whole = out.read_text().splitlines()
    busy = json.dumps({"custom_id": "e", "response": {"status_code": 503, "body": {}}, "error": {}})
    kept = [row for row in whole if json.loads(row)["custom_id"] in ("c0", "bad")]
    out.write_text("\n".join([*kept, busy, whole[-1][:40]]))  # the last line was cut off
    outcome = run_batch(app(), requests, out, together=2)
    assert (outcome.before, outcome.answered, outcome.failed) == (2, 5, 1)  # an error of the request's own stays
    assert {k: v["response"]["status_code"] for k, v in answers(out).items() if k != "bad"} == dict.fromkeys(
        ["c0", "c1", "c2", "c3", "c4", "e"], 200
    )
    again = run_batch(app(), requests, out, together=2)
    assert (again.answered, again.failed) == (0, 1)
    assert len(out.read_text().splitlines()) == 7


def test_other_ends_of_lines_in_a_name_or_an_answer_do_not_cut_it(tmp_path):
    name = "a\u2028b\x85c"
    requests, out = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    row = line(name, {"model": "llava", "messages": asked("what?", 1), "max_tokens": 2})
    requests.write_bytes(f"{json.dumps(row)}\r\n".encode("utf-8-sig"))  # as Windows writes it
    assert run_batch(app(), requests, out, together=1).failed == 0
    before = out.read_bytes()
    outcome = run_batch(app(), requests, out, together=1)
    assert (outcome.before, outcome.answered) == (1, 0)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no requests"),
        ("nonsense", "line 1 is not a JSON object"),
        ("[1]", "line 1: a request has the fields"),
        (json.dumps(line("a", {})) + "\n" + json.dumps(line("a", {})), "line 2: custom_id must be a text of its own"),
        (json.dumps(line("a", {}, "/v1/files")), "url one of /v1/chat/completions"),
        (json.dumps(line("a", {"stream": True})), "cannot stream"),
        (json.dumps(line("a", {}) | {"more": 1}), "and no others"),
    ],
)
def test_what_is_no_file_of_requests_is_refused_before_any_work(tmp_path, text, why):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(DataError, match=why):
        run_batch(app(), tmp_path / "r.jsonl", tmp_path / "a.jsonl", together=2)
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_of_other_requests_are_not_written_over(tmp_path):
    requests = written(tmp_path / "r.jsonl", lines())
    out = written(tmp_path / "a.jsonl", [{"custom_id": "other", "response": {"status_code": 200}}])
    before = out.read_text()
    with pytest.raises(DataError, match="answers 'other', which is no request"):
        run_batch(app(), requests, out, together=2)
    assert out.read_text() == before


def test_the_program_opens_the_models_that_the_requests_name(monkeypatch, capsys, tmp_path):
    models()["lm"].save(tmp_path / "own")
    body = {"model": str(tmp_path / "own"), "prompt": "a red", "max_tokens": 3}
    rows = [line("a", body, "/v1/completions"), line("b", body | {"model": "short"}, "/v1/completions")]
    requests = written(tmp_path / "r.jsonl", rows)
    assert models_of(requests) == [str(tmp_path / "own"), "short"]
    code, said, _ = run(
        monkeypatch,
        capsys,
        "batch",
        requests,
        "--model",
        f"short={tmp_path / 'own'}",
        "--json",
        tmp_path / "facts.json",
    )
    assert code == 0, said
    found = answers(tmp_path / "r.answers.jsonl")
    texts = {found[name]["response"]["body"]["choices"][0]["text"] for name in "ab"}
    assert len(texts) == 1
    assert json.loads((tmp_path / "facts.json").read_text())["answered"] == 2
