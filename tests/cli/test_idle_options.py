"""Options that would change nothing are refused before a model is opened."""

import shutil

import pytest

from tests.cli.test_cli import run


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
