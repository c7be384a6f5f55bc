"""A user's class by name: pinned where the user wrote it, imported only as it was then, never from a model's folder."""

import hashlib
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from isthmus.errors import CheckpointError, ConfigError
from isthmus.user_code import is_user_code, label, pin, pinned_in, resolve, vetted

TEXT = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Mine:
    number: int = 1
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "code" / "mine.py"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def test_a_name_is_pinned_to_place_and_content(file, tmp_path):
    name = pin("mine.py:Mine", file.parent)
    assert name == f"{file}:Mine#sha256={hashlib.sha256(TEXT.encode()).hexdigest()}"
    assert pin(name, tmp_path) == name
    assert pin("code/mine.py:Mine") == name  # without a folder: the working folder
    assert label(name) == "mine.py:Mine"
    cls = resolve(name)
    assert cls().number == 1
    assert is_dataclass(cls)
    assert resolve(name) is cls
    file.rename(tmp_path / "short.py")
    assert pin("short:Mine", file.parent).startswith(f"{tmp_path}/short.py:Mine#")  # always the working folder


def test_other_texts_are_no_code():
    assert is_user_code("a/b.py:C")
    assert is_user_code("b:C")
    assert not any(map(is_user_code, ["mlp2x_gelu", "Question: what?", "a.py", "a.yaml:C", "https://x.py/y", 3, None]))
    tree = {"about": "note:This", "prompts": {"caption": "Say:it"}, "config": {"projector": "linear"}}
    assert pinned_in(tree) == tree


def test_every_name_in_a_recipe_is_pinned(file):
    tree = {"config": {"projector": {"kind": "mine.py:Mine", "n": 2}}, "stages": [{"data": [{"kind": "mine.py:Mine"}]}]}
    name = pin("mine.py:Mine", file.parent)
    wanted = {"config": {"projector": {"kind": name, "n": 2}}, "stages": [{"data": [{"kind": name}]}]}
    assert pinned_in(tree, file.parent) == wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("code/mine.py:Mime", "has no class Mime; did you mean 'Mine'"),
        ("other.py:Mine", "there is no file .*other.py; give its path relative to the recipe"),
        ("other:Mine", "relative to the working folder"),
        ("mine.py", "names no code"),
    ],
)
def test_what_cannot_be_named_says_so(file, name, words):
    with pytest.raises(ConfigError, match=words):
        pin(name)


def test_a_file_that_fails_says_where(file):
    file.write_text("import nothing_of_this_name\nclass Mine: ...")
    with pytest.raises(ConfigError, match=r"mine\.py fails when it is imported: ModuleNotFoundError"):
        pin("code/mine.py:Mine")


def test_only_what_was_pinned_and_has_not_changed_is_imported(file, tmp_path):
    mark = tmp_path / "ran"
    for name in (f"{file}:Mine", "mine:Mine"):
        with pytest.raises(ConfigError, match=r"a checkpoint named it and not you.*--code FILE"):
            resolve(name)
    name = pin("code/mine.py:Mine")
    file.write_text(f"open({str(mark)!r}, 'w')\nclass Mine: ...")
    changed = name.replace(name[-64:], hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ConfigError, match=r"has changed since it was named.*--code FILE"):
        resolve(changed)
    file.unlink()
    with pytest.raises(ConfigError, match=r"is not at .* any more.*--code FILE"):
        resolve(changed)
    assert not mark.exists()


def test_nothing_is_imported_from_a_models_folder(tmp_path):
    """Though it matches what the folder says of it: whoever wrote the one wrote the other."""
    mark, evil = tmp_path / "ran", tmp_path / "model" / "code" / "evil.py"
    evil.parent.mkdir(parents=True)
    evil.write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...")
    (tmp_path / "link.py").symlink_to(evil)
    sha = hashlib.sha256(evil.read_bytes()).hexdigest()
    for path in (evil, tmp_path / "model" / ".." / "model" / "code" / "evil.py", tmp_path / "link.py"):
        config = {"config": {"projector": {"kind": f"{path}:Evil#sha256={sha}"}}}
        with pytest.raises(CheckpointError, match="in the model's own folder"):
            vetted(config, tmp_path / "model")
    for name in ("evil:Evil", "model/code/evil.py:Evil"):
        with pytest.raises((CheckpointError, ConfigError), match="--code FILE"):
            vetted({"projector": name}, tmp_path / "elsewhere")
    assert not mark.exists()


def test_a_file_that_the_user_names_is_taken_instead(file, tmp_path):
    config = {"config": {"projector": pin("code/mine.py:Mine")}, "prompts": {"mine": "mine:Mine"}}
    assert vetted(config, tmp_path / "model") == config
    moved = tmp_path / "elsewhere" / "mine.py"
    moved.parent.mkdir()
    moved.write_text(TEXT.replace("= 1", "= 2"))
    file.unlink()
    found = vetted(config, tmp_path / "model", [moved])
    assert resolve(found["config"]["projector"])().number == 2
    assert found["prompts"] == config["prompts"]  # a text that only looks like a name
    old = vetted({"projector": "mine:Mine"}, tmp_path / "model", [moved])  # folders of earlier versions have no hash
    assert resolve(old["projector"])().number == 2
    with pytest.raises(ConfigError, match="no file"):
        vetted(config, tmp_path / "model", [tmp_path / "gone" / "mine.py"])
