"""The page itself: title, scores, curves, samples, training and facts, in one HTML file that loads nothing.

No script, no font, no picture from elsewhere: the style stands inside, pictures are base64. Every text is escaped.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from isthmus.comparison.report.chart import Chart, figure
from isthmus.comparison.report.tables import retrieval_table, score_table, table
from isthmus.evaluation.results import write_text
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.vqa import VqaScores


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said of a sample, whether it is right, and perhaps its attention map (PNG bytes)."""

    text: str
    right: bool
    attention: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class SamplePicture:
    """A picture (PNG bytes, drawn with its pixels visible), a question, the truth, and the answers by model."""

    png: bytes
    question: str
    truth: str
    answers: Mapping[str, Answer]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """One line of a stage's table: of ``parameters`` of a part, ``trained`` are trained, at ``rate``."""

    model: str
    stage: str
    part: str
    parameters: int
    trained: int
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A plain table under a heading of its own, or without one under the table before it; columns from ``numeric`` on
    are figures."""

    heading: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """A paragraph under a heading of its own, for whatever the run has to say besides."""

    heading: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page; what is empty leaves no trace on it.

    ``scores`` and ``retrieval`` by model name, ``seconds`` of wall-clock time by model, ``facts`` short lines such as
    seed, versions and machine. ``opening`` tables stand before the scores; ``plots`` are figures of scores, ``charts``
    of training. ``command``: what to run, and the words before it; ``link``: an address that the page leads to, and the
    words for it.
    """

    title: str
    summary: str = ""
    command: tuple[str, str] | None = None
    link: tuple[str, str] | None = None
    opening: Sequence[Listing] = ()
    scores: Mapping[str, VqaScores] = field(default_factory=dict)
    retrieval: Mapping[str, RetrievalScores] = field(default_factory=dict)
    listings: Sequence[Listing] = ()
    plots: Sequence[Chart] = ()
    charts: Sequence[Chart] = ()
    samples: Sequence[SamplePicture] = ()
    training: Sequence[TrainedPart] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[Note] = ()


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to ``path`` (aside, then renamed)."""
    return write_text(path, render(report))


def render(report: Report) -> str:
    """The page as HTML."""
    style = files("isthmus.comparison.report").joinpath("style.css").read_text(encoding="utf-8")
    numbers = _Numbers()
    sections = [
        *(_listing(listing, numbers) for listing in report.opening),
        _scores(report, numbers),
        _retrieval(report, numbers),
        _section("Curves", _charts(report.plots)),
        *(_listing(listing, numbers) for listing in report.listings),
        _section("How the models learnt", _charts(report.charts, after=len(report.plots))),
        _section("What they answer", _samples(report.samples)),
        _training(report, numbers),
        _seconds(report, numbers),
        *(_section(note.heading, f"<p>{escape(note.text)}</p>") for note in report.notes),
        _section("Facts", _facts(report.facts)),
    ]
    summary = f'<p class="summary">{escape(report.summary)}</p>' if report.summary else ""
    if report.command is not None:
        words, command = (escape(each) for each in report.command)
        summary += f'<p class="summary">{words}</p><pre><code>{command}</code></pre>'
    if report.link is not None:
        address, words = (escape(each) for each in report.link)
        summary += f'<p class="summary"><a href="{address}">{words}</a></p>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header>{_ORNAMENT}<h1>{escape(report.title)}</h1>{summary}</header>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main>\n</body>\n</html>\n"
    )


_FOLDED = 48
"""A table of more scores by kind than this is folded away until somebody opens it."""
_ORNAMENT = (
    '<svg class="ornament" viewBox="0 0 120 24" aria-hidden="true">'
    '<path d="M2 12C2 4 14 2 26 3C40 4 46 10.6 60 10.6C74 10.6 80 4 94 3C106 2 118 4 118 12'
    'C118 20 106 22 94 21C80 20 74 13.4 60 13.4C46 13.4 40 20 26 21C14 22 2 20 2 12Z"/></svg>'
)
"""Two lands and the strip between them."""


class _Numbers:
    """Counts the tables of a page."""

    def __init__(self) -> None:
        self.last = 0

    def caption(self, text: str) -> str:
        self.last += 1
        return f"<b>Table {self.last}.</b> {escape(text)}"


def _section(heading: str, body: str) -> str:
    title = f"<h2>{escape(heading)}</h2>" if heading else ""
    return f"<section>{title}{body}</section>" if body else ""


def _scores(report: Report, numbers: _Numbers) -> str:
    if not report.scores:
        return ""
    overall = score_table(
        [("", [(name, s.overall) for name, s in report.scores.items()])],
        numbers.caption(
            "Answers that match exactly, over all questions. Percent; 95 % intervals and numbers of questions small."
        ),
        "model",
    )
    kinds = sorted({k for s in report.scores.values() for k in s.kinds})
    by_kind = ""
    if kinds:
        single = len(report.scores) == 1
        groups = [(k, [(n, s.kinds[k]) for n, s in report.scores.items() if k in s.kinds]) for k in kinds]
        if single:
            groups = [("", [(k, rows[0][1]) for k, rows in groups])]
        by_kind = score_table(groups, numbers.caption("The same by kind of question."), "kind" if single else "model")
        if (count := sum(len(rows) for _, rows in groups)) > _FOLDED:
            by_kind = f"<details><summary>By kind of question, {count} rows</summary>{by_kind}</details>"
    reading = (
        '<p class="reading"><b>How to read a score.</b> Beside the accuracy stands what can be reached without '
        "looking: <i>blind</i>, the same model without the picture; <i>shuffled</i>, with the picture of another "
        "sample; <i>prior</i>, the most frequent training answer to the same question. The <i>gain</i> is the "
        "distance above the best of the three (underlined), in colour where its interval leaves out zero. In the "
        "bars, grey is what needs no picture, colour is the gain, and the thin line is the interval of the "
        "accuracy.</p>"
    )
    if any(s.overall.best_without_looking is None for s in report.scores.values()):
        reading += (
            '<p class="reading">A bar of one pale shade is a score without these controls: nothing was left out.</p>'
        )
    return _section("Scores", overall + reading + by_kind)


def _retrieval(report: Report, numbers: _Numbers) -> str:
    if not report.retrieval:
        return ""
    caption = numbers.caption(
        "Retrieval: recall among the first 1, 5 and 10. Percent; 95 % intervals and numbers of items small."
    )
    return _section("Pictures and captions", retrieval_table(report.retrieval, caption))


def _listing(listing: Listing, numbers: _Numbers) -> str:
    caption = numbers.caption(listing.caption)
    return _section(listing.heading, table(listing.head, listing.rows, caption, numeric=listing.numeric))


def _charts(charts: Sequence[Chart], *, after: int = 0) -> str:
    drawn = "".join(figure(chart, number) for number, chart in enumerate(charts, start=after + 1))
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _samples(samples: Sequence[SamplePicture]) -> str:
    if not samples:
        return ""
    blind = {n for s in samples for n in s.answers} - {n for s in samples for n, a in s.answers.items() if a.attention}
    with_maps = any(a.attention for s in samples for a in s.answers.values())
    note = (
        '<p class="reading">The small pictures show what a model attended to while it wrote: bright where its '
        "attention was, the mean over layers and new tokens."
        + (f" No such map exists of {escape(', '.join(sorted(blind)))}." if blind else "")
        + "</p>"
        if with_maps
        else ""
    )
    return note + '<div class="samples">' + "".join(_sample(s) for s in samples) + "</div>"


def _sample(sample: SamplePicture) -> str:
    alone = len(sample.answers) == 1
    said = "".join(
        f'<li class="{"right" if a.right else "wrong"}">'
        f'<span class="mark" role="img" aria-label="{"right" if a.right else "wrong"}">{"✓" if a.right else "✗"}</span>'
        f'<span class="said">{escape(a.text) if a.text.strip() else "<i>no answer</i>"}</span>'
        + ("" if alone else f'<span class="who">{escape(name)}</span>')
        + (
            ""
            if a.attention is None
            else f'<img class="look" src="{_embedded(a.attention)}" alt="attention of {escape(name)}">'
        )
        + "</li>"
        for name, a in sample.answers.items()
    )
    kind = f'<span class="kind">{escape(sample.kind)}</span>' if sample.kind else ""
    return (
        f'<article class="sample"><img src="{_embedded(sample.png)}" alt="{escape(sample.question)}">'
        f'<div><p class="question">{escape(sample.question)}</p><ul>{said}</ul>'
        f'<p class="truth">truth: <b>{escape(sample.truth)}</b>{kind}</p></div></article>'
    )


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _training(report: Report, numbers: _Numbers) -> str:
    if not report.training:
        return ""
    rows, before = [], ("", "")
    for part in report.training:
        place = (part.model, part.stage)
        rows.append(
            (
                part.model if part.model != before[0] else "",
                part.stage if place != before else "",
                part.part,
                f"{part.parameters:,}",
                f"{part.trained:,}" if part.trained else "frozen",
                f"{part.rate:g}" if part.rate is not None and part.trained else "",
            )
        )
        before = place
    head = ("model", "stage", "part", "parameters", "trained", "rate")
    caption = numbers.caption("What each stage trained, in parameters.")
    return _section("What was trained", table(head, rows, caption, numeric=3))


def _seconds(report: Report, numbers: _Numbers) -> str:
    if not report.seconds:
        return ""
    rows: list[tuple[str, ...]] = [(name, _duration(s)) for name, s in report.seconds.items()]
    rows.append(("sum", _duration(sum(report.seconds.values()))))
    caption = numbers.caption(
        "Time by the clock in the steps of training. Trainings that ran side by side count each in full."
    )
    return _section("Time", table(("model", "time"), rows, caption, numeric=1, total=True))


def _duration(seconds: float) -> str:
    """3 s, 2 min 05 s, 1 h 02 min."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def _facts(facts: Mapping[str, object]) -> str:
    told = {k: (", ".join(map(str, v)) or "none") if isinstance(v, list) else str(v) for k, v in facts.items()}
    lines: Iterable[str] = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in told.items())
    listed = "".join(lines)
    return f"<dl>{listed}</dl>" if listed else ""
