"""Pages that are written by tools, and names of tests."""

import json
import re
from pathlib import Path

from tools import write_results_page as results

ROOT = Path(__file__).parents[1]


def test_the_page_of_results_is_what_the_results_say():
    text = results.page(json.loads(results.SOURCE.read_text(encoding="utf-8")))
    assert results.PAGE.read_text(encoding="utf-8") == text, "run python -m tools.write_results_page"
    assert len(text.splitlines()) <= results.MOST


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_names_of_tests_are_short():
    names = [n for file in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"def (test_\w+)", file.read_text())]
    assert [name for name in names if len(name) >= 70] == []
