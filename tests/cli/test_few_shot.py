"""``isthmus eval --shots`` and ``isthmus chat --video``: how the words on the command line are read."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from isthmus.cli import chat, evaluate
from isthmus.cli.app import app
from isthmus.data.messages import NO_ANSWER
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import caption_task, vqa
from isthmus.evaluation.run import Result
from tests.data.helpers import png
from tests.evaluation.fakes import row


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shots", "0", "4", "8"], [0, 4, 8]),
        (["--shots", "0,4"], [0, 4]),
        (["--shots", "16", "--select", "rices"], [16]),
        ([], []),
    ],
)
def test_numbers_behind_shots(monkeypatch, words, expected):
    seen = {}
    monkeypatch.setattr(evaluate, "run", lambda model, **options: seen.update(options, model=model))
    result = CliRunner().invoke(app, ["eval", "runs/x", "--task", "vqa", *words])
    assert result.exit_code == 0, result.output
    assert seen["model"] == "runs/x"
    assert evaluate.counted(seen.get("shots"), seen["more_shots"]) == expected
    assert seen.get("select") == ("rices" if "rices" in words else None), "random is the default"


@pytest.mark.parametrize(
    ("shots", "more", "words"), [("four", [], "not 'four'"), ("", [], "numbers"), (None, [4], "4 is not")]
)
def test_bad_numbers_are_explained(shots, more, words):
    with pytest.raises(ConfigError, match=words):
        evaluate.counted(shots, more)


def test_score_over_shots_is_drawn(tmp_path):
    rows = [row(id=str(i), kind="k", truth=["a"], answer="a" if i % 2 else "b") for i in range(8)]
    results = [Result(f"vqa-{n}-shots", "vqa", vqa.score(rows[n // 4 :]), rows, tmp_path) for n in (0, 4)]
    assert evaluate._over_shots(tmp_path, results[:1]) is None
    spoilt = [Result("vqa-4-shots-permuted", "vqa", vqa.score(rows), rows, tmp_path)]
    place = evaluate._over_shots(tmp_path, results + spoilt)
    assert place is not None
    page = place.read_text(encoding="utf-8")
    assert "permuted" in page
    assert "score over shots" in page
    assert "vqa-4-shots" in page
    assert "<svg" in page
    told = [row(id=str(i), truth=["a red cube"], answer="a red cube") for i in range(8)]
    captions = [Result(f"caption-{n}-shots", "caption", caption_task.score(told), told, tmp_path) for n in (0, 4)]
    assert evaluate._over_shots(tmp_path, captions) == place
    assert "CIDEr" in place.read_text(encoding="utf-8")


def test_a_video_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no video file or folder of frames"):
        chat.run("x", "what?", [], videos=[tmp_path / "none"], max_new_tokens=1, temperature=0)


def test_a_conversation_takes_later_pictures_and_survives_a_long_turn(tmp_path, capsys, monkeypatch):
    typed = iter(
        ["what?", f"/image {tmp_path / 'b.png'}", f"/image {tmp_path / 'none.png'}", "and this?", "long", "so?", ""]
    )
    (tmp_path / "b.png").write_bytes(png())
    monkeypatch.setattr(chat, "_read_question", lambda _: next(typed))
    heard = []

    def say(messages):
        heard.append(messages)
        if messages[-1]["content"][-1]["text"] == "long":
            raise DataError("prompt too long: it takes 500 tokens")
        return "" if len(messages) == 3 else "red"

    chat._talk(Console(), say, [{"type": "image", "image": tmp_path / "a.png"}])
    said = " ".join(capsys.readouterr().out.split())
    assert "There is no picture at" in said
    assert "500 tokens" in said
    shown = [[part["image"].name for part in m["content"] if part["type"] == "image"] for m in heard[-1][::2]]
    assert shown == [["a.png"], ["b.png"], []]
    assert [m["content"] for m in heard[-1][1::2]] == ["red", NO_ANSWER]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shots", "4", "--task", "retrieval", "--data", "d.yaml"], "retrieval takes none"),
        (["--set", "task.rule=vqa"], "--set and --train go with --data"),
        (["--train", "d.yaml"], "--set and --train go with --data"),
    ],
)
def test_options_that_would_be_ignored_are_refused(monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.yaml").write_text("{kind: scenes, form: captions, count: 4}")
    monkeypatch.setattr(evaluate, "_load", lambda model, given: None)
    result = CliRunner().invoke(app, ["eval", "runs/x", *words])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_a_picture_that_cannot_be_opened_leaves_the_conversation(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "empty").mkdir()
    typed = [f"/image {tmp_path / 'bad.png'}", f"/video {tmp_path / 'empty'}", f"/image {tmp_path / 'good.png'}"]
    heard = []

    def say(messages):
        heard.append([part.get("image") for part in messages[-1]["content"][:-1]])
        if len(heard) == 1:
            raise DataError("bad picture: too wide")
        return "red"

    answers = iter([*typed, "what?", "what?", ""])
    monkeypatch.setattr(chat, "_read_question", lambda _: next(answers))
    chat._talk(Console(), say, [])
    assert heard == [[tmp_path / "good.png"], []]
    said = " ".join(capsys.readouterr().out.split())
    assert "is not a picture of the formats" in said
    assert "what it showed are taken back" in said
