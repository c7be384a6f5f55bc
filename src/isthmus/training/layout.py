"""What each process holds and exchanges under an engine, computed from a net without values."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import ceil

from torch import Tensor

from isthmus.net import Net
from isthmus.training.parallel import Parallel

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a number in fp32: itself, its gradient, AdamW's two moments."""
BUCKET = 25 * 2**20
"""Bytes that DistributedDataParallel sums at a time."""


@dataclass(frozen=True)
class Unit:
    """``count`` like units of a net. ``held`` are the bytes of weights, gradients and moments that a process holds of
    each between steps, ``gathered`` those of one that is unsharded while it runs; ``gathers`` and ``sums`` are the
    collectives of each in one pass."""

    name: str
    count: int
    parameters: int
    trained: int
    held: int
    gathered: int
    gathers: int
    sums: int


@dataclass(frozen=True)
class Layout:
    """A stage's units over ``ranks`` processes, and its passes per step."""

    units: tuple[Unit, ...]
    ranks: int
    passes: int

    @property
    def held(self) -> int:
        """Bytes a process holds between steps."""
        return sum(unit.count * unit.held for unit in self.units)

    @property
    def gathered(self) -> int:
        """Most bytes of unsharded weights beside them: what stays for the pass, and the largest two blocks, the one
        that runs and the one that is fetched meanwhile."""
        stays = sum(unit.gathered for unit in self.units if unit.gathers == 1)
        return stays + 2 * max((unit.gathered for unit in self.units if unit.gathers > 1), default=0)

    @property
    def collectives(self) -> int:
        """All-gathers, reduce-scatters and all-reduces of weights and gradients in a step."""
        return self.passes * sum(unit.count * (unit.gathers + unit.sums) for unit in self.units)

    def to_dict(self) -> dict[str, object]:
        return {
            "ranks": self.ranks,
            "units": [asdict(unit) for unit in self.units],
            "held_bytes": self.held,
            "gathered_bytes": self.gathered,
            "collectives_per_step": self.collectives,
        }


def layout(net: Net, parallel: Parallel, ranks: int, *, passes: int = 1, frozen_bytes: int = WEIGHT) -> Layout:
    """The units of a net whose stage is applied. ``frozen_bytes`` are those of a frozen number."""
    if parallel.engine == "ddp":
        own = list(net.parameters())
        trained = sum(p.numel() for p in own if p.requires_grad)
        held = _held(own, 1, frozen_bytes)
        sums = ceil(trained * GRADIENT / BUCKET)
        # Only the last pass of a step sums.
        return Layout((Unit("net", 1, sum(p.numel() for p in own), trained, held, 0, 0, sums),), ranks, 1)
    counted: set[int] = set()
    found: dict[Unit, int] = {}
    blocks, towers = {id(m) for m in net.blocks()}, {id(m) for m in net.towers()}
    modules = [(name or "the rest", m) for name, m in net.named_modules() if id(m) in blocks | towers]
    for name, module in [*modules, ("the rest", net)]:
        own = [p for p in module.parameters() if id(p) not in counted]
        counted |= {id(p) for p in own}
        unit = _unit(
            "blocks" if id(module) in blocks else name, own, id(module) in blocks, parallel, ranks, frozen_bytes
        )
        found[unit] = found.get(unit, 0) + 1
    return Layout(tuple(replace(unit, count=count) for unit, count in found.items()), ranks, passes)


def _unit(name: str, own: list[Tensor], block: bool, parallel: Parallel, ranks: int, frozen_bytes: int) -> Unit:
    sharded = [p for p in own if p.requires_grad or parallel.frozen == "sharded"]
    replicated = [p for p in own if not (p.requires_grad or parallel.frozen == "sharded")]
    trained = sum(p.numel() for p in own if p.requires_grad)
    narrow = 2 if parallel.gather == "bf16" else WEIGHT
    gathered = sum(p.numel() * (narrow if p.requires_grad else min(narrow, frozen_bytes)) for p in sharded)
    held = _held(sharded, ranks, frozen_bytes) + _held(replicated, 1, frozen_bytes)
    gathers = (2 if block else 1) if sharded else 0
    return Unit(name, 1, sum(p.numel() for p in own), trained, held, gathered, gathers, int(trained > 0))


def _held(parameters: Iterable[Tensor], ranks: int, frozen_bytes: int) -> int:
    """Bytes of each process's share, cut along the first dimension and padded to the first process's."""
    total = 0
    for p in parameters:
        rows = p.shape[0] if p.ndim else 1
        share = ceil(rows / ranks) * (p.numel() // rows)
        total += share * (WEIGHT + GRADIENT + MOMENTS if p.requires_grad else frozen_bytes)
    return total
