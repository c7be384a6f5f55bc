"""Every system's facts agree with its net, and nothing outside its file branches on a kind."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus
from isthmus.errors import ConfigError
from isthmus.interop.formats import FORMATS, named
from isthmus.systems import SYSTEMS, system
from isthmus.systems.base import System, Tokenizers

SOURCE = Path(isthmus.__file__).parent


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_systems_facts_are_of_its_net(kind: str) -> None:
    found = system(kind)
    assert isinstance(found, System)
    assert (found.kind, found.net.KIND) == (kind, kind)
    for target in found.exporters.values():
        assert callable(named(target))
    assert set(found.exporters) <= set(FORMATS)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        system("lava")


EXPLAINED = {"demo/story.py": "the demo names its own five runs after their systems"}


def branches(tree: ast.AST) -> Iterator[int]:
    """Lines that compare something called a kind or a model with the name of a system, or hold a table over systems."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = {getattr(s, "attr", getattr(s, "id", "")) for s in sides}
            named = {n.value for s in sides for n in ast.walk(s) if isinstance(n, ast.Constant)} & set(SYSTEMS)
            if named and words & {"kind", "KIND", "model"}:
                yield node.lineno
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if len(keys & set(SYSTEMS)) > 1:
                yield node.lineno


def test_no_branch_and_no_table_over_kinds_elsewhere() -> None:
    assert list(branches(ast.parse("if model.kind == 'clip': ...\nt = {'clip': 1, 'llava': 2}"))) == [1, 2]
    assert list(branches(ast.parse("if 'lm' in batch.text or kind == 'bpe': ..."))) == []
    places = {
        f"{file.relative_to(SOURCE)}": list(branches(ast.parse(file.read_text(encoding="utf-8"))))
        for file in sorted(SOURCE.rglob("*.py"))
        if file.relative_to(SOURCE).parts[0] not in ("interop", "systems")
    }
    assert {file for file, lines in places.items() if lines} == set(EXPLAINED)


def test_a_system_without_a_tokenizer_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs a `tokenizer`"):
        system("lm").tokenizers({}, None)
    with pytest.raises(ConfigError, match="needs the part 'vision'"):
        system("llava").configuration({}, {}, Tokenizers(None))  # type: ignore[arg-type]
