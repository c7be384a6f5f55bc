"""The model card of a converted model: what it is, how it was trained, what it scored, what it lost on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import yaml
from torch import nn

from isthmus.checkpoint import read_json
from isthmus.interop.export import AnySource, Export
from isthmus.version import __version__


class _Group(TypedDict):
    pattern: str


class _Stage(TypedDict):
    name: str
    steps: NotRequired[int | None]
    samples: NotRequired[int | None]
    train: NotRequired[Sequence[_Group]]


class _Entry(TypedDict):
    """Of ``stages``: what is trained under ``stage``, in older recipes beside ``data``."""

    stage: NotRequired[_Stage]
    data: NotRequired[Sequence[Mapping[str, object]]]


class _Recipe(TypedDict, total=False):
    about: str
    stages: Sequence[_Entry]


def card(model: AnySource, export: Export, to: str, origin: Path | None) -> str:
    """README.md. ``origin`` is where the model was opened: its recipe and scores are included where it has them."""
    head = {"library_name": "transformers" if to == "hf" else "isthmus", "pipeline_tag": model.system.pipeline}
    lines = [
        "---",
        yaml.safe_dump(head | {"tags": ["isthmus", model.kind]}, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {model.system.title}, in the format `{to}`",
        "",
        f"Written by isthmus {__version__} (`isthmus convert --to {to}`). Open it with",
        "",
        f"    {export.opens}",
        "",
        "| part | parameters |",
        "|---|---:|",
        *(f"| {part} | {count:,} |" for part, count in _parts(model.net).items()),
        "",
        f"Text template: `{getattr(model.processor, 'template', getattr(model.processor, 'kind', '-'))}`.",
    ]
    if model.prompts:
        lines += ["", *(f"Prompt of the task {task}: `{words}`" for task, words in model.prompts.items())]
    if export.losses:
        lines += ["", "Not in this format:", "", *(f"- {loss}" for loss in export.losses)]
    if export.notes:
        lines += ["", "Another in this format:", "", *(f"- {note}" for note in export.notes)]
    if origin is not None:
        lines += _training(origin) + _scores(origin)
    return "\n".join(lines) + "\n"


def _parts(net: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in net.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _training(origin: Path) -> list[str]:
    """The stages of the recipe that lies in a run or model folder."""
    file = next((f for f in (origin / "model" / "recipe.yaml", origin / "recipe.yaml") if f.is_file()), None)
    if file is None:
        return []
    recipe: _Recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    lines = ["", "## Training", "", *([str(about), ""] if (about := recipe.get("about")) else [])]
    lines += ["| stage | budget | trained | data |", "|---|---|---|---|"]
    for entry in recipe.get("stages", ()):
        stage = cast(_Stage, entry.get("stage", entry))
        steps = stage.get("steps")
        budget = f"{steps:,} steps" if steps else f"{stage.get('samples') or 0:,} samples"
        patterns = ", ".join(f"`{group['pattern']}`" for group in stage.get("train", ()))
        lines.append(f"| {stage['name']} | {budget} | {patterns} | {_data(entry.get('data', ()))} |")
    return lines


def _data(sources: Sequence[Mapping[str, object]]) -> str:
    """Kinds of sources with what is not a path on somebody's disk."""
    data = []
    for source in sources:
        facts = [f"{k} {v}" for k, v in source.items() if k in ("form", "split", "count", "weight") and v is not None]
        data.append(" ".join([str(source.get("kind", "data")), *facts]))
    return "; ".join(data)


def _scores(origin: Path) -> list[str]:
    rows = []
    run = origin.parent if origin.name == "model" else origin
    for file in sorted(run.glob("eval/*/scores.json")):
        scores = read_json(file)
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, int | float))
        rows.append(f"| {scores.get('task', file.parent.name)} | {numbers} |")
    return ["", "## Scores", "", "| task | scores (fractions) |", "|---|---|", *rows] if rows else []
