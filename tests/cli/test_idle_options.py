"""Options that would change nothing are refused, and a model that can do nothing of what is asked is named."""

import json
import shutil

import pytest

from tests.cli.test_cli import run
from tests.data.helpers import png


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "isthmus:llava", "--select", "rices"], "--select chooses the examples before each question"),
        (["eval", "isthmus:llava", "--set", "limit=3"], "--set and --train go with --data"),
        (["compare", "isthmus:llava", "isthmus:flamingo", "--select", "rices"], "--select chooses the examples"),
        (["compare", "isthmus:llava", "isthmus:flamingo", "--set", "limit=3"], "--set and --train go with --data"),
        (["compare", "isthmus:llava", "isthmus:flamingo", "--train", "a.json"], "--set and --train go with --data"),
        (["show", "lm-tiny", "--dtype", "float16"], "lm-tiny is a recipe, whose model is not opened; --dtype is for"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("isthmus.opening.load", None)
    code, _, told = run(monkeypatch, capsys, *words)
    assert code == 2
    assert said in " ".join(told.split())


def test_examples_before_tasks_that_take_none_are_refused(monkeypatch, capsys, story, tmp_path):
    monkeypatch.setattr("isthmus.opening.load", None)
    shutil.copytree(story / "clip", tmp_path / "second")
    words = ["compare", story / "clip", tmp_path / "second", "--out", tmp_path / "out", "--shots", "4"]
    code, _, told = run(monkeypatch, capsys, *words)
    assert code == 2
    assert "--shots go before questions and captions" in " ".join(told.split())


def test_a_clip_for_a_model_that_reads_none_is_refused(monkeypatch, capsys, story, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "1.png").write_bytes(png((255, 0, 0)))
    code, _, told = run(monkeypatch, capsys, "chat", story / "llava", "--video", tmp_path / "clip", "what?")
    assert code == 2
    assert "This model (llava) reads no clips; leave --video out" in " ".join(told.split())


def test_a_model_that_can_do_none_of_the_tasks_is_named(monkeypatch, capsys, story, tmp_path):
    (tmp_path / "a.png").write_bytes(png((255, 0, 0), (64, 64)))
    (tmp_path / "b.png").write_bytes(png((0, 0, 255), (64, 64)))
    rows = [{"image": f"{name}.png", "question": "what?", "answer": "x"} for name in "ab"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["compare", story / "llava", story / "clip", "--data", tmp_path / "rows.json", "--out", tmp_path / "out"]
    code, out, told = run(monkeypatch, capsys, *words)
    assert code == 0, told
    assert "clip can do none of the tasks and is left out." in " ".join(out.split())
