"""METEOR and SPICE: what is missing is said before anything runs; the wrapper, with a stand-in for the package."""

import sys
import types

import pytest

from isthmus.errors import MissingExtraError
from isthmus.evaluation.captions import java


def package(monkeypatch, tmp_path, *files):
    """A pycocoevalcap whose scorers return the length of the candidate."""
    (tmp_path / "pycocoevalcap").mkdir()
    (tmp_path / "pycocoevalcap/__init__.py").write_text("")
    for file in files:
        (tmp_path / "pycocoevalcap" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pycocoevalcap" / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.startswith("pycocoevalcap"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(java.shutil, "which", lambda name: "/usr/bin/java")
    seen = {}

    class Scorer:
        def compute_score(self, references, candidates):
            seen.update(references=references, candidates=candidates)
            values = [len(c[0].split()) / 10 for c in candidates.values()]
            return 0.5, values if "Meteor" in type(self).__name__ else [{"All": {"f": v}} for v in values]

    for name in ("meteor", "spice"):
        module = types.ModuleType(f"pycocoevalcap.{name}.{name}")
        setattr(module, name.capitalize(), type(name.capitalize(), (Scorer,), {}))
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", types.ModuleType(f"pycocoevalcap.{name}"))
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}.{name}", module)
    return seen


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'isthmus\[eval\]'"):
        java.check("METEOR")


def test_missing_java_and_missing_files_are_named(monkeypatch, tmp_path):
    package(monkeypatch, tmp_path, "meteor/meteor-1.5.jar", "spice/spice-1.0.jar")
    java.check("METEOR")
    with pytest.raises(MissingExtraError, match=r"stanford-corenlp-3\.6\.0\.jar.*downloads nothing"):
        java.check("SPICE")
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="no `java` on the path"):
        java.check("METEOR")


@pytest.mark.parametrize("name", ["METEOR", "SPICE"])
def test_items_come_back_in_the_references_order_with_our_tokens(monkeypatch, tmp_path, name):
    seen = package(monkeypatch, tmp_path, *java._FILES[name])
    references = {"10": ["A dog."], "9": ["Two cats, sitting."]}
    corpus, items = java.java_scores(name, references, {"9": "Cats sit.", "10": "A dog!"})
    assert (corpus, items) == (0.5, [0.2, 0.2])
    assert list(seen["references"].values()) == [["a dog"], ["two cats sitting"]]
    assert list(seen["candidates"].values()) == [["a dog"], ["cats sit"]]
