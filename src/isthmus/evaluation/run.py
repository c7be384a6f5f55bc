"""One evaluation: a model, a task and a folder with manifest, raw outputs and scores.

The folder holds ``manifest.json`` (model, task and data, without dates), ``outputs.jsonl`` (one line per item, in
the order of the data), ``scores.json``, and ``quarantine.jsonl`` where samples could not be read (:mod:`.sound`). An
interrupted evaluation goes on after its last complete line, and a finished one can be scored again from its folder
alone (:mod:`.rescore`). Several processes share the items (:mod:`.sharing`); the first one writes.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Generic, cast

from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation.doubts import warn_of
from isthmus.evaluation.outputs import R, ScoredRow
from isthmus.evaluation.protocols import HasProvenance
from isthmus.evaluation.results import versions, write_json
from isthmus.evaluation.scorers import scorer_of
from isthmus.evaluation.sharing import shared_rows
from isthmus.evaluation.tasks import CLOSE, Scores, Task
from isthmus.processes import first, of_first, world_size
from isthmus.user_code import code_of


@dataclass(frozen=True, slots=True)
class Result(Generic[R]):
    """A finished evaluation: typed scores, and the raw outputs they come from. ``left_out`` counts the samples that
    could not be read."""

    task: str
    kind: str
    scores: Scores
    rows: list[R]
    folder: Path
    left_out: int = 0


def evaluate(
    model: object,
    task: Task[R],
    folder: str | Path,
    *,
    model_hash: str = "",
    left_out: int = 0,
    facts: Mapping[str, object] = MappingProxyType({}),
    chunk: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Result[R]:
    """Make the outputs that ``folder`` lacks and score all of them.

    Args:
        model: anything with the methods ``task.needs`` names. Where it has ``provenance(records, decoding)``, what
            that says (image transform, template, prompts, decoding in full) is kept in the manifest.
        model_hash: identity of the weights, kept in the manifest; with one, another model is refused in this folder.
        left_out: samples that could not be read, counted in manifest and scores.
        facts: what else stands in the manifest.
        chunk: items at a time; outputs are on disk after each.
        progress: called with (items done, items in all) at the start and after each chunk.

    Raises CapabilityError (the model lacks a method), ConfigError (the folder belongs to another evaluation),
    DataError (the data or the folder's outputs cannot be used).
    """
    folder = Path(folder)
    left = {"left_out": left_out} if left_out else {}
    path, manifest = folder / "outputs.jsonl", _manifest(task, model, model_hash) | left | dict(facts)
    of_first(lambda: _settle(folder / "manifest.json", manifest))
    rows = of_first(lambda: _read(path, task))
    report = progress or (lambda done, total: None)
    report(len(rows), len(task.ids))
    if len(rows) < len(task.ids):
        if not fits(model, task.needs):
            methods = _methods(task.needs)
            raise CapabilityError(f"Task {task.name!r} needs a model that can {', '.join(methods)}; this one cannot.")
        known = set(task.ids)
        for made in shared_rows(task, model, rows.keys(), chunk=chunk):
            _check_made(task.name, made, known, rows)
            _write_plainly(task, "rows", partial(_write, path, made, "a"))
            rows |= {row["id"]: row for row in made}
            report(len(rows), len(task.ids))
    if missing := [i for i in task.ids if i not in rows]:
        raise DataError(
            f"Task {task.name!r} made no row for {len(missing)} of its {len(task.ids)} items, first {missing[0]!r}: "
            "its `ids` name the rows that its `rows` yields."
        )
    ordered = [rows[i] for i in task.ids]
    scores = task.score(ordered)
    if first():
        if world_size() > 1:  # whose turns are not the order of the data
            _write(path, ordered, "w")
        warn_of(ordered, captions=task.kind == "caption")
    written = {"task": task.name, "kind": task.kind, **counts(left_out, ordered), **scores.to_dict()}
    _write_plainly(task, "scores", partial(write_json, folder / "scores.json", written))
    return Result(task.name, task.kind, scores, ordered, folder, left_out)


def fits(model: object, needed: type) -> bool:
    """Has the model the methods of this protocol? A user's own need not be one that is checked at run time."""
    return all(callable(getattr(model, name, None)) for name in _methods(needed))


def _methods(needed: type) -> list[str]:
    return sorted(n for base in needed.__mro__ for n, m in vars(base).items() if not n.startswith("_") and callable(m))


def _check_made(task: str, made: Sequence[ScoredRow], known: Collection[str], rows: Collection[str]) -> None:
    """Raises DataError for a row that is none of the task's, or one that is there already."""
    seen: set[object] = set()
    for row in made:
        name = row.get("id")
        if name not in known or name in rows or name in seen:
            fault = "is none of its `ids`" if name not in known else "has one already"
            raise DataError(f"Task {task!r} made a row whose id, {name!r}, {fault}; each id has one row.")
        seen.add(name)


def _write_plainly(task: Task[R], what: str, write: Callable[[], object]) -> None:
    """The first process writes. What cannot be written is an error of the task's, which all processes raise."""

    def attempt() -> None:
        try:
            write()
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Task {task.name!r}: its {what} hold what JSON cannot say ({error}); give plain texts, finite "
                "numbers, lists and mappings."
            ) from error

    of_first(attempt)


