"""``isthmus score``: official metrics on official files, no model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from isthmus.evaluation.scored_files import FileFacts


def run(
    references: Path,
    predictions: Path,
    *,
    task: str,
    metrics: Sequence[str],
    subset: bool,
    out: Path | None,
    seed: int,
    json_file: Path | None,
) -> None:
    """Print the corpus scores; the same and those of every item go into ``json_file``."""
    from isthmus.evaluation.scored_files import score_files, write_folder

    scores = score_files(references, predictions, task, subset=subset, metrics=metrics, seed=seed)
    console = Console(emoji=False)
    console.print(_table(scores.facts))
    if json_file is not None:
        facts = json.dumps(scores.facts, indent=2, ensure_ascii=False) + "\n"
        json_file.write_text(facts, encoding="utf-8", errors="backslashreplace")
    if out is not None:
        write_folder(out, scores, references, predictions, seed=seed)
        console.print(f"Raw outputs, manifest and scores: [bold]{escape(str(out))}[/]")


def _table(facts: "FileFacts") -> Table:
    table = Table("score", "value", "95 %", title=f"{facts['task']}: {facts['n']} items, {facts['empty']} empty")
    for name, value in facts["corpus"].items():
        low, high = facts["intervals"].get(name, (None, None))
        table.add_row(name, f"{value:.4f}", "–" if low is None else f"{low:.4f}-{high:.4f}")
    for name, value in facts.get("by_answer_type", {}).items():
        table.add_row(escape(f"  {name}"), f"{value:.4f}", "")
    if facts["left_out"]:
        table.caption = f"{facts['left_out']} items of the references had no prediction and are left out."
    return table
