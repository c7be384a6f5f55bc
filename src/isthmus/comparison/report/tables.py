"""The tables of the report: scores with their controls and a small bar each, retrieval, and plain ones."""

from collections.abc import Mapping, Sequence
from html import escape

from isthmus.evaluation.bootstrap import Interval
from isthmus.evaluation.retrieval import CUTS, RetrievalScores
from isthmus.evaluation.vqa import ENOUGH, Score

Group = tuple[str, Sequence[tuple[str, Score]]]


def score_table(groups: Sequence[Group], caption: str, first: str) -> str:
    """One row per (name, score), groups under their heading where they have one. ``caption`` is HTML.

    Columns: name and n, bar, accuracy with interval, blind, shuffled, prior, gain with interval.
    """
    head = "".join(f"<th{' class=num' if i > 1 else ''}>{h}</th>" for i, h in enumerate(
        (escape(first), "", "accuracy", "blind", "shuffled", "prior", "gain")))  # fmt: skip
    body = "".join(
        "<tbody>"
        + (f'<tr class="group"><th colspan="7">{escape(name)}</th></tr>' if name else "")
        + "".join(_score_row(label, score) for label, score in rows)
        + "</tbody>"
        for name, rows in groups
    )
    marked = any(not score.enough for _, rows in groups for _, score in rows)
    note = f'<p class="footnote">† fewer than {ENOUGH} questions: too few to rest a claim on.</p>' if marked else ""
    return (
        f'<div class="wide"><table class="scores"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead>{body}</table></div>{note}"
    )


def _score_row(label: str, score: Score) -> str:
    unread = f"; {score.empty} empty" if score.empty else ""
    if score.unparsable > score.empty:  # what is empty is among them
        unread = f"; {score.unparsable:,} unparsable"
    dagger = "" if score.enough else "<sup>†</sup>"
    controls = "".join(
        f'<td class="num control{" best" if value is not None and value == score.best_without_looking else ""}">'
        f"{percent(value)}</td>"
        for value in (score.blind, score.shuffled, score.prior)
    )
    low, high = score.gain_interval or (0.0, 0.0)
    way = "up" if low > 0 else "down" if high < 0 else "flat"
    gain = percent(score.gain, signed=True) + _spread(score.gain_interval, signed=True)
    return (
        f'<tr><th scope="row">{escape(label)}{dagger} <span class="n">{score.n:,}{unread}</span></th>'
        f'<td class="bar">{bar(score)}</td>'
        f'<td class="num">{percent(score.accuracy)}{_spread(score.interval)}</td>{controls}'
        f'<td class="num gain {way}">{gain}</td>'
        "</tr>"
    )


def bar(score: Score) -> str:
    """Grey up to the best without looking, colour for the gain above it, hollow for what is missing below it; pale
    where nothing was scored without looking."""
    best = 100 * (score.best_without_looking or 0.0)
    reached = 100 * score.accuracy
    low, high = (100 * x for x in score.interval)
    parts = [f'<rect class="known" width="{min(best, reached):.1f}" height="10"/>']
    if score.best_without_looking is None:
        parts.append(f'<rect class="alone" x="0.0" width="{reached:.1f}" height="10"/>')
    elif reached >= best:
        parts.append(f'<rect class="gained" x="{best:.1f}" width="{reached - best:.1f}" height="10"/>')
    else:
        parts.append(f'<rect class="missed" x="{reached:.1f}" width="{best - reached:.1f}" height="10"/>')
    parts.append(f'<path class="spread" d="M{low:.1f} 5H{high:.1f}"/>')
    label = f"accuracy {reached:.1f} percent"
    label += "" if score.best_without_looking is None else f", without looking {best:.1f}"
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<rect class="track" width="100" height="10"/>{"".join(parts)}</svg>'
    )


def retrieval_table(models: Mapping[str, RetrievalScores], caption: str) -> str:
    """Both directions of each model, with what guessing reaches. ``caption`` is HTML."""
    head = "<th>model</th><th></th>" + "".join(f"<th class=num>R@{k}</th>" for k in CUTS) + "<th class=num>chance</th>"
    rows = []
    for name, scores in models.items():
        ways = (("picture → text", scores.image_to_text), ("text → picture", scores.text_to_image))
        for i, (way, recall) in enumerate(ways):
            cells = "".join(
                f'<td class="num">{percent(recall.recall[k])}{_spread(recall.intervals[k])}</td>' for k in CUTS
            )
            rows.append(
                f'<tr><th scope="row">{escape(name) if i == 0 else ""}</th>'
                f'<td>{way} <span class="n">{recall.n:,}</span></td>{cells}'
                f'<td class="num control">{percent(recall.chance[1])}</td></tr>'
            )
    return (
        f'<div class="wide"><table><caption>{caption} Chance is that of R@1.</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numeric: int, total: bool = False
) -> str:
    """A plain table; columns from ``numeric`` on are figures, ``total`` sets the last row apart. A row whose leading
    cells are empty belongs to the one above and gets no rule."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=num' if i >= numeric else ''}>{escape(value)}</{tag}>" for i, value in enumerate(values)
        )

    def style(i: int) -> str:
        if total and i == len(rows) - 1:
            return " class=total"
        return "" if any(rows[i][: numeric - 1]) or numeric < 2 else " class=same"

    body = "".join(f"<tr{style(i)}>{cells(row, 'td')}</tr>" for i, row in enumerate(rows))
    return (
        f'<div class="wide"><table class="plain"><caption>{caption}</caption>'
        f"<thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """0.7142 -> 71.4; a dash where there is no value."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:{'+' if signed else ''}.1f}".replace("-", "−")


def _spread(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (percent(x, signed=signed) for x in interval)
    return f"<small>{low} – {high}</small>"
