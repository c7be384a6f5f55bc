"""Models side by side on the same work: scores, differences with intervals, costs, curves, answers; one report.

A contestant is a model with its folder; every task is asked of every contestant that can do it. The demo ends with the
same comparison of the models it has just trained.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from isthmus.checkpoint import read_json
from isthmus.data.images import open_image
from isthmus.data.record import Record, Video, without_answer
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.report import Answer, Chart, Listing, Report, SamplePicture, TrainedPart
from isthmus.evaluation.report.tables import percent
from isthmus.evaluation.rerank import RerankScores
from isthmus.evaluation.rescore import compare as paired
from isthmus.evaluation.results import Results, write_json, write_text
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.run import Result
from isthmus.evaluation.vqa import Score, VqaScores
from isthmus.model import Model
from isthmus.recipes.cost import Cost, cost_of
from isthmus.recipes.curves import loss_curves, overlay, png, seconds
from isthmus.recipes.schema import EvalSpec, Recipe
from isthmus.recipes.scoring import make_task, model_hash, recipe_of, score_model

SAMPLES = 12
"""Pictures shown in the report."""
OWN = ("retrieval", "readings", "vqa")
"""Tasks whose scores stand under the model's bare name; others add theirs (``flamingo-clips``)."""


@dataclass(kw_only=True)
class Contestant:
    """A model's name in the comparison, its folder, the recipe it was trained with (where known), the tasks it was
    given, what it scored, and by question where it looked (PNG bytes)."""

    name: str
    folder: Path
    recipe: Recipe | None = None
    specs: Sequence[EvalSpec] = ()
    results: list[Result] = field(default_factory=list)
    cost: Cost | None = None
    looked: dict[str, bytes] = field(default_factory=dict)

    def label(self, task: str) -> str:
        """The name of a task's scores."""
        return self.name if task in OWN else f"{self.name}-{task}"


def contestants(folders: Sequence[str | Path]) -> list[Contestant]:
    """One for each folder, called by the folder's name. Raises ConfigError when two have the same."""
    found: dict[str, Contestant] = {}
    for folder in map(Path, folders):
        name = folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
        if name in found:
            raise ConfigError(
                f"{folder} and {found[name].folder} are both called {name!r} in the comparison; rename one folder."
            )
        found[name] = Contestant(name=name, folder=folder, recipe=recipe_of(folder))
    return list(found.values())


def shared_tasks(rivals: Sequence[Contestant]) -> list[EvalSpec]:
    """The tasks of the contestants' own recipes, each once. Raises ConfigError for two different tasks of one name,
    and when there are none."""
    found: dict[str, EvalSpec] = {}
    for rival in rivals:
        for spec in rival.recipe.evaluate if rival.recipe is not None else ():
            if found.setdefault(spec.name, spec) != spec:
                raise ConfigError(
                    f"{rival.name} and another model have different tasks called {spec.name!r}, so their scores cannot "
                    "stand side by side: give --task and --data."
                )
    if not found:
        raise ConfigError("None of these models names a task of its own: give --task and --data.")
    return list(found.values())


