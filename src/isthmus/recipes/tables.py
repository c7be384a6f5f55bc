"""Score tables for the console."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from isthmus.evaluation.rescore import Difference


def score_table(name: str, facts: dict[str, Any]) -> Table:
    """A task's scores for the console: per question kind where there are kinds, else one row per fact."""
    if "kinds" not in facts:
        out = Table("score", "value", title=name)
        for key, value in _flat(facts):
            out.add_row(key, value)
        return out
    out = Table(title=name)
    for column in ("questions", "n", "accuracy", "95 %", "blind", "shuffled", "prior", "gain"):
        out.add_column(column, justify="left" if column == "questions" else "right")
    for kind, row in [*facts["kinds"].items(), ("all", facts)]:
        low, high = row["accuracy_interval"]
        cells = [_percent(row[c]) for c in ("blind", "shuffled", "prior")]
        out.add_row(
            kind,
            str(row["n"]),
            _percent(row["accuracy"]),
            f"{_percent(low)}-{_percent(high)}",
            *cells,
            _percent(row["gain"]),
            style="bold" if kind == "all" else "",
        )
    out.caption = _besides(facts)
    return out


_BESIDES = ("precision", "recall", "f1", "yes_ratio", "f1_over_kinds", "majority", "consistency")


def _besides(facts: dict[str, Any]) -> str:
    """What a task tells beside accuracy and gain, in one line; nothing where there is nothing to tell."""
    told = [f"{name} {_percent(facts[name])}" for name in _BESIDES if name in facts]
    told += [f"{facts[name]} {name}" for name in ("empty", "unparsable") if facts.get(name)]
    later = facts.get("follow_ups", {})
    if "alone" in later:
        told.append(
            f"follow-ups {_percent(later['accuracy'])}, without what was said before {_percent(later['alone'])}"
        )
    return "; ".join(told)


def difference_table(first: str, second: str, differences: Sequence[Difference]) -> Table:
    """Two score folders over the same items: the second minus the first, in points."""
    out = Table(title=f"{second} minus {first}")
    for column in ("score", "first", "second", "difference", "95 %", "p"):
        out.add_column(column, justify="left" if column == "score" else "right")
    for d in differences:
        low, high = d.interval
        out.add_row(
            d.name,
            _percent(d.first),
            _percent(d.second),
            f"{100 * d.difference:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{d.p:.4f}",
        )
    return out


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            rows.append((prefix + key, _percent(value)))
        elif isinstance(value, list) and len(value) == 2:
            rows.append((prefix + key, " to ".join(_percent(v) for v in value)))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
