"""``isthmus compare``: models side by side on the same tasks, or a comparison recipe that trains them first."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from isthmus.cli.evaluate import bars, check_used, counted, shown_examples, spec_of
from isthmus.cli.options import Loading
from isthmus.errors import ConfigError

_SUMMARY = (
    "The same questions for every model that can answer them, scored by the same rules. Each model was trained "
    "by its own recipe: see what it cost before saying which is better."
)


def run(
    models: Sequence[str],
    *,
    json_file: Path | None,
    given: Loading,
    task: str | None = None,
    data: str | None = None,
    options: Sequence[str] = (),
    train: str | None = None,
    shots: str | None = None,
    select: str | None = None,
    limit: int | None = None,
    out: Path = Path("runs/compare"),
    seed: int = 0,
) -> None:
    """Score and measure one model after the other; print the tables and write everything below ``out``. ``given``:
    further arguments of :func:`isthmus.load`."""
    from isthmus.comparison.compare import contestants, measure, score_contestant, shared_tasks
    from isthmus.comparison.report import write_report
    from isthmus.comparison.side_by_side import write_comparison
    from isthmus.opening import load
    from isthmus.recipes.schema import shipped

    numbers = [name for name in models if shots is not None and name.isdigit() and not Path(name).exists()]
    models = [name for name in models if name not in numbers]  # --shots 0 4 8: those after the first one
    if len(models) < 2:
        recipe = f" A comparison recipe is a .yaml file or shipped: {', '.join(shipped('comparisons'))}."
        raise ConfigError("A comparison needs at least two models; `isthmus eval MODEL` scores one." + recipe)
    counts = counted(shots, [int(n) for n in numbers])
    check_used(counts, data=data, options=options, train=train, select=select)
    rivals = [replace(r, dtype=given.get("dtype", "")) for r in contestants(models, given.get("code", ()))]
    if data is not None:
        specs = [spec_of(task or "vqa", data, train, options)]
    else:
        specs = [s for s in shared_tasks(rivals) if task in (None, s.task, s.name)]
        if not specs:
            raise ConfigError(f"None of these models names a task {task!r} of its own: give --data.")
    specs = shown_examples(specs, counts, select)
    console = Console(emoji=False)
    with bars(console) as progress:
        for rival in rivals:
            model = load(rival.folder, **given)
            score_contestant(
                rival,
                model,
                specs,
                out / "scores" / rival.name,
                seed=seed,
                limit=limit,
                progress=lambda name, done, total, who=rival.name: progress(f"{who}: {name}", done, total),
                code=given.get("code", ()),
            )
            if not rival.results:
                console.print(f"{rival.name} can do none of the tasks and is left out.", markup=False, highlight=False)
            measure(rival, model, out / "scores" / rival.name)
    if not any(rival.results for rival in rivals):
        raise ConfigError("None of these models can do any of the tasks.")
    report = write_comparison(out, rivals, title=" · ".join(r.name for r in rivals), summary=_SUMMARY, seed=seed)
    write_report(out / "report.html", report)
    show_scores(console, out)
    if json_file is not None:
        _write_facts(json_file, out)


def is_recipe(name: str) -> bool:
    """Does the first argument name a comparison recipe rather than a model?"""
    from isthmus.recipes.schema import shipped

    return Path(name).suffix in {".yaml", ".yml"} or (name in shipped("comparisons") and not Path(name).exists())


def no_arms(arms: Sequence[str] | None) -> None:
    """Raises ConfigError when --arm is given with models."""
    if arms:
        raise ConfigError("--arm chooses among the arms of a comparison recipe; leave models out that should not run.")


def run_recipe(
    name: str,
    overrides: Sequence[str],
    *,
    arms: Sequence[str],
    out: Path | None,
    given: Sequence[str],
    json_file: Path | None,
) -> None:
    """Train, score and measure the arms of a comparison recipe; what is finished is kept and not done again."""
    from isthmus.comparison.contest import run_contest
    from isthmus.comparison.recipe import parse_comparison
    from isthmus.recipes.schema import read_tree

    if given:
        raise ConfigError(f"{given[0]} is for models; a comparison recipe says it itself (override it by key=value).")
    tree = read_tree(name, overrides)
    if tree.get("kind") != "compare":
        raise ConfigError(
            f"{name} is a recipe for one model: `isthmus train {name}`. A comparison has `kind: compare`."
        )
    plan = parse_comparison(tree, where=name)
    folder = out if out is not None else Path("runs") / Path(name).stem
    console = Console(emoji=False)

    def progress(who: str, task: str, done: int, total: int) -> None:
        if done == total:
            console.print(f"{who}: {task} scored ({total:,} questions)", highlight=False, markup=False)

    run_contest(plan, folder, name=Path(name).stem, arms=arms, progress=progress)
    show_scores(console, folder)
    if json_file is not None:
        _write_facts(json_file, folder)


def show_scores(console: Console, out: Path) -> None:
    """The overall scores, and where everything is."""
    from rich.markdown import Markdown

    overall, *_ = (out / "scores.md").read_text(encoding="utf-8").partition("\n\n")  # kinds stand in the file
    console.print(Markdown(overall))
    place = escape(str(out))
    console.print(
        f"Report: [bold]{place}/report.html[/]   scores: {place}/scores.csv, {place}/scores.md, {place}/results.json",
        soft_wrap=True,
    )


def _write_facts(file: Path, out: Path) -> None:
    """results.json with the costs beside."""
    results, costs = (json.loads((out / f"{n}.json").read_text(encoding="utf-8")) for n in ("results", "costs"))
    file.write_text(json.dumps(results | {"costs": costs}, indent=2) + "\n", encoding="utf-8")