def ask(
    rival: Contestant,
    model: Model,
    specs: Sequence[EvalSpec],
    out: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Score the contestant on every task it can do, into ``out/<task>``; a task of a stage only by its own recipe."""
    own = rival.recipe.evaluate if rival.recipe is not None else ()
    rival.specs = [
        spec
        for spec in specs
        if isinstance(model, make_task(spec, seed=seed, limit=1).needs)
        and _can(model, spec)
        and (spec.stage is None or spec in own)
    ]
    rival.results = score_model(
        model,
        rival.specs,
        out,
        model_hash=model_hash(rival.folder),
        seed=seed,
        limit=limit,
        progress=progress,
        run=rival.folder,
    )


def _can(model: Model, spec: EvalSpec) -> bool:
    """Has the model the abilities behind the task's methods? A bare LM has no eyes, and only Flamingo reads clips."""
    wanted = {"retrieval": "embed_images", "caption": "caption", "vqa": "answer", "conversation": "answer"}
    if wanted.get(spec.task, "answer") not in model.capabilities:
        return False
    images = open_source(spec.data)[0].images
    if any(isinstance(image, Video) for image in images):
        return model.kind == "flamingo"
    return model.kind != "lm" or not images


def measure(rival: Contestant, model: Model) -> None:
    """The contestant's cost on the first questions it was asked, and for those shown, where its first word looked."""
    answered = {r.task for r in rival.results if isinstance(r.scores, VqaScores)}
    spec = next((s for s in rival.specs if s.name in answered and s.stage is None), None)
    questions: list[Record] = []
    if spec is not None:
        source = open_source(spec.data)
        questions = [source[i] for i in range(min(16, len(source)))]
    rival.cost = cost_of(model, rival.folder, rival.recipe, questions)
    if "attend" in model.capabilities:
        shown = [without_answer(q) for q in questions[:SAMPLES] if q.images]
        for record, seen in zip(shown, model.attend(shown, max_new_tokens=8), strict=True):
            if seen.maps and seen.maps[0].shape[1]:
                picture = open_image(record.images[0].source)
                rival.looked[record.id] = png(overlay(picture, seen.maps[0][:, 0, 0].mean(0)))


def write_comparison(out: Path, rivals: Sequence[Contestant], *, title: str, summary: str, seed: int) -> Report:
    """``results.json``, ``scores.csv`` and ``scores.md`` below ``out``, and the page for :func:`write_report`."""
    results = Results(seed=seed)
    for rival in rivals:
        for result in rival.results:
            results.add(rival.label(result.task), result.scores)
        if rival.recipe is not None:
            results.seconds[rival.name] = round(seconds(rival.folder, rival.recipe), 1)
    results.write(out / "results.json")
    write_json(out / "costs.json", {r.name: r.cost.to_dict() for r in rivals if r.cost is not None})
    rows = score_rows(rivals)
    write_text(out / "scores.csv", _csv(rows))
    write_text(out / "scores.md", _markdown(rows))
    listings = [listing for listing in (differences(rivals, seed), costs(rivals)) if listing.rows]
    return Report(
        title=title,
        summary=summary,
        scores={r.label(x.task): x.scores for r in rivals for x in r.results if isinstance(x.scores, VqaScores)},
        retrieval=_retrieval(rivals),
        listings=listings,
        charts=[
            *_shots(rivals),
            *(
                Chart(title=f"{r.name}: loss by stage", series=loss_curves(r.folder, r.recipe))
                for r in rivals
                if r.recipe is not None and (r.folder / "stages").is_dir()
            ),
        ],
        samples=samples(rivals),
        training=[part for rival in rivals for part in trained_parts(rival)],
        seconds=results.seconds,
        facts={"seed": results.seed, **results.versions, **results.machine},
    )


def score_rows(rivals: Sequence[Contestant]) -> list[dict[str, Any]]:
    """One flat row per model, task and kind of question (``all`` for the whole), fractions."""
    rows: list[dict[str, Any]] = []
    for rival in rivals:
        for result in rival.results:
            place = {"model": rival.name, "task": result.task}
            if isinstance(result.scores, VqaScores):
                rows += [
                    place | _row(kind, s) for kind, s in [("all", result.scores.overall), *result.scores.kinds.items()]
                ]
            elif isinstance(result.scores, RetrievalScores):
                for way, recall in (
                    ("image_to_text", result.scores.image_to_text),
                    ("text_to_image", result.scores.text_to_image),
                ):
                    low, high = recall.intervals[1]
                    rows.append(
                        place
                        | {"kind": f"{way} R@1", "n": recall.n, "score": recall.recall[1], "low": low, "high": high}
                    )
    return rows


def _row(kind: str, score: Score) -> dict[str, Any]:
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


_COLUMNS = ("model", "task", "kind", "n", "score", "low", "high", "blind", "shuffled", "prior", "gain")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row.get(name) for name in _COLUMNS] for row in rows)
    return file.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The overall rows, in percent."""
    lines = ["| model | task | | n | score | 95 % | gain |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["kind"] != "all" and not row["kind"].endswith("R@1"):
            continue
        spread = f"{percent(row['low'])} to {percent(row['high'])}"
        cells = [row["model"], row["task"], row["kind"], str(row["n"]), percent(row["score"]), spread]
        lines.append("| " + " | ".join([*cells, percent(row.get("gain"))]) + " |")
    return "\n".join(lines) + "\n"


def differences(rivals: Sequence[Contestant], seed: int) -> Listing:
    """Every pair of contestants on every task both did: the second's score less the first's, on the same items."""
    rows = []
    for one, other in combinations(rivals, 2):
        theirs = {r.task: r for r in other.results}
        for result in one.results:
            if result.task not in theirs or not isinstance(result.scores, VqaScores):
                continue
            try:
                found = paired(result.folder, theirs[result.task].folder, seed=seed, draws=2000)[0]
            except (ConfigError, DataError):
                continue  # a score that has no pairs
            low, high = found.interval
            spread = f"{percent(low, signed=True)} to {percent(high, signed=True)}"
            rows.append((f"{other.name} − {one.name}", result.task, percent(found.difference, signed=True), spread))
    return Listing(
        heading="Who is better",
        caption="Differences of accuracy on the same questions, in points, with paired 95 % bootstrap intervals.",
        head=("difference", "task", "points", "95 %"),
        rows=rows,
        numeric=2,
    )


def costs(rivals: Sequence[Contestant]) -> Listing:
    """What every contestant costs; training budgets are their own and usually differ."""
    rows = []
    for rival in rivals:
        cost = rival.cost
        if cost is None:
            continue
        speeds = cost.throughput or {}
        rows.append(
            (
                rival.name,
                f"{cost.parameters:,}",
                _told(cost.trained, ","),
                _told(cost.visual_tokens, ","),
                _told(cost.training_flops, ".2e"),
                _told(cost.training_seconds, ",.0f", " s"),
                _told(cost.flops_answer, ".2e"),
                _told(cost.latency and 1000 * cost.latency, ".0f", " ms"),
                " / ".join(f"{speeds[size]:.0f}" for size in speeds) or "–",
                _told(cost.memory and cost.memory / 2**20, ",.0f", " MiB"),
            )
        )
    return Listing(
        heading="What they cost",
        caption="Operations count matrix products and convolutions, two per multiplication and addition; of training, "
        "one measured step of every stage times its steps. Each model has the budget of its own recipe: they are not "
        "equal. Answers a second at batch sizes 1, 7 and 64; memory while answering, above the weights.",
        head=(
            "model",
            "parameters",
            "trained",
            "visual tokens",
            "FLOPs of training",
            "time",
            "FLOPs of an answer",
            "latency",
            "answers/s",
            "memory",
        ),
        rows=rows,
        numeric=1,
    )


def _told(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


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
    """One chart per task asked with several numbers of shots, a line per contestant."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for rival in rivals:
        for result in rival.results:
            base, sep, count = result.task.removesuffix("-shots").rpartition("-")
            if result.task.endswith("-shots") and sep and count.isdigit() and isinstance(result.scores, VqaScores):
                point = (float(count), result.scores.overall.accuracy)
                lines.setdefault(base, {}).setdefault(rival.name, []).append(point)
    return [
        Chart(
            title=f"{base}: score over shots",
            series={name: sorted(points) for name, points in series.items()},
            x_label="shots",
            y_label="score",
        )
        for base, series in lines.items()
    ]


