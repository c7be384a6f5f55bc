"""``isthmus show``: what a recipe would build and train, or what a model folder holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def run(what: str, overrides: Sequence[str], json_file: Path | None) -> None:
    """Show a model folder if ``what`` is one, else a recipe."""
    console = Console()
    facts = _model(what, console) if Path(what).is_dir() else _recipe(what, overrides, console)
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _model(folder: str, console: Console) -> dict[str, Any]:
    from isthmus.config import plain
    from isthmus.model import load
    from isthmus.recipes.facts import parts_of, visual_tokens

    model = load(folder)
    parts, tokens = parts_of(model.net), visual_tokens(model.net)
    console.print(_parts(f"{folder}: {model.kind}", parts))
    if tokens is not None:
        console.print(f"{tokens} visual tokens per picture")
    console.print(f"It can: {', '.join(model.capabilities)}")
    return {
        "kind": model.kind,
        "parts": parts,
        "visual_tokens": tokens,
        "capabilities": list(model.capabilities),
        "processor": model.processor.to_dict(),
        "config": plain(model.net.config),
    }


def _recipe(name: str, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    from isthmus.recipes.facts import compute_rule, net_of, parts_of, stage_facts, visual_tokens
    from isthmus.recipes.schema import read_recipe

    recipe = read_recipe(name, overrides, to_show=True)
    net, built = net_of(recipe)
    parts, tokens, stages = parts_of(net), visual_tokens(net), stage_facts(recipe, net)
    if recipe.about:
        console.print(recipe.about)
    console.print(_parts(f"{name}: {recipe.model}", parts))
    for stage in stages:
        console.print(
            stage.table.render(
                f"stage {stage.name}: {stage.budget}, {stage.bytes / 2**20:,.0f} MiB of weights, gradients and moments"
            )
        )
    facts: dict[str, Any] = {
        "kind": recipe.model,
        "parts": parts,
        "visual_tokens": tokens,
        "stages": [{"name": s.name, "budget": s.budget, "bytes": s.bytes, **s.table.to_dict()} for s in stages],
    }
    if tokens is not None:
        console.print(f"{tokens} visual tokens per picture")
    if built is not None and recipe.model == "lm":
        rule = compute_rule(built)
        console.print(
            f"N = {rule.parameters:,} parameters, D = {rule.tokens:,} tokens, "
            f"C = 6ND = {rule.flops:.3g} FLOPs; the compute-optimal rule asks for "
            f"D = 20 N = {rule.optimal_tokens:,}: this recipe is "
            f"{rule.off:+.0%} off.",
            highlight=False,
        )
        facts["compute_rule"] = rule.to_dict()
    return facts


def _parts(title: str, parts: dict[str, int]) -> Table:
    table = Table(title=title)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, count in parts.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{sum(parts.values()):,}")
    return table
