"""What the page shows of a model's training: stages with their counts and losses, and tables of scores, as the folder
of its run has them. A folder without a run shows nothing; a file that cannot be read is a problem in words."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

from rich.table import Table

from isthmus.checkpoint import read_json
from isthmus.errors import CheckpointError
from isthmus.recipes.tables import score_table
from isthmus.training.log import read_metrics

T = TypeVar("T")
MOST_POINTS = 200
"""Of a curve: more could not be distinguished at the width at which it is drawn."""
MOST_BYTES = 64 * 2**20
"""Of a file of losses that is read for a curve."""
_MALFORMED = (CheckpointError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class ShownPart(TypedDict):
    """Numbers of a part's parameters, in all and trained."""

    part: str
    parameters: int
    trained: int


class ShownStage(TypedDict):
    """``steps`` that are done, ``seconds`` they took, ``curves``: term of the loss -> (step, loss) points, and in words
    what could not be read."""

    name: str
    steps: int
    seconds: float
    parts: list[ShownPart]
    curves: dict[str, list[tuple[int, float]]]
    problem: str


class ScoreTable(TypedDict):
    """The console's table of a task's scores as texts, and in words what could not be read."""

    task: str
    columns: list[str]
    rows: list[list[str]]
    caption: str
    problem: str


def training(place: Path) -> list[ShownStage]:
    """Each stage of the run in ``place``, in order."""
    file = place / "run.json"
    if not file.is_file():
        return []
    try:
        stages = _of(list, _of(dict, read_json(file)["recipe"])["stages"])
        names = [str(stage["stage"]["name"]) for stage in stages]
    except _MALFORMED:
        return [_empty("run", "its run.json cannot be read")]
    return [_stage(place / "stages" / name, name) for name in names]


def _empty(name: str, problem: str = "") -> ShownStage:
    return {"name": name, "steps": 0, "seconds": 0.0, "parts": [], "curves": {}, "problem": problem}


def _stage(folder: Path, name: str) -> ShownStage:
    found = _empty(name)
    if not folder.is_dir():  # not begun
        return found
    try:
        rows = _of(list, _of(dict, read_json(folder / "stage.json")["table"])["rows"])
        parts = [ShownPart(part=row["part"], parameters=row["parameters"], trained=row["trained"]) for row in rows]
        file = folder / "metrics.jsonl"
        if file.stat().st_size > MOST_BYTES:
            return {**found, "parts": parts, "problem": "its losses are too many to be drawn"}
        lines = read_metrics(file)
        last = _of(dict, lines[-1]) if lines else {}
        return {
            **found,
            "parts": parts,
            "steps": last.get("step", 0),
            "seconds": float(last.get("seconds", 0)),
            "curves": _curves(lines),
        }
    except _MALFORMED:
        return {**found, "problem": "its files cannot be read"}


def _of(cls: type[T], value: object) -> T:
    """The value, where it is of this class. Raises TypeError."""
    if isinstance(value, cls):
        return value
    raise TypeError(f"{type(value).__name__} in place of {cls.__name__}")


def _curves(lines: Sequence[Mapping[str, object]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for term, loss in _of(dict, line.get("loss") or {}).items():
            if isinstance(loss, int | float) and math.isfinite(loss):
                curves.setdefault(term, []).append((_of(int, line["step"]), float(loss)))
    return {term: _thinned(points) for term, points in curves.items()}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS: the mean of each stretch, at its last step."""
    size = math.ceil(len(points) / MOST_POINTS)
    stretches = [points[n : n + size] for n in range(0, len(points), size)]
    return [(stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]


def scores(place: Path) -> list[ScoreTable]:
    """A table for each task that the run's folder has scores of. Of a folder without any, those that a results.json
    beside it has under its name."""
    files = sorted(place.glob("eval/*/scores.json"))
    if files:
        return [table for file in files for table in _of_file(file)]
    results = place.parent / "results.json"
    if not results.is_file():
        return []
    try:
        models = _of(dict, read_json(results)["models"])
        own = {name: facts for name, facts in models.items() if name == place.name or name.startswith(f"{place.name}-")}
        return [table for name, facts in own.items() for table in _tables(name, facts)]
    except _MALFORMED:
        return [_problem("scores", "its results.json cannot be read")]


def _of_file(file: Path) -> list[ScoreTable]:
    try:
        facts = {k: v for k, v in read_json(file).items() if k not in ("task", "kind")}
        return _tables(file.parent.name, facts)
    except _MALFORMED:
        return [_problem(file.parent.name, "its scores.json cannot be read")]


def _problem(task: str, problem: str) -> ScoreTable:
    return {"task": task, "columns": [], "rows": [], "caption": "", "problem": problem}


def _tables(task: str, facts: Mapping[str, object]) -> list[ScoreTable]:
    """The console's tables as texts. In a results.json a model's retrieval and its answers stand together: one each."""
    overall = dict(facts)
    parts = [overall]
    if "image_to_text" in overall and "kinds" in overall:
        retrieval = {
            k: v for k, v in overall.items() if k in ("image_to_text", "text_to_image", "first_step", "gain_at_1")
        }
        parts = [retrieval, {k: v for k, v in overall.items() if k not in retrieval}]
    return [_texts(task, score_table(task, part)) for part in parts]


def _texts(task: str, table: Table) -> ScoreTable:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return {
        "task": task,
        "columns": [str(column.header) for column in table.columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "caption": str(table.caption or ""),
        "problem": "",
    }
