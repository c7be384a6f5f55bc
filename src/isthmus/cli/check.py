"""``isthmus check``: a recipe tried on real samples before it is trained."""

import json
import shlex
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from isthmus.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.recipes.check import Piece, StageCheck

STYLES = {"learnt": "bold green", "picture": "cyan", "read": ""}


def run(recipe: str, overrides: Sequence[str], json_file: Path | None, *, samples: int, steps: int) -> None:
    """Print what each stage reads, teaches and trains; exit code 2 with the problems when there are any."""
    from isthmus.recipes.check import SEES, check
    from isthmus.recipes.facts import duration
    from isthmus.recipes.schema import read_recipe

    console = Console(emoji=False)
    checked = check(
        read_recipe(recipe, overrides), samples=samples, steps=steps, on_stage=lambda s: _print_stage(console, s)
    )
    for name, count in checked.evaluations.items():
        console.print(f"Evaluation {name}: {count:,} items.", markup=False)
    held = [name for name, verdict in checked.contracts.items() if verdict == "pass"]
    if held:
        console.print(f"Contracts that hold before anything is learnt: {', '.join(held)}.", highlight=False)
    if checked.contracts[SEES] == "FAIL":
        console.print(
            "[yellow]Note:[/] another picture changes nothing in what the model makes of a question. Where gates start "
            "closed, as Flamingo's, training opens them; else the net does not look at its pictures.",
            highlight=False,
        )
    total = sum(stage.total for stage in checked.stages)
    console.print(
        f"Peak memory so far: {checked.memory / 2**20:,.0f} MiB. All stages at this speed: {duration(total)}.",
        highlight=False,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(checked.to_dict(), indent=2) + "\n", encoding="utf-8")
    if checked.problems:
        raise ConfigError(f"{recipe} is not ready: " + " ".join(checked.problems))
    console.print(f"[bold green]Ready:[/] isthmus train {escape(shlex.join([recipe, *overrides]))}", highlight=False)


def _print_stage(console: Console, stage: "StageCheck") -> None:
    from isthmus.recipes.facts import duration

    console.rule(f"stage {stage.name}")
    for source in stage.sources:
        longest = max(source.lengths, default=0)
        mean = sum(source.lengths) / len(source.lengths) if source.lengths else 0.0
        learnt = "" if source.learnt is None else f", {source.learnt:.0%} of them learnt"
        bad = f", {sum(source.bad.values())} bad" if source.bad else ""
        cut = f", {source.cut} cut at {source.limit} (max_length)" if source.cut else ""
        console.print(
            f"{source.name}: {source.samples:,} samples; of {source.tried} tried: {mean:.0f} tokens on average, "
            f"{longest} at most{learnt}{cut}{bad}",
            highlight=False,
            markup=False,
        )
    for sample in stage.shown:
        console.print(Text(f"{sample.source} {sample.id}", style="dim"))
        for name, pieces in sample.streams.items():
            console.print(Text.assemble(f"  {name}: ", *_tokens(pieces)))
    if stage.shown:
        legend = "«learnt» tokens, [picture: its places], the rest is only read"
        if any("Ġ" in token for s in stage.shown for p in chain(*s.streams.values()) for token in p.tokens):
            legend += "; Ġ is a space, Ċ a new line"
        console.print(legend, style="dim", markup=False)
    console.print(stage.table.render(f"stage {stage.name}"))
    if stage.losses:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in stage.losses.items())
        console.print(
            f"Steps run, saved, resumed: the same bits. Loss {losses}; {stage.seconds:.2f} s a step, "
            f"the stage about {duration(stage.total)}.",
            highlight=False,
        )


def _tokens(pieces: "Sequence[Piece]") -> list[tuple[str, str]]:
    """Learnt runs in «», pictures as one mark with their number of tokens: readable without colours too."""
    shown = []
    for piece in pieces:
        if piece.kind == "picture":
            shown.append((f"[picture: {len(piece.tokens)} tokens] ", STYLES["picture"]))
        elif piece.kind == "learnt":
            shown.append((f"«{' '.join(piece.tokens)}» ", STYLES["learnt"]))
        else:
            shown.append((f"{' '.join(piece.tokens)} ", STYLES["read"]))
    return shown
