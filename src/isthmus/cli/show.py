"""``isthmus show``: what a recipe would build and train, or what a model folder holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.cli.options import Loading, written
from isthmus.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from isthmus.model import Model
    from isthmus.net import Net
    from isthmus.recipes.schema import Recipe


def run(
    what: str,
    overrides: Sequence[str],
    json_file: Path | None,
    given: Loading | None = None,
    *,
    render: str | None = None,
    shared: tuple[str, int] | None = None,
) -> None:
    """Show a model's folder or file if ``what`` is one, else a recipe. ``given`` are further arguments of ``load``;
    ``render`` is a question whose prompt is shown as the model reads it, ``shared`` an engine and how many processes
    share a recipe's stages by it."""
    from isthmus.interop.hub import located, looks_like_id
    from isthmus.recipes.schema import shipped

    console = Console(emoji=False)
    recipe = what in shipped() or Path(what).suffix in {".yaml", ".yml"}
    place = located(what, None)
    if "revision" in (given or {}) or (place.exists() and not (recipe and place.is_file())):
        if shared is not None:
            raise ConfigError(f"{what} is a model; --parallel shows how a recipe's stages would be shared.")
        if overrides:
            raise ConfigError(f"{what} is a model; key=value changes recipes only.")
        facts = _model(what, console, given or Loading(), render)
    elif render is not None:
        raise ConfigError(f"{what} is no model folder or file; only a model's prompt can be shown (--render).")
    elif recipe and given:
        raise ConfigError(f"{what} is a recipe, whose model is not opened; {written(given)[0]} is for models.")
    elif recipe:
        facts = _recipe(what, overrides, console, shared)
    else:
        raise ConfigError(
            f"{what} is neither a model folder nor a shipped recipe ({nearest(what, shipped())}) nor a .yaml file."
            + " A model of the hub is fetched with --revision main." * looks_like_id(what)
        )
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _model(folder: str, console: Console, given: Loading, render: str | None) -> dict[str, object]:
    from isthmus import adapters
    from isthmus.config import plain
    from isthmus.opening import load
    from isthmus.recipes.facts import parts_of, visual_tokens, visual_tokens_text
    from isthmus.weights import state_tensors

    model = load(folder, **given)
    parts, tokens = parts_of(model.net), visual_tokens(model.net)
    console.print(_parts(f"{folder}: {model.kind}", parts))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(model.net).values())
    console.print(f"{held / 2**20:,.1f} MiB of weights in memory", highlight=False)
    if tokens is not None:
        console.print(visual_tokens_text(model.net))
    if held_adapters := adapters.summary(model.net):
        console.print(
            f"Adapters: {held_adapters}; base: {model.base and model.base.path}", highlight=False, markup=False
        )
    if model.report is not None:
        console.print(f"Tensors: {model.report}", highlight=False, markup=False)
    console.print(f"It can: {', '.join(model.capabilities)}")
    rendered = {} if render is None else {"rendered": _rendered(model, render, console)}
    return {
        **rendered,
        "kind": model.kind,
        "parts": parts,
        "weight_bytes": held,
        "adapters": held_adapters or None,
        "report": None if model.report is None else model.report.to_dict(),
        "visual_tokens": tokens,
        "capabilities": list(model.capabilities),
        "processor": model.processor.to_dict(),
        "config": plain(model.net.config),
    }


def _rendered(model: "Model", question: str, console: Console) -> dict[str, object]:
    """The prompt of a question, to the letter and as ids."""
    from isthmus.data.reading import words
    from isthmus.data.record import Record, Text

    model.need("answer")
    prompt = model.processor.prompt(Record(id="render", parts=(Text(question, role="user"),)))
    tokenizer, stream = model.processor.tokenizer, next(iter(prompt.streams.values()))
    text, ids = words(prompt, tokenizer), list(stream.ids)
    console.print(f"Prompt of {len(ids)} tokens: {text!r}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Ids: {ids}", highlight=False, markup=False, soft_wrap=True)
    return {"text": text, "ids": ids, "tokens": tokenizer.tokens(ids)}


