"""Names of files and folders with marks in them that the console's markup would take for its own."""

import json
import shutil

import pytest

from tests.cli.test_cli import run
from tests.miniature import tree as shipped_tree
from tests.recipes.test_tables import shown


@pytest.fixture
def place(story, tmp_path):
    """A finished run in a folder whose name reads as a tag that opens, and one that closes none."""
    shutil.copytree(story / "clip", tmp_path / "[v2] [" / "clip]:x:")
    return tmp_path / "[v2] [" / "clip]:x:"


def said(monkeypatch, capsys, *words):
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0, out + err
    return "".join(out.split())


def test_brackets_in_a_folders_name_are_shown(place, monkeypatch, capsys):
    name, out = "".join(str(place).split()), place.parent
    assert f"{name}:clip" in said(monkeypatch, capsys, "show", place)
    assert f"scores:{name}/eval/own" in said(monkeypatch, capsys, "eval", place)
    assert f"{name}hf:hf," in said(monkeypatch, capsys, "convert", place, f"{place}hf", "--to", "hf")
    assert name in said(monkeypatch, capsys, "verify", place, "--only", "tensors accounted for")
    scenes = ["data", "scenes", "--count", "2", "--out", out / "[b]"]
    assert "[/[b]aslla" in said(monkeypatch, capsys, *scenes)


def test_brackets_in_a_recipe_are_shown(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "a[v2].yaml"
    tree = shipped_tree("clip") | {"about": "of [q_proj,v_proj] [/x]"}
    recipe.write_text(json.dumps(tree))
    out = said(monkeypatch, capsys, "show", recipe)
    assert "of[q_proj,v_proj][/x]" in out
    assert "a[v2].yaml:clip" in out


def test_brackets_in_a_kind_of_question_are_shown():
    row = {"n": 3, "accuracy": 1.0, "accuracy_interval": [1, 1], "gain": None} | dict.fromkeys(
        ["blind", "shuffled", "prior"]
    )
    lines = shown({**row, "kinds": {"[/b] of [colour]": row}})
    assert any("[/b] of [colour]" in cell for line in lines for cell in line)
