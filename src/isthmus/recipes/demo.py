"""The whole story in one command: scenes, CLIP, a language model, LLaVA; then scores, a report and a conversation.

Each model is an ordinary recipe run in a folder of its own, so an interrupted demo goes on where it stopped, and
``isthmus train clip-tiny`` does exactly what the demo does.
"""

import json
import sys
import webbrowser
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.evaluation.report import Curve, Report, Sample, StageTableFacts, write_report
from isthmus.evaluation.results import Results
from isthmus.evaluation.run import Result
from isthmus.model import Model
from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe, read_recipe
from isthmus.recipes.scoring import model_hash, score_model

STORY = {"clip": "clip-tiny", "lm": "lm-tiny", "llava": "llava-tiny"}
SAMPLES = 12
"""Pictures shown in the report."""


def run_demo(out: Path, *, seed: int = 0, serve: bool = True) -> None:
    """Train, score and show everything; ``serve`` opens the report in a browser when a person is watching."""
    console = Console()
    results = Results(seed=seed)
    scored: list[tuple[str, Result]] = []
    for name, recipe_name in STORY.items():
        console.rule(f"[bold]{name}[/]  ({recipe_name})")
        recipe = demo_recipe(recipe_name, out, seed)
        model = train(recipe, out / name)
        results.seconds[name] = _seconds(out / name, recipe)
        for result in _score(model, recipe, out / name, seed):
            scored.append((name, result))
            results.add(name, result.scores)
    results.write(out / "results.json")
    _write_report(out, results, scored, seed)
    _tell(console, out, scored)
    if serve and sys.stdout.isatty():
        webbrowser.open((out / "report.html").resolve().as_uri())


def demo_recipe(name: str, out: Path, seed: int) -> Recipe:
    """The shipped recipe with its parts taken from this demo's folder."""
    recipe = read_recipe(name, [f"seed={seed}"])
    parts = {part: str(out / Path(folder).name) for part, folder in recipe.parts.items()}
    return recipe.model_copy(update={"parts": parts})
