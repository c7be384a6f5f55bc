"""How the house stands, in numbers: files to touch for something new, branches on kinds, probes, circles, lines.

    python tools/count_house.py [ROOT ...]        # a column per checkout; without one, this checkout

Everything is read from the source by ``ast``; nothing is imported. What a line counts stands at its
function.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

KINDS = {"clip", "lm", "flamingo", "blip2", "llava", "image_encoder", "text_encoder"}
TASKS = {"vqa", "vqav2", "ok-vqa", "caption", "retrieval", "conversation", "matching", "pope", "choice-likelihood"}


class House:
    """The package of one checkout: module name -> syntax tree."""

    def __init__(self, root: Path) -> None:
        self.root, self.trees, self.lines = root, {}, {}
        for path in sorted((root / "src" / "isthmus").rglob("*.py")):
            parts = path.relative_to(root / "src").with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            self.trees[name], self.lines[name] = ast.parse(text), len(text.splitlines())

    def outside(self, *packages: str) -> Iterator[tuple[str, ast.AST]]:
        """Modules that are in none of the packages (their last or second name)."""
        for name, tree in self.trees.items():
            if not any(name == f"isthmus.{p}" or name.startswith(f"isthmus.{p}.") for p in packages):
                yield name, tree


def branches_on_kinds(house: House) -> int:
    """Comparisons with the name of a kind of model, and dicts that hold something for two kinds and more, outside
    systems, models and interop."""
    found = 0
    for _, tree in house.outside("systems", "models", "interop"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                found += any(_strings(side) & KINDS for side in (node.left, *node.comparators))
            elif isinstance(node, ast.Dict):
                found += len({k.value for k in node.keys if isinstance(k, ast.Constant)} & KINDS) > 1
    return found


def tables_of_tasks(house: House) -> int:
    """Dicts, tuples and lists that hold the names of three evaluation tasks and more."""
    found = 0
    for _, tree in house.outside():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                found += len({k.value for k in node.keys if isinstance(k, ast.Constant)} & TASKS) > 2
            elif isinstance(node, ast.Tuple | ast.List | ast.Set):
                found += len(_strings(node) & TASKS) > 2
    return found


def _strings(node: ast.AST) -> set[str]:
    members = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {m.value for m in members if isinstance(m, ast.Constant) and isinstance(m.value, str)}


def probes(house: House) -> int:
    """``hasattr(x, "name")`` and ``getattr(x, "name", default)`` with a name that is written out, outside interop and
    the language edge."""
    found = 0
    for _, tree in house.outside("interop", "language", "language_seq2seq"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                named = isinstance(node.args[1], ast.Constant)
                found += named and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
    return found


def uses_of_any(house: House) -> Counter[str]:
    """Module -> how often ``Any`` stands in its code: types that a checker can say nothing about."""
    names = ((name, node) for name, tree in house.outside() for node in ast.walk(tree) if isinstance(node, ast.Name))
    return Counter(name for name, node in names if node.id == "Any")


def context_variables(house: House) -> int:
    """``ContextVar(...)``: values that travel without being passed."""
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ContextVar"
        for _, tree in house.outside()
        for node in ast.walk(tree)
    )


def arrows(house: House) -> dict[str, set[str]]:
    """Module -> modules that it imports anywhere, but for its types alone."""
    return {name: set(_imported(tree, house.trees)) - {name} for name, tree in house.trees.items()}


def _imported(tree: ast.AST, known: Mapping[str, ast.AST]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from [n for n in (f"{node.module}.{alias.name}", node.module or "") if n in known][:1]
        else:
            yield from _imported(node, known)


def circles(house: House) -> int:
    """Pairs of modules of which each reaches the other, deferred imports too."""
    graph = arrows(house)
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        reach[start] = seen
    return sum(a < b and a in reach[b] and b in reach[a] for a in graph for b in graph)


def upward(house: House) -> int:
    """Imports of a higher layer of pyproject.toml, or of a neighbour in the same; the package's own file is on top."""
    content = tomllib.loads((house.root / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in content["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    places = {m.strip(): n for n, line in enumerate(contract["layers"]) for m in line.split("|")}

    def place(module: str) -> tuple[int, str]:
        for member, number in places.items():
            if module == member or module.startswith(f"{member}."):
                return number, member
        return -1, module

    pairs = [(place(a), place(b)) for a, others in arrows(house).items() for b in others]
    return sum(mine[0] >= 0 and mine[1] != theirs[1] and theirs[0] <= mine[0] for mine, theirs in pairs)


def files_of_a_system(house: House) -> int:
    """Files of the package that name ``llava`` in code (imports, comparisons, keys), outside its paper file, interop,
    scenes and demo: what a system is spread over."""
    found = 0
    for name, tree in house.outside("interop", "models.llava", "demo", "data.scenes", "recipes.demo"):
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        named = any(w == "llava" or re.fullmatch(r"isthmus\.(models|systems)\.llava:\w+", w) for w in words)
        found += named and name not in ("isthmus.data.sources", "isthmus.data.sources.guess")
    return found


def files_of_a_format(house: House) -> int:
    """Modules that name the format ``lavis`` of `isthmus convert`, or import one that is called by it."""
    found = 0
    for name, tree in house.outside():
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        imports = {other for other in _imported(tree, house.trees) if re.search(r"lavis$", other)}
        found += bool(imports) or "lavis" in words or name.endswith("lavis")
    return found


def shown(example: str) -> Callable[[House], object]:
    """The user's files that ``examples/`` shows for something of one's own, which the tests train or score with; the
    package is not touched for it. ``-``: there is none."""
    return lambda house: sum(1 for _ in (house.root / "examples").glob(example)) or "-"


ROWS: tuple[tuple[str, Callable[[House], object]], ...] = (
    ("files of a user's connector (examples)", shown("my_connector.py")),
    ("files of a user's system", shown("my_system.py")),
    ("files of a user's data source", shown("my_source.py")),
    ("files of a user's evaluation task", shown("my_task.py")),
    ("modules that name the system llava outside interop and its paper file", files_of_a_system),
    ("modules that name the checkpoint format lavis", files_of_a_format),
    ("branches and tables on kinds outside systems, models, interop", branches_on_kinds),
    ("tables of task names", tables_of_tasks),
    ("hasattr/getattr probes outside interop and the language edge", probes),
    ("uses of the type Any", lambda h: uses_of_any(h).total()),
    ("context variables", context_variables),
    ("pairs of modules in a circle", circles),
    ("arrows that point up or sideways", upward),
    ("lines of the package", lambda h: sum(h.lines.values())),
)


def table(houses: Mapping[str, House]) -> str:
    """Markdown: a column per house, the counts, then lines by package."""
    rows = [["", *houses], ["---", *["---:"] * len(houses)]]
    rows += [
        [label, *(f"{count(h):,}" if label.startswith("lines") else str(count(h)) for h in houses.values())]
        for label, count in ROWS
    ]
    sums = {name: Counter[str]() for name in houses}
    for name, house in houses.items():
        for module, lines in house.lines.items():
            sums[name][f"{module}.".split(".")[1] or "isthmus"] += lines
    for package in sorted(set().union(*sums.values()), key=lambda p: -max(c[p] for c in sums.values())):
        rows.append(
            [f"`{package}`", *(f"{sums[name][package] or '-':,}" if sums[name][package] else "-" for name in houses)]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(roots: list[str]) -> None:
    """Print the table of these checkouts, ``NAME=PATH`` or a path."""
    pairs = [word.partition("=")[::2] if "=" in word else (Path(word).name, word) for word in roots]
    print(table({name: House(Path(path)) for name, path in pairs}))


if __name__ == "__main__":
    main(sys.argv[1:] or [f"now={Path(__file__).resolve().parents[1]}"])
