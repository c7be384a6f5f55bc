"""What a finished run folder can show: its losses over steps, its seconds, a picture as PNG bytes."""

import json
from io import BytesIO
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.recipes.schema import Recipe

Points = list[tuple[float, float]]
_DARK = 45
"""Grey level of no attention, of 255."""


class MetricsLine(TypedDict):
    """What is read of a line of ``metrics.jsonl``; it holds more."""

    step: int
    loss: dict[str, float]
    seconds: float


class PartLine(TypedDict):
    """A part of the model in a stage's table: its numbers, those that were trained, and at which rates."""

    part: str
    parameters: int
    trained: int
    rates: list[float]


def metrics(folder: Path, stage: str) -> list[MetricsLine]:
    """The lines of a stage's ``metrics.jsonl``."""
    file = folder / "stages" / stage / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def part_lines(folder: Path, stage: str) -> list[PartLine]:
    """The table of a finished stage."""
    return read_json(folder / "stages" / stage / "trained" / "stage.json")["table"]["rows"]


def loss_curves(folder: Path, recipe: Recipe) -> dict[str, Points]:
    """Stage (and term, where there are several) -> (step, loss) points; steps are counted over the stages."""
    curves: dict[str, Points] = {}
    before = 0
    for stage in recipe.stages:
        lines = [line for line in metrics(folder, stage.name) if line["loss"]]
        terms = sorted({term for line in lines for term in line["loss"]})
        for term in terms:
            name = stage.name if len(terms) == 1 else f"{stage.name} {term}"
            curves[name] = [(before + line["step"], line["loss"][term]) for line in lines if term in line["loss"]]
        before += lines[-1]["step"] if lines else 0
    return curves


def seconds(folder: Path, recipe: Recipe) -> float:
    """Seconds spent in the steps of all stages, over all resumes."""
    return sum(lines[-1]["seconds"] for stage in recipe.stages if (lines := metrics(folder, stage.name)))


def overlay(picture: PilImage.Image, heat: Tensor) -> PilImage.Image:
    """The picture, bright where a map (rows, columns) is high, dark where it is low; the highest counts as 1."""
    share = (heat / heat.max().clamp(min=1e-12) * 255).round().to(torch.uint8).cpu().numpy()
    mask = PilImage.fromarray(share, "L").resize(picture.size, PilImage.Resampling.BILINEAR)
    dark = picture.point([level * _DARK // 255 for level in range(256)] * 3)
    return PilImage.composite(picture, dark, mask)


def png(picture: PilImage.Image) -> bytes:
    """The picture as PNG bytes."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
