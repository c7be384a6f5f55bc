"""The full story in one command: CLIP, a language model, Flamingo, BLIP-2, LLaVA; then scores, a report, a chat.

Each model is an ordinary recipe run in a folder of its own, so an interrupted demo goes on where it stopped, and
``isthmus train clip-tiny`` does exactly what the demo does. On several cores trainings run side by side.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID, TimeRemainingColumn

from isthmus.checkpoint import write_folder
from isthmus.comparison.compare import Contestant, measure
from isthmus.comparison.curves import png
from isthmus.comparison.report import write_report
from isthmus.comparison.side_by_side import write_comparison
from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.demo.jobs import Job, Scoring, Training, run_jobs
from isthmus.errors import ConfigError
from isthmus.interop.hub import model_hash
from isthmus.model import Model
from isthmus.opening import load
from isthmus.processes import usable_cores
from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe, read_recipe
from isthmus.recipes.scoring import Progress as Scored
from isthmus.recipes.scoring import score_model

STORY = {
    "clip": "clip-tiny",
    "lm": "lm-tiny",
    "flamingo": "flamingo-tiny",
    "blip2": "blip2-tiny",
    "llava": "llava-tiny",
}
_ALSO = {"blip2-represent": "blip2/stages/represent"}
"""What the page serves too: BLIP-2's first stage, which matches pictures with texts and searches."""
_PICTURES, _SEARCHED = "pictures", 200
"""The folder that the page searches, and how many test scenes are in it."""
_AT_ONCE = 3
"""As many of the models can be trained at the same time. Three that share two cores leave none idle at the end."""
_TITLE = "isthmus: from pictures and words to answers"
_SUMMARY = (
    "Small pictures of coloured solids, drawn from a seed. CLIP learns to match pictures with captions, a language "
    "model learns to read, and three systems join the same two in their own ways: Flamingo with gated cross-attention "
    "in the frozen language model, BLIP-2 with a Q-Former before it, LLaVA with a projector and an opened language "
    "model. Their budgets differ, see the times. Every test picture holds a combination of shape and colour that no "
    "training picture had."
)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    jobs: int | None = None,
    budget: float = 1.0,
    page: str = "",
    beside: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train, score and report everything; the last line is the command that serves the browser page over it.

    ``jobs`` at a time share the cores (left out: three, or on a single core one); 1 does everything in this process.
    ``budget``: the share of the recipes' steps that is trained; 0.3 takes a third of the time, and less is learnt.
    Results and report are written as soon as the first model is scored, and anew with each further one. ``page`` is the
    browser page's address, for the report; ``beside`` is open while the models are trained side by side. Raises
    ConfigError for a number of jobs or a budget that cannot be, or for a folder whose demo has another budget.
    """
    console = Console()
    cores = usable_cores()
    jobs = (_AT_ONCE if cores > 1 else 1) if jobs is None else jobs
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {jobs}.")
    if not 0 < budget <= 100:
        raise ConfigError(f"--budget is a share of the recipes' steps, above 0 and at most 100, not {budget}.")
    rivals: dict[str, Contestant] = {}
    recipes = {name: demo_recipe(shipped, out, seed, budget) for name, shipped in STORY.items()}
    story = _jobs(recipes, out, budget)

    def gather() -> None:
        done = [job.folder for job in story if isinstance(job, Scoring) and job.finished]
        rivals.update({f.name: _scored(f, load(f), recipes[f.name]) for f in done if f.name not in rivals})

    def write() -> None:
        _write(out, rivals, seed, budget, page)

    def ended(job: Job) -> None:
        if isinstance(job, Scoring):
            gather()
            write()

    if jobs > 1:
        console.rule(f"[bold]training[/] ({jobs} at a time, {max(1, cores // jobs)} threads each)")
        with beside():
            run_jobs(story, at_once=jobs, threads=max(1, cores // jobs), ended=ended)
    gather()
    for name, recipe in recipes.items():
        console.rule(f"[bold]{name}[/] ({STORY[name]})")
        model = train(recipe, out / name)
        if name not in rivals:
            with _bar() as progress:
                rivals[name] = _scored(out / name, model, recipe, progress)
            write()
        # Not before: what an answer costs is measured on a machine that does nothing else.
        measure(rivals[name], model, out / name / "eval")
    searched(out)
    write()
    _summarise(console, out, rivals)


def served(out: Path) -> list[str]:
    """The finished models, in the order in which the browser page offers them: the last of the story first."""
    also = [f"{name}={out / place}" for name, place in _ALSO.items() if (out / place / "model").is_dir()]
    return [*(str(out / name) for name in reversed(STORY)), *also]


def searched(out: Path) -> Path:
    """The folder that the page searches: scenes of the test split, drawn unless they are there."""
    folder = out / _PICTURES
    if not folder.is_dir():
        scenes = open_source({"kind": "scenes", "form": "describe", "split": "test", "count": _SEARCHED})
        drawn = (png(open_image(scenes[number].images[0].source)) for number in range(_SEARCHED))
        write_folder(folder, {f"scene{number}.png": picture for number, picture in enumerate(drawn)})
    return folder


def page_command(out: Path) -> str:
    """What serves the page over the finished models."""
    return f"isthmus serve {' '.join(served(out))} --pictures {out / _PICTURES}"


def _write(out: Path, rivals: Mapping[str, Contestant], seed: int, budget: float, page: str) -> None:
    """``results.json`` and ``report.html`` of the models that are scored."""
    missing = [name for name in STORY if name not in rivals]
    so_far = f" Not yet scored: {', '.join(missing)}." if missing else ""
    so_far += f" Trained for {budget:g} times the recipes' steps." if budget != 1 else ""
    ordered = [rivals[name] for name in STORY if name in rivals]
    report = write_comparison(out, ordered, title=_TITLE, summary=_SUMMARY + so_far, seed=seed)
    if not missing:
        report = replace(report, command=("Ask them yourself, side by side in a browser:", page_command(out)))
    if page and not missing:
        names = ",".join(name for name in ("llava", "blip2", "flamingo") if name in rivals)
        report = replace(report, link=(f"{page}#models={names}", "The page, while that command runs"))
    write_report(out / "report.html", report)


def _jobs(recipes: Mapping[str, Recipe], out: Path, budget: float) -> list[Job]:
    """The arguments of `isthmus train` and `isthmus eval` for each model: the demo's own recipes, its folder's
    parts."""
    jobs: list[Job] = []
    for name, recipe in recipes.items():
        seed = f"{recipe.seed}"
        words = ["train", STORY[name], f"seed={seed}", *_share(STORY[name], budget)]
        words += [f"parts.{part}={place}" for part, place in recipe.parts.items()]
        needs = [Path(place).name for place in recipe.parts.values()]
        place = out / name
        jobs.append(Training(name=name, words=[*words, "--out", str(place)], folder=place, recipe=recipe, needs=needs))
        words = ["eval", str(place), "--seed", seed, "--out", str(place / "eval")]
        if tasks := [spec.name for spec in recipe.evaluate]:
            jobs.append(Scoring(name=f"scoring {name}", words=words, folder=place, tasks=tasks, needs=[name]))
    return jobs


def demo_recipe(name: str, out: Path, seed: int, budget: float = 1.0) -> Recipe:
    """The shipped recipe with its parts taken from this demo's folder, and ``budget`` times its steps."""
    recipe = read_recipe(name, [f"seed={seed}", *_share(name, budget)])
    parts = {part: str(out / Path(folder).name) for part, folder in recipe.parts.items()}
    return recipe.model_copy(update={"parts": parts})