def samples(rivals: Sequence[Contestant]) -> list[SamplePicture]:
    """The first questions about pictures, with what every model that was asked the same says."""
    asked = [(r, x, {row["id"]: row for row in x.rows}) for r in rivals for x in r.results if x.task == "vqa"]
    if not asked:
        return []
    looked = {r.name: r.looked for r in rivals}
    rival, first, _ = asked[0]
    records = open_source(next(s for s in rival.specs if s.name == first.task).data)
    found = []
    for row, index in zip(first.rows[:SAMPLES], range(len(records)), strict=False):
        if not records[index].images:
            continue
        said = {r.name: rows[row["id"]] for r, _, rows in asked if row["id"] in rows}
        found.append(
            SamplePicture(
                png=png(open_image(records[index].images[0].source)),
                question=row["question"],
                truth=row["truth"][0],
                answers={
                    n: Answer(text=own["answer"], right=bool(own["correct"]), looked=looked[n].get(row["id"]))
                    for n, own in said.items()
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
        table = read_json(rival.folder / "stages" / stage.name / "trained" / "stage.json")["table"]
        parts += [
            TrainedPart(
                model=rival.name,
                stage=stage.name,
                part=row["part"],
                parameters=row["parameters"],
                trained=row["trained"],
                rate=max(row["rates"], default=None),
            )
            for row in table["rows"]
        ]
    return parts
