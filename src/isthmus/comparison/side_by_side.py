"""What a comparison found, on paper: results.json, scores.csv, scores.md, differences.csv and the page's parts."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from isthmus.comparison.compare import Contestant, answer_rows, answers_of, pictured
from isthmus.comparison.cost import Cost
from isthmus.comparison.curves import loss_curves, part_lines, png, seconds
from isthmus.comparison.report import Answer, Chart, Listing, Note, Report, SamplePicture, TrainedPart
from isthmus.comparison.report.tables import percent
from isthmus.data.images import open_image
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.bootstrap import Interval
from isthmus.evaluation.rerank import RerankScores
from isthmus.evaluation.rescore import Difference
from isthmus.evaluation.rescore import compare as paired
from isthmus.evaluation.results import Results, write_json, write_text
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.scorers import KINDS
from isthmus.evaluation.vqa import Score, VqaScores
from isthmus.recipes.schema import EvalSpec

UNEQUAL = "Each model has the budget of its own recipe: they are not equal."
MANY = 6
"""With more models than this the page shows the statements alone; every pair is in ``differences.csv``."""
MAIN = ("accuracy", "CIDEr", "image to text R@1", "text to image R@1", "top_1")
"""Measures whose differences the page shows; ``differences.csv`` has the others too."""


class _Measured(TypedDict):
    kind: str
    n: int
    score: float
    low: float | None
    high: float | None
    blind: NotRequired[float | None]
    shuffled: NotRequired[float | None]
    prior: NotRequired[float | None]
    gain: NotRequired[float | None]


class ScoreRow(_Measured):
    """A line of ``scores.csv``: of all answers, of a kind of question, or of a measure."""

    model: str
    task: str


class Compared(TypedDict):
    """A difference on the same items, with its interval."""

    measure: str
    difference: float
    low: float
    high: float
    p: float


class DifferenceRow(Compared):
    """A line of ``differences.csv``."""

    first: str
    second: str
    task: str


def write_comparison(
    out: Path,
    rivals: Sequence[Contestant],
    *,
    title: str,
    summary: str,
    seed: int,
    budget: str = UNEQUAL,
    opening: Sequence[Listing] = (),
    plots: Sequence[Chart] = (),
) -> Report:
    """``results.json``, ``costs.json``, tables as CSV and Markdown below ``out``, and the page for
    :func:`~isthmus.comparison.report.write_report`. ``opening`` and ``plots`` are what the page shows besides."""
    results = Results(seed=seed)
    for rival in rivals:
        for result in rival.results:
            results.add(rival.label(result.task), result.scores)
        if rival.recipe is not None:
            results.seconds[rival.name] = round(seconds(rival.folder, rival.recipe), 1)
    results.write(out / "results.json")
    write_json(out / "costs.json", {r.name: r.cost.to_dict() for r in rivals if r.cost is not None})
    rows, pairs = score_rows(rivals), difference_rows(rivals, seed)
    write_text(out / "scores.csv", _csv(rows, _COLUMNS))
    write_text(out / "scores.md", _markdown(rows))
    write_text(out / "differences.csv", _csv(pairs, _PAIR_COLUMNS))
    shown = [] if len(rivals) > MANY else pairs
    listings = [differences(shown), *costs(rivals, budget), other_scores(rows), shot_scores(rows)]
    return Report(
        title=title,
        summary=summary,
        opening=opening,
        scores=_answers(rivals),
        retrieval=_retrieval(rivals),
        listings=[listing for listing in listings if listing.rows],
        plots=[*plots, *_shots(rivals)],
        charts=[
            Chart(
                title=f"{r.name}: loss by stage, one stage after the other; beside each name the last value",
                series=loss_curves(r.folder, r.recipe),
                log=True,
                y_label="loss, logarithmic",
            )
            for r in rivals
            if r.recipe is not None and (r.folder / "stages").is_dir()
        ],
        samples=samples(rivals),
        training=[part for rival in rivals for part in trained_parts(rival)],
        seconds=results.seconds,
        facts={"seed": results.seed, **results.versions, **results.machine},
        notes=_left_out(rivals),
    )


def _left_out(rivals: Sequence[Contestant]) -> list[Note]:
    """Samples that could not be read, by task."""
    found = {result.task: result for rival in rivals for result in rival.results if result.left_out}
    samples = ", ".join(
        f"{r.left_out} of {task} (listed in {r.folder / 'quarantine.jsonl'})" for task, r in found.items()
    )
    return [Note(heading="Left out", text=f"Samples that could not be read: {samples}.")] if found else []


def score_rows(rivals: Sequence[Contestant]) -> list[ScoreRow]:
    """One flat row per model, task and kind of question (``all`` for all kinds) or measure, fractions."""
    rows: list[ScoreRow] = []
    for rival in rivals:
        for result in rival.results:
            answers = answers_of(result.scores)
            if answers is not None:
                found = [_row(kind, s) for kind, s in (("all", answers.overall), *answers.kinds.items())]
            elif isinstance(result.scores, RetrievalScores):
                found = _recalls(result.scores)
            else:
                found = _measures({"n": len(result.rows), **result.scores.to_dict()}, bare=result.kind not in KINDS)
            for measured in found:
                rows.append({"model": rival.name, "task": result.task, **measured})
    return rows


def main_score(rival: Contestant, task: str) -> ScoreRow | None:
    """The row of a task's main score: of all answers, CIDEr, from pictures to texts; none where it was not scored."""
    rows = [row for row in score_rows([rival]) if row["task"] == task]
    return next((row for row in rows if row["kind"] == "CIDEr"), rows[0] if rows else None)