def _share(name: str, budget: float) -> list[str]:
    """Overrides that give each stage of the shipped recipe ``budget`` times its steps and warm-up."""
    if budget == 1:
        return []
    stages = [(spec.name, spec.stage) for spec in read_recipe(name).stages]
    steps = [f"stages.{name}.steps={max(2, round(budget * (stage.steps or 0)))}" for name, stage in stages]
    return [*steps, *(f"stages.{name}.warmup={round(budget * stage.warmup)}" for name, stage in stages)]


def _scored(folder: Path, model: Model, recipe: Recipe, progress: Scored | None = None) -> Contestant:
    """The model with what it scored; what is in its folder already is not scored again."""
    rival = Contestant(name=folder.name, folder=folder, recipe=recipe, specs=recipe.evaluate)
    own = model_hash(folder)
    rival.results = score_model(
        model, rival.specs, folder / "eval", model_hash=own, seed=recipe.seed, progress=progress
    )
    return rival


@contextmanager
def _bar() -> Iterator[Scored]:
    """A bar for each task that is being scored."""
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(f"scoring {task}", total=total)
            bar.update(tasks[task], completed=done)

        yield progress


def _summarise(console: Console, out: Path, rivals: Mapping[str, Contestant]) -> None:
    """The score tables, where everything is, and the command that chats with the model about a test picture."""
    from isthmus.recipes.tables import score_table

    for rival in rivals.values():
        for result in rival.results:
            console.print(score_table(f"{rival.label(result.task)}: {result.task}", result.scores.to_dict()))
    picture = out / "picture.png"
    record = open_source(rivals["llava"].specs[0].data)[0]
    picture.write_bytes(png(open_image(record.images[0].source)))
    question = next(p.text for p in record.texts if p.role == "user")
    place = escape(str(out))
    console.print(f"Scores: [bold]{place}/results.json[/]   report: [bold]{place}/report.html[/]")
    console.print("Ask the model yourself:", style="bold")
    console.print(
        f'isthmus chat {out / "llava"} --image {picture} "{question}"', soft_wrap=True, highlight=False, markup=False
    )
    console.print("In a browser, side by side, and what each model attends to:", style="bold")
    console.print(page_command(out), soft_wrap=True, highlight=False, markup=False)
