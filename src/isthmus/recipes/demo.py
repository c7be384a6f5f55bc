"""The whole story in one command: CLIP, a language model, Flamingo, BLIP-2, LLaVA; then scores, a report, a chat.

Each model is an ordinary recipe run in a folder of its own, so an interrupted demo goes on where it stopped, and
``isthmus train clip-tiny`` does exactly what the demo does.
"""

import sys
import webbrowser
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from isthmus.checkpoint import read_json
from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.evaluation.report import Answer, Chart, Report, SamplePicture, TrainedPart, write_report
from isthmus.evaluation.rerank import RerankScores
from isthmus.evaluation.results import Results
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.run import Result
from isthmus.evaluation.vqa import VqaScores
from isthmus.model import Model
from isthmus.recipes.curves import loss_curves, png, seconds
from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe, read_recipe
from isthmus.recipes.scoring import model_hash, score_model

STORY = {
    "clip": "clip-tiny",
    "lm": "lm-tiny",
    "flamingo": "flamingo-tiny",
    "blip2": "blip2-tiny",
    "llava": "llava-tiny",
}
SAMPLES = 12
"""Pictures shown in the report."""
OWN = ("retrieval", "readings", "vqa")
"""Tasks whose scores stand under the model's bare name; others add theirs (``flamingo-clips``)."""

_SUMMARY = (
    "Small pictures of coloured solids, drawn from a seed. CLIP learns to match pictures with captions, a language "
    "model learns to read, and three systems join the same two in their own ways: Flamingo with gated cross-attention "
    "in the frozen language model, BLIP-2 with a Q-Former before it, LLaVA with a projector and an opened language "
    "model. Their budgets differ, see the times. Every test picture holds a combination of shape and colour that no "
    "training picture had."
)


def run_demo(out: Path, *, seed: int = 0, serve: bool = True) -> None:
    """Train, score and show everything; ``serve`` opens the report in a browser when a person is watching."""
    console = Console()
    results = Results(seed=seed)
    recipes: dict[str, Recipe] = {}
    scored: list[tuple[str, Result]] = []
    for name, recipe_name in STORY.items():
        console.rule(f"[bold]{name}[/] ({recipe_name})")
        recipe = recipes[name] = demo_recipe(recipe_name, out, seed)
        model = train(recipe, out / name)
        results.seconds[name] = round(seconds(out / name, recipe), 1)
        for result in _score(model, recipe, out / name, seed):
            scored.append((name, result))
            results.add(label(name, result.task), result.scores)
    results.write(out / "results.json")
    write_report(out / "report.html", make_report(out, recipes, results, scored))
    _tell(console, out, recipes["llava"], scored)
    if serve and sys.stdout.isatty():
        webbrowser.open((out / "report.html").resolve().as_uri())


def demo_recipe(name: str, out: Path, seed: int) -> Recipe:
    """The shipped recipe with its parts taken from this demo's folder."""
    recipe = read_recipe(name, [f"seed={seed}"])
    parts = {part: str(out / Path(folder).name) for part, folder in recipe.parts.items()}
    return recipe.model_copy(update={"parts": parts})


def make_report(out: Path, recipes: dict[str, Recipe], results: Results, scored: list[tuple[str, Result]]) -> Report:
    """Scores, curves, samples, tables of trained parts and facts, gathered from the run folders below ``out``."""
    return Report(
        title="isthmus: from pictures and words to answers",
        summary=_SUMMARY,
        scores={label(n, r.task): r.scores for n, r in scored if isinstance(r.scores, VqaScores)},
        retrieval=_retrieval(scored),
        charts=[
            Chart(title=f"{name}: loss by stage", series=loss_curves(out / name, recipe))
            for name, recipe in recipes.items()
        ],
        samples=samples(recipes, scored),
        training=[part for name, recipe in recipes.items() for part in _trained(out, name, recipe)],
        seconds=results.seconds,
        facts={"seed": results.seed, **results.versions, **results.machine},
    )


def label(model: str, task: str) -> str:
    """The name of a task's scores."""
    return model if task in OWN else f"{model}-{task}"


def _retrieval(scored: list[tuple[str, Result]]) -> dict[str, RetrievalScores]:
    """Recall by model; for two steps also that of the first alone."""
    found: dict[str, RetrievalScores] = {}
    for name, result in scored:
        if isinstance(result.scores, RerankScores):
            found[f"{name}, first step"] = result.scores.first
        if isinstance(result.scores, RetrievalScores):
            found[name] = result.scores
    return found


def samples(recipes: dict[str, Recipe], scored: list[tuple[str, Result]]) -> list[SamplePicture]:
    """The first questions about pictures, with what every model that was asked the same says."""
    asked = [(n, r, {row["id"]: row for row in r.rows}) for n, r in scored if r.task == "vqa"]
    if not asked:
        return []
    name, first, _ = asked[0]
    records = open_source(next(s for s in recipes[name].evaluate if s.name == first.task).data)
    found = []
    for row, index in zip(first.rows[:SAMPLES], range(len(records)), strict=False):
        said = {n: rows[row["id"]] for n, _, rows in asked if row["id"] in rows}
        found.append(
            SamplePicture(
                png=png(open_image(records[index].images[0].source)),
                question=row["question"],
                truth=row["truth"][0],
                answers={n: Answer(text=own["answer"], right=bool(own["correct"])) for n, own in said.items()},
                kind=row["kind"],
            )
        )
    return found


def _score(model: Model, recipe: Recipe, folder: Path, seed: int) -> list[Result]:
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(f"scoring {task}", total=total)
            bar.update(tasks[task], completed=done)

        return score_model(
            model, recipe.evaluate, folder / "eval", model_hash=model_hash(folder), seed=seed, progress=progress
        )


def _trained(out: Path, name: str, recipe: Recipe) -> list[TrainedPart]:
    parts = []
    for stage in recipe.stages:
        table = read_json(out / name / "stages" / stage.name / "trained" / "stage.json")["table"]
        parts += [
            TrainedPart(
                model=name,
                stage=stage.name,
                part=row["part"],
                parameters=row["parameters"],
                trained=row["trained"],
                rate=max(row["rates"], default=None),
            )
            for row in table["rows"]
        ]
    return parts


def _tell(console: Console, out: Path, llava: Recipe, scored: list[tuple[str, Result]]) -> None:
    """The score tables, where everything is, and the command that chats with the model about a test picture."""
    from isthmus.recipes.tables import score_table

    for name, result in scored:
        console.print(score_table(f"{label(name, result.task)}: {result.task}", result.scores.to_dict()))
    picture = out / "picture.png"
    record = open_source(llava.evaluate[0].data)[0]
    picture.write_bytes(png(open_image(record.images[0].source)))
    question = next(p.text for p in record.texts if p.role == "user")
    console.print(f"Scores: [bold]{out / 'results.json'}[/]   report: [bold]{out / 'report.html'}[/]")
    console.print("Ask the model yourself:", style="bold")
    console.print(f'isthmus chat {out / "llava"} --image {picture} "{question}"', soft_wrap=True, highlight=False)
