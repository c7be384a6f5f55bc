"""Score folders without a model: scoring again, and two folders held against each other pair by pair."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import rules
from isthmus.evaluation.bootstrap import Outcomes, resampled_sums
from isthmus.evaluation.doubts import warn_of
from isthmus.evaluation.outputs import Manifest, ScoredRow
from isthmus.evaluation.results import write_json
from isthmus.evaluation.run import Result, counts
from isthmus.evaluation.scorers import score_again, scorer_of, task_class
from isthmus.evaluation.tasks import Task
from isthmus.user_code import code_of


@dataclass(frozen=True, slots=True)
class Folder:
    """A score folder: its manifest, and one row per item."""

    path: Path
    manifest: Manifest
    rows: list[ScoredRow]

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind"))


def read_folder(path: str | Path) -> Folder:
    """Raises DataError: no score folder, damaged, or not finished (fewer rows than items)."""
    path = Path(path)
    manifest_file, outputs = path / "manifest.json", path / "outputs.jsonl"
    for file in (manifest_file, outputs):
        if not file.is_file():
            inner = sorted(p.parent.name for p in path.glob("*/manifest.json")) if path.is_dir() else []
            hint = f" It holds score folders of its own: {', '.join(inner)}." if inner else ""
            raise DataError(f"{path} is no score folder: it has no {file.name}.{hint}")
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        items = int(manifest["items"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest_file} is damaged ({error!r}); evaluate anew.") from None
    rows: list[ScoredRow] = []
    seen: set[str] = set()
    with outputs.open("rb") as file:  # its lines end in newlines alone: an answer may hold other ends of lines
        for number, line in enumerate(file, start=1):
            try:
                row: ScoredRow = json.loads(line.decode())
                name = str(row["id"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(f"{outputs}, line {number} is damaged; delete that line and evaluate again.") from None
            if name in seen:
                raise DataError(f"{outputs}, line {number}: the id {name!r} is there twice; nothing is counted twice.")
            seen.add(name)
            rows.append(row)
    if len(rows) != items:
        raise DataError(
            f"{path} is not finished: {len(rows)} of {items} items have an output. The `isthmus eval` that began it "
            "goes on where it stopped."
        )
    return Folder(path, manifest, rows)


def rescore(path: str | Path, *, rule: str | None = None, code: Iterable[str | Path] = ()) -> Result[ScoredRow]:
    """Score a folder's outputs again and write what comes out.

    With another ``rule`` than the folder's own the scores go into ``scores.<rule>.json``, beside the first ones.
    ``code``: the files of the user's own tasks, of which the folder names one; where it has changed since, its new
    hash stands in ``scores.json``.
    Raises DataError (the folder), ConfigError (an unknown rule, a kind of task that has none, or code that is not
    named).
    """
    own = read_folder(path)
    folder = _by_rule(own, rule)
    manifest = folder.manifest
    target = "scores.json" if folder is own else f"scores.{rule}.json"
    task = task_class(manifest, code)
    with _named_rows(folder):
        scores = score_again(task, folder.rows, manifest)
    warn_of(folder.rows, captions=folder.kind == "caption")
    name = str(manifest.get("task", folder.path.name))
    left_out = int(manifest.get("left_out", 0))
    facts = {"task": name, "kind": folder.kind, **counts(left_out, folder.rows), **scores.to_dict()}
    if target != "scores.json":
        facts["scorer"] = scorer_of(folder.kind, task.version, manifest)
    if (now := code_of(task)) != manifest.get("code"):
        facts["code"] = now
    write_json(folder.path / target, facts)
    return Result(name, folder.kind, scores, folder.rows, folder.path, left_out)


def _by_rule(folder: Folder, rule: str | None) -> Folder:
    """The folder as if it had been scored by ``rule``; itself where that is its own rule, or none is given."""
    if rule is None or rule == folder.manifest.get("rule"):
        return folder
    if "rule" not in folder.manifest or folder.kind not in ("vqa", "conversation"):
        raise ConfigError(f"Scores of kind {folder.kind!r} are made by one rule only; leave task.rule out.")
    return replace(folder, manifest={**folder.manifest, "rule": rules.rule(rule).name})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The second folder's score minus the first's, its 95 % interval, and the two-sided p-value of no difference."""

    name: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p: float

    def to_dict(self) -> dict[str, object]:
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.difference,
            "difference_interval": list(self.interval),
            "p": self.p,
        }


