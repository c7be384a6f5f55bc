"""``isthmus eval``: score a model on its recipe's tasks or on data of the user's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from isthmus.errors import ConfigError


def run(
    model: str,
    *,
    task: str | None,
    data: str | None,
    options: Sequence[str],
    train: str | None,
    limit: int | None,
    out: Path | None,
    seed: int,
    json_file: Path | None,
) -> None:
    """Print a table per task; outputs, manifest and scores go into ``out``."""
    from isthmus.model import load
    from isthmus.recipes.schema import EvalSpec
    from isthmus.recipes.scoring import model_hash, own_tasks, score_model
    from isthmus.recipes.tables import score_table

    folder = Path(model)
    loaded = load(folder)
    source, own = _split(options)
    if data is None:
        specs = [s for s in own_tasks(folder) if task in (None, s.task, s.name)]
        if not specs:
            raise ConfigError(f"{folder} names no {task or ''} task of its own: give --task and --data.")
    else:
        kind = task or ("retrieval" if loaded.kind == "clip" else "vqa")
        specs = [
            EvalSpec(
                name=kind,
                task=kind,
                data=_source(data) | source,
                train=_source(train) | source if train else None,
                options=own,
            )
        ]
    place = out if out is not None else folder / "eval" / (Path(data).stem if data else "own")
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), transient=True) as bar:
        shown: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bar.add_task(name, total=total)
            bar.update(shown[name], completed=done)

        results = score_model(
            loaded, specs, place, model_hash=model_hash(folder), seed=seed, limit=limit, progress=progress
        )
    console = Console()
    for result in results:
        console.print(score_table(result.task, result.scores.to_dict()))
    console.print(f"Raw outputs, manifest and scores: [bold]{place}[/]")
    if json_file is not None:
        facts = {r.task: r.scores.to_dict() for r in results}
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _source(data: str) -> dict[str, Any]:
    """A YAML file describes a source; anything else is data whose kind is seen from its content."""
    path = Path(data)
    if path.suffix in {".yaml", ".yml"}:
        from isthmus.recipes.schema import read_yaml

        tree = read_yaml(path)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} should describe a source by keys, such as `source: llava`.")
        return tree
    from isthmus.data.sources.guess import guess

    return guess(path)


def _split(options: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``key=value`` of the source, and ``task.key=value`` of the task."""
    source: dict[str, Any] = {}
    task: dict[str, Any] = {}
    from isthmus.recipes.schema import yaml_value

    for option in options:
        key, sep, value = option.partition("=")
        if not sep:
            raise ConfigError(f"--set {option!r} is not key=value.")
        target, name = (task, key.removeprefix("task.")) if key.startswith("task.") else (source, key)
        target[name] = yaml_value(value, f"--set {option!r}")
    return source, task