def _row(kind: str, score: Score) -> _Measured:
    low, high = score.interval
    return {
        "kind": kind,
        "n": score.n,
        "score": score.accuracy,
        "low": low,
        "high": high,
        "blind": score.blind,
        "shuffled": score.shuffled,
        "prior": score.prior,
        "gain": score.gain,
    }


def _recalls(scores: RetrievalScores) -> list[_Measured]:
    ways = (("image_to_text", scores.image_to_text), ("text_to_image", scores.text_to_image))
    return [
        {
            "kind": f"{way} R@1",
            "n": recall.n,
            "score": recall.recall[1],
            "low": recall.intervals[1][0],
            "high": recall.intervals[1][1],
        }
        for way, recall in ways
    ]


def _measures(facts: Mapping[str, object], *, bare: bool) -> list[_Measured]:
    """Every measure that comes with an interval; the gain stands beside those of which it is the gain. A user's own
    task may give fractions without intervals (``bare``)."""
    named = [name for name in facts if facts.get(f"{name}_interval") is not None and name != "gain"]
    if bare:
        named += [name for name, value in facts.items() if isinstance(value, float) and name not in (*named, "gain")]
    main = "CIDEr" if "CIDEr" in named else named[0] if named else ""
    found: list[_Measured] = []
    for name in named:
        low, high = cast("Interval | tuple[None, None]", facts.get(f"{name}_interval") or (None, None))
        gain = cast(float | None, facts.get("gain")) if name == main else None
        n, score = cast(int, facts.get("n")), cast(float, facts[name])
        found.append({"kind": name, "n": n, "score": score, "low": low, "high": high, "gain": gain})
    return found


_COLUMNS = ("model", "task", "kind", "n", "score", "low", "high", "blind", "shuffled", "prior", "gain")
_PAIR_COLUMNS = ("first", "second", "task", "measure", "difference", "low", "high", "p")


def _csv(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(name) for name in columns] for row in rows)
    return file.getvalue()


