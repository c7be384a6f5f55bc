"""``isthmus compare``: models side by side on the same tasks, in one report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from isthmus.cli.evaluate import counted, source_of, split_options
from isthmus.errors import ConfigError

_SUMMARY = (
    "The same questions, asked of every model that can answer them, scored by the same rules. Each model was trained "
    "by its own recipe: see what it cost before saying which is better."
)


def run(
    models: Sequence[str],
    *,
    task: str | None,
    data: str | None,
    options: Sequence[str],
    train: str | None,
    shots: str | None,
    select: str,
    limit: int | None,
    out: Path,
    seed: int,
    json_file: Path | None,
) -> None:
    """Score and measure one model after the other; print the tables and write everything below ``out``."""
    from isthmus.evaluation.report import write_report
    from isthmus.model import load
    from isthmus.recipes.compare import ask, contestants, measure, shared_tasks
    from isthmus.recipes.schema import EvalSpec
    from isthmus.recipes.scoring import with_shots
    from isthmus.recipes.side_by_side import write_comparison

    if len(models) < 2:
        raise ConfigError("A comparison needs at least two models; `isthmus eval MODEL` scores one.")
    rivals = contestants(models)
    source, own = split_options(options)
    if data is not None:
        kind = task or "vqa"
        specs = [
            EvalSpec(
                name=kind,
                task=kind,
                data=source_of(data) | source,
                train=source_of(train) | source if train else None,
                options=own,
            )
        ]
    else:
        specs = [s for s in shared_tasks(rivals) if task in (None, s.task, s.name)]
        if not specs:
            raise ConfigError(f"None of these models names a task {task!r} of its own: give --data.")
    specs = with_shots(specs, counted(shots, ()), select)
    console = Console()
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), transient=True) as bar:
        shown: dict[tuple[str, str], Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            place = (rival.name, name)
            if place not in shown:
                shown[place] = bar.add_task(f"{rival.name}: {name}", total=total)
            bar.update(shown[place], completed=done)

        for rival in rivals:
            model = load(rival.folder)
            ask(rival, model, specs, out / "scores" / rival.name, seed=seed, limit=limit, progress=progress)
            measure(rival, model, out / "scores" / rival.name)
    if not any(rival.results for rival in rivals):
        raise ConfigError("None of these models can do the tasks asked of them.")
    report = write_comparison(out, rivals, title=" · ".join(r.name for r in rivals), summary=_SUMMARY, seed=seed)
    write_report(out / "report.html", report)
    tell(console, out)
    if json_file is not None:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        costs = json.loads((out / "costs.json").read_text(encoding="utf-8"))
        json_file.write_text(json.dumps(results | {"costs": costs}, indent=2) + "\n", encoding="utf-8")


def tell(console: Console, out: Path) -> None:
    """The overall scores, and where everything is."""
    from rich.markdown import Markdown

    console.print(Markdown((out / "scores.md").read_text(encoding="utf-8")))
    console.print(
        f"Report: [bold]{out / 'report.html'}[/]   scores: {out / 'scores.csv'}, {out / 'scores.md'}, "
        f"{out / 'results.json'}",
        soft_wrap=True,
    )
