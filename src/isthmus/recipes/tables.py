"""Score tables for the console, from scores as ``scores.json`` holds them; TypeError for what is not of that kind."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from isthmus.evaluation.rescore import Difference
from isthmus.evaluation.vqa import ENOUGH


def score_table(name: str, facts: Mapping[str, object]) -> Table:
    """A task's scores for the console: by kind of question, by direction of retrieval, else one row per fact."""
    if "image_to_text" in facts:
        return _retrieval_table(name, facts)
    if "relative" in facts:
        return _judged_table(name, facts)
    if "kinds" not in facts:
        out = Table("score", "value", title=escape(name))
        for key, value in _flat(facts):
            out.add_row(escape(key), escape(value))
        return out
    notes = [besides] if (besides := _besides(facts)) else []
    out = Table(title=escape(name))
    for column in ("questions", "n", "accuracy", "95 %", "blind", "shuffled", "prior", "gain"):
        out.add_column(column, justify="left" if column == "questions" else "right")
    for kind, row in [*_by_name(facts["kinds"]), ("all", facts)]:
        cells = [_percent(row[c]) for c in ("blind", "shuffled", "prior")]
        few = row.get("enough") is False
        out.add_row(
            escape(kind) + " †" * few,
            str(row["n"]),
            _percent(row["accuracy"]),
            _span(row["accuracy_interval"]),
            *cells,
            _percent(row["gain"]),
            style="bold" if kind == "all" else "",
        )
    if any(row.get("enough") is False for _, row in [*_by_name(facts["kinds"]), ("", facts)]):
        notes.append(f"† fewer than {ENOUGH} questions: too few to rest a claim on")
    out.caption = "; ".join(notes)
    return out


def _retrieval_table(name: str, facts: Mapping[str, object]) -> Table:
    """Recall in both directions; reranked by a matching head, the first step's beside it and what was gained."""
    recalls = [key for key in _facts(facts["image_to_text"]) if key.startswith("recall_at_") and key[10:].isdigit()]
    first = recalls[0]
    names = [f"R@{key[10:]}" for key in recalls]
    out = Table(title=escape(name))
    for column in ("direction", "n", names[0], "95 %", "chance", *names[1:]):
        out.add_column(column, justify="left" if column == "direction" else "right")
    steps = [("", facts)]
    if "first_step" in facts:
        steps = [("", _facts(facts["first_step"])), (", reranked", facts)]
    for step, found in steps:
        for way in ("image_to_text", "text_to_image"):
            one = _facts(found[way])
            cells = [_percent(one[key]) for key in (first, first.replace("recall", "chance"), *recalls[1:])]
            cells.insert(1, _span(one[f"{first}_interval"]))
            out.add_row(way.replace("_", " ") + step, str(one["n"]), *cells)
    gains = [
        f"{way.replace('_', ' ')} {100 * _number(gain['value']):+.1f} ({_span(gain['interval'])})"
        for way, gain in _by_name(facts.get("gain_at_1", {}))
    ]
    out.caption = f"{names[0]} gained by reranking: {', '.join(gains)}" if gains else None
    return out


def _judged_table(name: str, facts: Mapping[str, object]) -> Table:
    """A judge's mean scores and their ratio, by category."""
    out = Table(title=escape(name))
    for column in ("questions", "n", "relative", "95 %", "candidate", "reference", "excluded"):
        out.add_column(column, justify="left" if column == "questions" else "right")
    for kind, row in [*_by_name(facts["kinds"]), ("all", facts)]:
        span = _span(row["relative_interval"]) if row["relative_interval"] else "–"
        means = ["–" if row[c] is None else f"{_number(row[c]):.2f}" for c in ("candidate", "reference")]
        cells = [str(row["n"]), _percent(row["relative"]), span, *means, str(row["excluded"])]
        out.add_row(escape(kind), *cells, style="bold" if kind == "all" else "")
    orders = ", ".join(f"{name} {count}" for name, count in _facts(facts["orders"]).items())
    out.caption = f"the winner when the order is turned: {orders}; {facts['retried']} reviews requested again"
    if excluded := facts["excluded"]:
        many = "questions" if excluded != 1 else "question"
        out.caption += f"; {excluded} {many} excluded, of which no two scores could be read (outputs.jsonl)"
    return out


_BESIDES = ("precision", "recall", "f1", "yes_ratio", "f1_over_kinds", "majority", "consistency", "circular")


def _besides(facts: Mapping[str, object]) -> str:
    """What a task reports beside accuracy and gain, in one line; empty where that is nothing."""
    notes = [f"{name} {_percent(facts[name])}" for name in _BESIDES if name in facts]
    notes += [f"{name} {_number(facts[name]):.1f} points" for name in ("perception", "cognition") if name in facts]
    notes += [f"{facts[name]} {name}" for name in ("empty", "unparsable") if facts.get(name)]
    later = _facts(facts.get("follow_ups", {}))
    if "alone" in later:
        notes.append(
            f"follow-ups {_percent(later['accuracy'])}, without what was said before {_percent(later['alone'])}"
        )
    return "; ".join(notes)


def difference_table(first: str, second: str, differences: Sequence[Difference]) -> Table:
    """Two score folders over the same items: the second minus the first, in points."""
    first, second = escape(first), escape(second)
    out = Table(title=f"{second} minus {first}")
    for column in ("score", first, second, "difference", "95 %", "p"):
        out.add_column(column, justify="left" if column == "score" else "right")
    for d in differences:
        low, high = d.interval
        out.add_row(
            escape(d.name),
            _percent(d.first),
            _percent(d.second),
            f"{100 * d.difference:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{d.p:.4f}",
        )
    return out


def _flat(facts: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            rows.append((prefix + key, _percent(value)))
        elif isinstance(value, list) and len(value) == 2:
            rows.append((prefix + key, " to ".join(_percent(v) for v in value)))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def _span(interval: object) -> str:
    """Both ends; with words between them where one has a sign."""
    if not isinstance(interval, Sequence):
        raise TypeError(f"{interval!r} is no interval.")
    low, high = (_number(end) for end in interval)
    return f"{_percent(low)} to {_percent(high)}" if low < 0 else f"{_percent(low)}-{_percent(high)}"


def _percent(value: object) -> str:
    return "–" if value is None else f"{100 * _number(value):.1f}"


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number.")
    return value


def _facts(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} holds no scores.")
    return value


def _by_name(value: object) -> list[tuple[str, Mapping[str, object]]]:
    """Scores of several kinds or directions."""
    return [(name, _facts(facts)) for name, facts in _facts(value).items()]