def _markdown(rows: Sequence[ScoreRow]) -> str:
    """Every task over all kinds, in percent, then the same by kind of question."""
    kinds = [r for r in rows if "blind" in r and r["kind"] != "all"]
    main = [r for r in rows if r not in kinds]
    lines = ["| model | task | | n | score | 95 % | gain |", "|---|---|---|---|---|---|---|"]
    for row in main:
        cells = [row["model"], row["task"], row["kind"], str(row["n"]), percent(row["score"]), _spread(row)]
        lines.append("| " + " | ".join([*cells, percent(row.get("gain"))]) + " |")
    names = list(dict.fromkeys(r["kind"] for r in kinds))
    if names:
        lines += ["", "| model | task | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for place in dict.fromkeys((r["model"], r["task"]) for r in kinds):
        own = {r["kind"]: r for r in kinds if (r["model"], r["task"]) == place}
        cells = [f"{percent(own[k]['score'])} ({percent(own[k].get('gain'))})" if k in own else "–" for k in names]
        lines.append("| " + " | ".join([*place, *cells]) + " |")
    return "\n".join(lines) + ("\n\nBy kind of question, with the gain in brackets.\n" if names else "\n")


def _spread(row: _Measured | Compared, *, signed: bool = False) -> str:
    if row["low"] is None:
        return "–"
    return f"{percent(row['low'], signed=signed)} to {percent(row['high'], signed=signed)}"


def difference_rows(rivals: Sequence[Contestant], seed: int) -> list[DifferenceRow]:
    """Every pair of contestants on every task both did: the second's score less the first's, on the same items."""
    rows: list[DifferenceRow] = []
    for one, other in combinations(rivals, 2):
        theirs = {r.task for r in other.results}
        for result in one.results:
            if result.task in theirs:
                for found in difference(one, other, result.task, seed):
                    rows.append({"first": one.name, "second": other.name, "task": result.task, **found})
    return rows


def difference(one: Contestant, other: Contestant, task: str, seed: int) -> list[Compared]:
    """Difference, interval and p of each measure, the main ones first, over the seeds that both have; none where they
    did not answer the same items, or where the score is no mean over items (an AUC)."""
    ours, theirs = one.folders(task, other), other.folders(task, one)
    if not ours or not theirs:
        return []
    try:
        found: list[Difference] = paired(ours, theirs, seed=seed, draws=2000, code=one.code(task))
    except (ConfigError, DataError):
        return []
    return [
        {"measure": d.name, "difference": d.difference, "low": d.interval[0], "high": d.interval[1], "p": d.p}
        for d in sorted(found, key=lambda d: d.name not in MAIN)
    ]


def differences(rows: Sequence[DifferenceRow]) -> Listing:
    return Listing(
        heading="Who is better",
        caption="Differences on the same items, in points, with paired 95 % bootstrap intervals.",
        head=("difference", "task", "measure", "points", "95 %"),
        rows=[
            (
                f"{row['second']} − {row['first']}",
                row["task"],
                row["measure"],
                percent(row["difference"], signed=True),
                _spread(row, signed=True),
            )
            for row in rows
            if row["measure"] in MAIN
        ],
        numeric=3,
    )


def costs(rivals: Sequence[Contestant], budget: str = UNEQUAL) -> list[Listing]:
    """What every contestant cost to train, how far the budgets differ, and what its answers cost."""
    measured = [(r.name, r.cost) for r in rivals if r.cost is not None]
    least = min((c.training_flops for _, c in measured if c.training_flops), default=None)
    trained = Listing(
        heading="What they cost",
        caption="Parameters in all and trained by any stage; tokens of a picture; operations of training, one measured "
        "step of every stage times its steps, and how many times those of the model that took least; seconds in these "
        f"steps. {budget}",
        head=("model", "parameters", "trained", "visual tokens", "FLOPs", "× least", "time"),
        rows=[(name, *_training_cells(cost, least)) for name, cost in measured],
        numeric=1,
    )
    answers = Listing(
        heading="",
        caption="An answer: operations of reading one question and of the first new token; the median time of one "
        "alone; answers a second in batches of 1, 7 and 64; memory above the weights. Operations count matrix products "
        "and convolutions, two per multiplication and addition.",
        head=("model", "FLOPs", "latency", "answers/s", "memory"),
        rows=[(name, *_answer_cells(cost)) for name, cost in measured if cost.latency is not None],
        numeric=1,
    )
    return [trained, answers]


def _training_cells(cost: Cost, least: float | None) -> tuple[str, ...]:
    times = cost.training_flops / least if cost.training_flops is not None and least else None
    return (
        f"{cost.parameters:,}",
        _formatted(cost.trained, ","),
        _formatted(cost.visual_tokens, ","),
        _formatted(cost.training_flops, ".2e"),
        _formatted(times, ".1f"),
        _formatted(cost.training_seconds, ",.0f", " s"),
    )


def _answer_cells(cost: Cost) -> tuple[str, ...]:
    speeds = cost.throughput or {}
    return (
        _formatted(cost.flops_answer, ".2e"),
        _formatted(cost.latency and 1000 * cost.latency, ".0f", " ms"),
        " / ".join(f"{speeds[size]:.0f}" for size in speeds) or "–",
        _formatted(cost.memory and cost.memory / 2**20, ",.0f", " MiB"),
    )


def _formatted(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def other_scores(rows: Sequence[ScoreRow]) -> Listing:
    """Scores that are no shares of right answers and no recalls: captions, classes, matching."""
    return Listing(
        heading="Other scores",
        caption="Percent, with 95 % intervals; the gain is above the best score without looking.",
        head=("model", "task", "measure", "n", "score", "95 %", "gain"),
        rows=[
            (r["model"], r["task"], r["kind"], f"{r['n']:,}", percent(r["score"]), _spread(r), percent(r["gain"]))
            for r in rows
            if "gain" in r and "blind" not in r
        ],
        numeric=3,
    )


def _shots_of(task: str) -> tuple[str, int] | None:
    """``vqa-4-shots`` -> (``vqa``, 4)."""
    base, sep, count = task.removesuffix("-shots").rpartition("-")
    return (base, int(count)) if task.endswith("-shots") and sep and count.isdigit() else None


def shot_scores(rows: Sequence[ScoreRow]) -> Listing:
    """Scores of tasks with several numbers of examples, over all kinds."""
    return Listing(
        heading="Score over shots",
        caption="The same questions after so many examples. Percent, with 95 % intervals.",
        head=("model", "task", "shots", "score", "95 %", "gain"),
        rows=[
            (r["model"], place[0], str(place[1]), percent(r["score"]), _spread(r), percent(r.get("gain"), signed=True))
            for r in rows
            if r["kind"] == "all" and (place := _shots_of(r["task"])) is not None
        ],
        numeric=2,
    )


def _answers(rivals: Sequence[Contestant]) -> dict[str, VqaScores]:
    """Scores of answers by label; those after examples have a table of their own."""
    return {
        r.label(x.task): scores
        for r in rivals
        for x in r.results
        if _shots_of(x.task) is None and (scores := answers_of(x.scores)) is not None
    }


def _retrieval(rivals: Sequence[Contestant]) -> dict[str, RetrievalScores]:
    """Recall by model; for two steps also that of the first alone."""
    found: dict[str, RetrievalScores] = {}
    for rival in rivals:
        for result in rival.results:
            if isinstance(result.scores, RerankScores):
                found[f"{rival.name}, first step"] = result.scores.first
            if isinstance(result.scores, RetrievalScores):
                found[rival.label(result.task)] = result.scores
    return found


def _shots(rivals: Sequence[Contestant]) -> list[Chart]:
    """One chart per task with several numbers of shots, a line per contestant."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for rival in rivals:
        for result in rival.results:
            place, scores = _shots_of(result.task), answers_of(result.scores)
            if place is not None and scores is not None:
                point = (float(place[1]), 100 * scores.overall.accuracy)
                lines.setdefault(place[0], {}).setdefault(rival.name, []).append(point)
    return [
        Chart(
            title=f"{base}: score over shots",
            series={name: sorted(points) for name, points in series.items()},
            x_label="shots",
            y_label="score, percent",
        )
        for base, series in lines.items()
    ]


def samples(rivals: Sequence[Contestant]) -> list[SamplePicture]:
    """The first questions of the first task about pictures, with the answers and attention maps of every model that has
    answers to them."""
    specs: dict[str, EvalSpec] = {}
    for rival in rivals:
        for spec in rival.specs:
            if spec.stage is None:
                specs.setdefault(spec.name, spec)
    found = (_answered(rivals, spec) for spec in specs.values())
    return next((pictures for pictures in found if pictures), [])


def _answered(rivals: Sequence[Contestant], spec: EvalSpec) -> list[SamplePicture]:
    answered = [
        (r, {row["id"]: row for row in answer_rows(x)})
        for r in rivals
        for x in r.results
        if x.task == spec.name and answers_of(x.scores) is not None
    ]
    found = []
    for record in pictured(spec) if answered else ():
        said = [(r, rows[record.id]) for r, rows in answered if record.id in rows]
        if not said:  # after --limit
            continue
        row = said[0][1]
        found.append(
            SamplePicture(
                png=png(open_image(record.images[0].source)),
                question=row["question"],
                truth=Counter(row["truth"]).most_common(1)[0][0],
                answers={
                    r.name: Answer(
                        text=own["answer"],
                        right=own["correct"] >= 0.5,  # half the points, where several people gave the truth
                        attention=r.attention_pictures.get(record.id) if r.attention_task == spec.name else None,
                    )
                    for r, own in said
                },
                kind=row["kind"],
            )
        )
    return found


def trained_parts(rival: Contestant) -> list[TrainedPart]:
    """The lines of every stage's table of parts."""
    if rival.recipe is None or not (rival.folder / "stages").is_dir():
        return []
    parts = []
    for stage in rival.recipe.stages:
        parts += [
            TrainedPart(
                model=rival.name,
                stage=stage.name,
                part=row["part"],
                parameters=row["parameters"],
                trained=row["trained"],
                rate=max(row["rates"], default=None),
            )
            for row in part_lines(rival.folder, stage.name)
        ]
    return parts
