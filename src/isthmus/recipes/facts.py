"""What can be said about a recipe or a model before a step is run: counts, tables, memory, the compute rule."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from isthmus import quantised
from isthmus.config import merged, plain
from isthmus.errors import ConfigError
from isthmus.net import Net
from isthmus.nn.tiles import num_tokens
from isthmus.recipes.build import Built, build, on_meta
from isthmus.recipes.run import make_loader
from isthmus.recipes.schema import Recipe, StageSpec
from isthmus.stage import StageTable, apply_stage
from isthmus.systems import system
from isthmus.training.layout import Layout, layout
from isthmus.training.precision import choose, context
from isthmus.training.protocols import ending

TOKENS_PER_PARAMETER = 20
"""Compute-optimal training: about 20 tokens per parameter, C = 6 N D (Hoffmann et al. 2022, 2203.15556)."""

BYTES_WEIGHT, BYTES_TRAINED = 4, 12
"""fp32 weights; gradient and two AdamW moments for each trained number. Activations are not counted."""

_STEPS_COUNTED = 20


@dataclass(frozen=True)
class ComputeRule:
    """``parameters`` N, ``tokens`` D of the whole run, and how far D is off the rule's."""

    parameters: int
    tokens: int

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens

    @property
    def optimal_tokens(self) -> int:
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def off(self) -> float:
        """D over the rule's D, less one: -0.5 is half the tokens the rule asks for."""
        return self.tokens / self.optimal_tokens - 1

    def to_dict(self) -> dict[str, float]:
        return {
            "parameters": self.parameters,
            "tokens": self.tokens,
            "flops": self.flops,
            "optimal_tokens": self.optimal_tokens,
            "off": self.off,
        }


@dataclass(frozen=True)
class StageFacts:
    """One stage as it would run: its table of open parts, its budget, bytes of weights, gradients and moments."""

    name: str
    budget: str
    table: StageTable

    @property
    def bytes(self) -> int:
        return BYTES_WEIGHT * self.table.parameters + BYTES_TRAINED * self.table.trained


@dataclass(frozen=True)
class StageCost:
    """What a step of a stage takes on this machine: real tokens of all its rows, bytes that the forward pass of a
    micro-batch keeps for the backward pass, and seconds, estimated from one forward pass."""

    tokens: int
    activations: int
    seconds: float
    steps: float

    @property
    def total(self) -> float:
        """Seconds of the whole stage."""
        return self.seconds * self.steps

    def to_dict(self) -> dict[str, float]:
        return {
            "tokens_per_step": self.tokens,
            "activation_bytes": self.activations,
            "seconds_per_step": self.seconds,
            "seconds": self.total,
        }


def stage_cost(built: Built, spec: StageSpec) -> StageCost:
    """Measured on the stage's first batch; no weight changes. A backward pass counts as two forward passes, and one
    more is due where the gradient cache embeds every micro-batch twice."""
    with ending(make_loader(built, spec).steps()) as stream:
        _, batches = next(stream)
    apply_stage(built.net, spec.stage.train)
    cpu = torch.device("cpu")
    own = context(choose(spec.stage, built.net, cpu).precision, cpu)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with own:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            built.net.loss(batches[0])
        started = time.perf_counter()  # the first pass has warmed up
        built.net.loss(batches[0])
        seconds = time.perf_counter() - started
    passes = 4 if len(batches) > 1 and built.net.gradient_cache else 3
    tokens = sum(int(stream.lengths.sum()) for batch in batches for stream in batch.text.values())
    return StageCost(tokens, sum(kept.values()), passes * len(batches) * seconds, steps_of(spec))


def stage_costs(built: Built) -> list[StageCost]:
    """:func:`stage_cost` of every stage, each with the net that it begins with."""
    costs = []
    for spec in built.recipe.stages:
        built = built.enter(spec)
        costs.append(stage_cost(built, spec))
    return costs


def steps_of(spec: StageSpec) -> float:
    """Steps of the whole stage; for a budget in samples counted by rows, 0 where rows per step are not fixed."""
    if spec.stage.steps is not None:
        return spec.stage.steps
    return (spec.stage.samples or 0) / spec.batch_size if spec.batch_size else 0.0


def duration(seconds: float) -> str:
    """``not known``, ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds <= 0:
        return "not known"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def parts_of(net: Net) -> dict[str, int]:
    """Exact number of parameters per part, tied ones once."""
    counts: dict[str, int] = {}
    for name, parameter in net.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + quantised.numel(parameter)
    return counts


def visual_tokens(net: Net) -> int | None:
    """R for a picture, with AnyRes the most it can be; none for a net that splices none in."""
    size = net.image_size
    own = net.num_tokens(size, size)
    if own == 0:
        return None
    side = math.isqrt(own)
    return max((num_tokens(canvas, (canvas,), tile=size, side=side) for canvas in net.pinpoints), default=own)


def visual_tokens_text(net: Net) -> str:
    """The same in words."""
    at_most = "at most " if net.pinpoints else ""
    return f"{at_most}{visual_tokens(net):,} visual tokens per picture"


def net_of(recipe: Recipe) -> tuple[Net, Built | None]:
    """The recipe's net, with what it was built from; a published size comes without values, needing no files."""
    if "preset" in recipe.config:
        return on_meta(recipe), None
    built = build(recipe)
    return built.net, built


def stage_facts(recipe: Recipe, net: Net) -> list[StageFacts]:
    """Every stage's table on a net of this recipe; no value is touched."""
    found = []
    for spec in recipe.stages:
        stage = spec.stage
        config = merged(plain(net.config), spec.config)
        if config != plain(net.config):
            with torch.device("meta"):
                net = system(recipe.model).net.from_config(config)
        budget = f"{stage.steps:,} steps" if stage.steps is not None else f"{stage.samples:,} samples"
        found.append(StageFacts(spec.name, budget, apply_stage(net, stage.train)))
    return found


def stage_layouts(recipe: Recipe, net: Net, ranks: int) -> Iterator[tuple[str, Layout]]:
    """What each of so many processes holds and exchanges in every stage; no value is touched."""
    for spec in recipe.stages:
        config = merged(plain(net.config), spec.config)
        if config != plain(net.config):
            with torch.device("meta"):
                net = system(recipe.model).net.from_config(config)
        apply_stage(net, spec.stage.train)
        frozen = 2 if spec.stage.frozen_dtype == "bf16" else 4
        yield spec.name, layout(net, recipe.parallel, ranks, passes=spec.accumulate, frozen_bytes=frozen)


def compute_rule(built: Built) -> ComputeRule:
    """N and D of a language model's recipe; D from the real tokens of each stage's first steps.

    Raises ConfigError for a recipe that trains no bare language model.
    """
    if not built.system.compute_rule:
        raise ConfigError("The compute rule is for recipes that train a language model.")
    total = 0.0
    for spec in built.recipe.stages:
        steps, samples = 0, 0
        tokens = 0
        for _, batches in islice(make_loader(built, spec).steps(), _STEPS_COUNTED):
            steps += 1
            samples += sum(len(batch) for batch in batches)
            tokens += sum(int(batch.text["lm"].lengths.sum()) for batch in batches)
        stage = spec.stage
        share = stage.steps / steps if stage.steps is not None else (stage.samples or 0) / samples
        total += tokens * share
    return ComputeRule(sum(parts_of(built.net).values()), round(total))