def _recipe(name: str, overrides: Sequence[str], console: Console, shared: tuple[str, int] | None) -> dict[str, object]:
    from isthmus.recipes.facts import (
        StageCost,
        compute_rule,
        duration,
        net_of,
        parts_of,
        stage_costs,
        stage_facts,
        visual_tokens,
        visual_tokens_text,
    )
    from isthmus.recipes.schema import read_recipe
    from isthmus.systems import system

    recipe = read_recipe(name, [*overrides, *([f"parallel.engine={shared[0]}"] if shared else [])], to_show=True)
    net, built = net_of(recipe)
    kind = system(recipe.model).kind
    parts, tokens, stages = parts_of(net), visual_tokens(net), stage_facts(recipe, net)
    if recipe.about:
        console.print(recipe.about, markup=False)
    console.print(_parts(f"{name}: {kind}", parts))
    costs: list[StageCost] = []
    try:
        costs = stage_costs(built) if built is not None else []
    except DataError as error:
        console.print(f"There is no estimate of time: {error}", highlight=False, markup=False)
    for number, stage in enumerate(stages):
        console.print(
            stage.table.render(
                f"stage {stage.name}: {stage.budget}, {stage.bytes / 2**20:,.0f} MiB of weights, gradients and moments"
            )
        )
        if costs:
            cost = costs[number]
            console.print(
                f"{cost.tokens:,} tokens a step, {cost.activations / 2**20:,.0f} MiB of activations; "
                f"here about {cost.seconds:.2f} s a step, the stage about {duration(cost.total)}",
                highlight=False,
            )
    facts: dict[str, object] = {
        "kind": kind,
        "parts": parts,
        "visual_tokens": tokens,
        "stages": [
            {"name": s.name, "budget": s.budget, "bytes": s.bytes, **s.table.to_dict()}
            | (costs[n].to_dict() if costs else {})
            for n, s in enumerate(stages)
        ],
    }
    if shared is not None:
        facts["parallel"] = {"engine": shared[0]} | _layouts(recipe, net, shared[1], console)
    if tokens is not None:
        console.print(visual_tokens_text(net))
    if built is not None and built.system.compute_rule:
        rule = compute_rule(built)
        console.print(
            f"N = {rule.parameters:,} parameters, D = {rule.tokens:,} tokens, "
            f"C = 6ND = {rule.flops:.3g} FLOPs; the compute-optimal rule gives "
            f"D = 20 N = {rule.optimal_tokens:,}: this recipe has "
            f"{abs(rule.off):.0%} {'more' if rule.off > 0 else 'fewer'} tokens than that.",
            highlight=False,
        )
        facts["compute_rule"] = rule.to_dict()
    return facts


def _layouts(recipe: "Recipe", net: "Net", ranks: int, console: Console) -> dict[str, object]:
    """For each stage what one of so many processes holds and exchanges."""
    from isthmus.recipes.facts import stage_layouts

    found = {}
    for name, layout in stage_layouts(recipe, net, ranks):
        table = Table(title=f"stage {name}: {recipe.parallel.engine} in {ranks} processes")
        for column in ("unit", "parameters", "trained", "held", "gathered", "gathers", "sums"):
            table.add_column(column, justify="left" if column == "unit" else "right")
        for unit in layout.units:
            title = f"{unit.count} x {unit.name}" if unit.count > 1 else unit.name
            sizes = [f"{size / 2**20:,.0f} MiB" for size in (unit.held, unit.gathered)]
            numbers = [
                *(f"{n / 1e6:,.1f} M" for n in (unit.parameters, unit.trained)),
                *sizes,
                str(unit.gathers),
                str(unit.sums),
            ]
            table.add_row(title, *numbers)
        table.caption = (
            f"each process holds {layout.held / 2**30:,.2f} GiB of weights, gradients and moments, and gathers up to "
            f"{layout.gathered / 2**30:,.2f} GiB beside them; {layout.collectives:,} collectives a step"
        )
        console.print(table)
        found[name] = layout.to_dict()
    return {"stages": found}


def _parts(title: str, parts: dict[str, int]) -> Table:
    table = Table(title=escape(title), min_width=min(len(title), 80))
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, count in parts.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{sum(parts.values()):,}")
    return table
