"""Chat templates of others, which stay outside: what the committed table says of them holds for the files."""

import hashlib
import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "published_templates.py"))
ROWS: list[dict[str, Any]] = json.loads(TOOL["TABLE"].read_text(encoding="utf-8"))
FOLDER = os.environ.get("ISTHMUS_TEMPLATES")


def test_the_page_shows_what_was_found() -> None:
    assert TOOL["MARK"] + TOOL["table"](ROWS) in TOOL["PAGE"].read_text(encoding="utf-8")
    assert len({row["slug"] for row in ROWS if row["found"]["trained"] is True}) >= 12


@pytest.mark.skipif(
    FOLDER is None, reason="ISTHMUS_TEMPLATES names no folder; tools/published_templates.py fills one from git clones"
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['slug']} {row.get('switches', '')}".strip())
def test_a_published_template_is_read_as_the_table_says(row: dict[str, Any]) -> None:
    text = (Path(FOLDER or "") / f"{row['slug']}.jinja").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == row["sha256"], "another file than the table's"
    assert TOOL["tried"](row, text) == row["found"]
