"""The tutorials as a reader does them: files written as the page gives them, each command run as it stands there."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from isthmus.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)


def run(words: list[str]) -> int:
    """A command of a page in this process; its exit code."""
    before, sys.argv = sys.argv, words
    try:
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            return 0
        assert words[0] == "isthmus"
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


# A few steps teach no answer, and an evaluation says when all of them are empty.
@pytest.mark.filterwarnings("ignore:All .* answers are empty")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_tutorial_runs(page, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = 0
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "sh":
            for line in text.splitlines():
                assert run(shlex.split(line)) == 0, line
                commands += 1
    assert commands >= 5