def _write(path: Path, rows: Sequence[ScoredRow], mode: str) -> None:
    written = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]  # all before any is in the file
    with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:  # half a pair is as JSON writes it
        file.writelines(written)


def counts(left_out: int, rows: Sequence[ScoredRow]) -> dict[str, int]:
    """What stands in scores.json beside the scores: samples left out, and answers to which another was near."""
    gaps = [row["gap"] for row in rows if "gap" in row]
    near = {"near": sum(gap < CLOSE for gap in gaps)} if rows and len(gaps) == len(rows) else {}
    return ({"left_out": left_out} if left_out else {}) | near


def _manifest(task: Task[R], model: object, model_hash: str) -> dict[str, object]:
    described = task.describe()
    facts = {
        "task": task.name,
        "kind": task.kind,
        "seed": task.seed,
        "items": len(task.ids),
        **described,
        "scorer": scorer_of(task.kind, task.version, described),
        "model": model_hash,
        **_provenance(task, model),
        "versions": versions(),
    }
    if (code := code_of(type(task))) is not None:  # a user's task: its rows are its code's
        facts["code"] = code
    return json.loads(json.dumps(facts))


def _provenance(task: Task[R], model: object) -> dict[str, object]:
    """What the model says of itself, and of its prompts the first one and the hash of all."""
    if not isinstance(model, HasProvenance):
        return {}
    facts = dict(model.provenance(task.prompts(), task.decoding))
    prompts = cast(Sequence[str] | None, facts.pop("prompts", None))
    if prompts:
        sha256 = hashlib.sha256()
        for text in prompts:
            sha256.update(text.encode(errors="backslashreplace") + b"\0")
        facts["prompt"] = {"first": prompts[0], "sha256": sha256.hexdigest()}
    return facts


def _settle(path: Path, manifest: Mapping[str, object]) -> None:
    """Write the manifest, or find the same one beside the outputs already there; another one is a ConfigError."""
    outputs = path.with_name("outputs.jsonl")
    if not path.exists() and outputs.exists():
        raise ConfigError(f"{path.parent} holds outputs without a manifest; delete the folder to evaluate anew.")
    if not path.exists() or not outputs.exists() or not outputs.stat().st_size:
        write_json(path, manifest)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); delete the folder to evaluate anew.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no manifest but a {type(found).__name__}; delete the folder to evaluate anew.")
    changed = [k for k in {**found, **manifest} if found.get(k) != manifest.get(k)]
    if changed:
        differences = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(manifest.get(k))} now" for k in changed)
        raise ConfigError(
            f"{path.parent} holds another evaluation ({differences}). Its outputs are not mixed with new ones: "
            "choose another folder, or delete this one."
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _read(path: Path, task: Task[R]) -> dict[str, R]:
    """Outputs already there, by id. A last line cut short by an interruption is dropped, from the file too."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    known = set(task.ids)
    rows: dict[str, R] = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row: R = json.loads(line)
            name = row["id"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is damaged; delete that line and run again.") from error
        if name not in known or name in rows:
            raise DataError(
                f"{path}, line {number}: the id {name!r} is {'there twice' if name in rows else 'not in the data'}; "
                "delete the folder to evaluate anew."
            )
        rows[name] = row
    if complete != content:
        path.write_bytes(complete)
    return rows