def compare(
    first: str | Path | Sequence[str | Path],
    second: str | Path | Sequence[str | Path],
    *,
    rule: str | None = None,
    seed: int = 0,
    draws: int = 10_000,
    code: Iterable[str | Path] = (),
) -> list[Difference]:
    """Paired bootstrap of two score folders over the same items: an item is drawn with both outcomes. A side may
    be several folders, one per training seed: then an item's outcome is the mean over them. ``rule``: score all of
    them by this one, whatever they were scored by. ``code``: the file of a task of the user's own, which must say its
    ``outcomes``.

    The p-value is twice the smaller share of resamples in which the difference is not above (not below) zero, with
    one added to each count, so that it is never 0. Raises DataError when the folders do not hold the same items with
    the same truths, ConfigError for different kinds, rules, or a score that cannot be paired.
    """
    one, other = ([_by_rule(f, rule) for f in _folders(side)] for side in (first, second))
    a = one[0]
    for b in (*one, *other):
        if (a.kind, a.manifest.get("rule")) != (b.kind, b.manifest.get("rule")):
            raise ConfigError(
                f"{a.path} is scored as {a.kind} ({a.manifest.get('rule')}), {b.path} as {b.kind} "
                f"({b.manifest.get('rule')}); only scores of one kind and rule can be paired."
            )
    task = task_class(a.manifest, code)
    ours, theirs = ([_outcomes(task, a, f) for f in side] for side in (one, other))
    columns = [np.mean([o.columns for o in side], axis=0) for side in (ours, theirs)]
    names, statistic, width = ours[0].names, ours[0].statistic, columns[0].shape[1]
    sums = resampled_sums(np.concatenate(columns, axis=1), draws=draws, seed=seed)
    moved = statistic(sums[:, width:]) - statistic(sums[:, :width])
    low, high = np.percentile(moved, [2.5, 97.5], axis=0)
    before, after = (statistic(c.sum(axis=0)) for c in columns)
    tails = np.minimum((moved <= 0).sum(axis=0), (moved >= 0).sum(axis=0))
    return [
        Difference(
            name=name,
            first=float(before[i]),
            second=float(after[i]),
            difference=float(after[i] - before[i]),
            interval=(float(low[i]), float(high[i])),
            p=float(min(1.0, 2 * (tails[i] + 1) / (draws + 1))),
        )
        for i, name in enumerate(names)
    ]


@contextmanager
def _named_rows(folder: Folder) -> Iterator[None]:
    """Rows that do not hold what such a task is scored by are an error of the folder's."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder.path}: its outputs and its manifest do not hold what a task of kind {folder.kind!r} is scored by "
            f"({type(error).__name__}: {error}). Were they edited? Evaluate anew."
        ) from error


def _outcomes(task: type[Task], first: Folder, folder: Folder) -> Outcomes:
    """What each of the first folder's items contributes to this folder's scores."""
    rows = _aligned(first, folder)
    with _named_rows(folder):
        found = task.outcomes(rows, folder.manifest)
    if found is None:
        raise ConfigError(f"Scores of kind {first.kind!r} are not means over items and cannot be paired here.")
    return found


def _folders(side: str | Path | Sequence[str | Path]) -> list[Folder]:
    return [read_folder(p) for p in ([side] if isinstance(side, str | Path) else side)]


_TRUTHS = ("truth", "captions", "label")


def _aligned(a: Folder, b: Folder) -> list[ScoredRow]:
    """The rows of ``b`` in the order of ``a``'s."""
    found = {r["id"]: r for r in b.rows}
    wanted = dict.fromkeys(r["id"] for r in a.rows)
    odd = [*(i for i in wanted if i not in found), *(i for i in found if i not in wanted)]
    if odd:
        raise DataError(
            f"{a.path} and {b.path} do not hold the same items: {len(odd)} are in one only, the first is {odd[0]!r}."
        )
    for row in a.rows:
        other = found[row["id"]]
        if any(row.get(k) != other.get(k) for k in _TRUTHS):
            raise DataError(
                f"{a.path} and {b.path} hold item {row['id']!r} with different truths; pair like with like."
            )
    return [found[r["id"]] for r in a.rows]
