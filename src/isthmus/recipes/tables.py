"""Score tables for the console."""

from typing import Any

from rich.table import Table


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
    return out


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            rows.append((prefix + key, _percent(value)))
        elif isinstance(value, list) and len(value) == 2:
            rows.append((prefix + key, "-".join(_percent(v) for v in value)))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
