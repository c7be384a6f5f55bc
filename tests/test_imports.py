"""Who imports whom, read from the source of every module: also what is imported inside a function counts.

Imports under ``TYPE_CHECKING`` do not count; names that are strings (a user's code, scenes) are no imports.
"""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def modules() -> Mapping[str, Path]:
    found = {}
    for path in sorted((ROOT / "src" / "isthmus").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere, but for its types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported(other, known)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from [name for name in (full, node.module or "") if name in known][:1]
        else:
            yield from imported(node, known)


@cache
def arrows() -> Mapping[str, frozenset[str]]:
    return {
        name: frozenset(imported(ast.parse(path.read_text(encoding="utf-8")), modules())) - {name}
        for name, path in modules().items()
    }


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Sets of nodes that all reach each other (Tarjan's strongly connected components), of two and more."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == number[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in number:
            visit(node)
    return found


@cache
def layers() -> list[list[str]]:
    """From the top down, as pyproject.toml writes them for import-linter: one truth."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in content["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in line.replace(":", "|").split("|")] for line in contract["layers"]]


@cache
def place(module: str) -> tuple[int, str] | None:
    """Number of the layer, from the top, and the member of it that the module belongs to."""
    for number, members in enumerate(layers()):
        for member in members:
            if module == member or module.startswith(f"{member}."):
                return number, member
    return None


def test_no_circle_among_the_modules():
    assert circles(arrows()) == []


def test_no_circle_among_a_packages_parts():
    """In every package its modules and subpackages, each as one: none needs another that needs it."""
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    for package in packages:
        graph: dict[str, set[str]] = {}
        for name, others in arrows().items():
            mine = part(package, name)
            if mine is not None:
                theirs = {part(package, other) for other in others}
                graph.setdefault(mine, set()).update(t for t in theirs if t not in (None, mine))
        assert circles({k: frozenset(v) for k, v in graph.items()}) == [], package


def part(package: str, module: str) -> str | None:
    """The child of a package that a module is in; None for the package's own file and what is elsewhere."""
    return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else None


def test_no_arrow_points_up_or_sideways():
    wrong = []
    for name, others in arrows().items():
        mine = place(name)
        for other in others:
            theirs = place(other)
            if mine is None or theirs is None or mine[1] == theirs[1]:
                continue
            if theirs[0] <= mine[0]:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


def test_every_module_is_in_a_layer():
    """The package's own file aside, and ``python -m isthmus``: both stand above all."""
    assert {name for name in modules() if place(name) is None} == {"isthmus", "isthmus.__main__"}
    assert [name for name, others in arrows().items() if "isthmus" in others] == []


@pytest.mark.parametrize(("package", "allowed"), [("isthmus.demo", "cli"), ("isthmus.comparison", "cli demo")])
def test_nothing_below_imports_what_shows_and_compares(package, allowed):
    users = {n for n, others in arrows().items() if any(o == package or o.startswith(f"{package}.") for o in others)}
    outside = {n for n in users if not n.startswith(package)}
    assert {n.split(".")[1] for n in outside} == set(allowed.split())


def test_the_walk_finds_what_it_is_for(tmp_path):
    """A deferred import, one of a name out of a module, one for types alone; a circle of three."""
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from isthmus.model import Model
def later():
    from isthmus.nn import block
    import isthmus.errors
    from isthmus.stage import Stage
"""
    found = set(imported(ast.parse(text), modules()))
    assert found == {"isthmus.nn.block", "isthmus.errors", "isthmus.stage"}
    ring = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(ring) == [["a", "b", "c"]]
