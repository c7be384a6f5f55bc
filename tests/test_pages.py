"""Pages that are written by tools, and names of tests."""

import json
import re
from pathlib import Path

import pytest
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


def _anchors(text: str) -> set[str]:
    """Names of a page's headings in links, as the documentation and GitHub make them."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_links_to_headings_lead_to_one():
    lost = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for place, name in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            other = page.parent / place if place else page
            if other.suffix == ".md" and name not in _anchors(other.read_text(encoding="utf-8")):
                lost.append((page.name, f"{place}#{name}"))
    assert lost == []


@pytest.mark.parametrize("name", ["clip", "flamingo", "blip2", "llava"])
def test_a_papers_page_draws_the_model_as_its_file_does(name):
    page = (ROOT / "docs" / "papers" / f"{name}.md").read_text(encoding="utf-8")
    source = (ROOT / "src" / "isthmus" / "models" / f"{name}.py").read_text(encoding="utf-8")
    drawing = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    assert drawing == re.sub(r"^ {4}", "", source[source.index("\n\n") + 2 :], flags=re.MULTILINE)[: len(drawing)]
