"""A checkpoint layout as data: one :class:`Entry` per tensor of theirs, read in both directions, strictly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus import load_report
from isthmus.errors import CheckpointError
from isthmus.load_report import Account

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True, slots=True)
class Entry:
    """Their tensor ``theirs`` holds our tensor, or ours stacked along the first axis in the order given.

    ``transposed``: they store the matrix as (in, out). ``boxed``: they store ours with a first axis of one, a scalar as
    shape (1,).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    boxed: bool = False

    def decode(self, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if self.boxed:
            value = value[0]
        if self.transposed:
            value = value.T
        if len(self.ours) == 1:
            return [(self.ours[0], value.contiguous())]
        parts = value.chunk(len(self.ours))
        return [(name, part.contiguous()) for name, part in zip(self.ours, parts, strict=True)]

    def encode(self, state: Mapping[str, Tensor]) -> Tensor:
        values = [state[name] for name in self.ours]
        value = torch.cat(values) if len(values) > 1 else values[0]
        if self.transposed:
            value = value.T
        return value[None].contiguous() if self.boxed else value.contiguous()

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Their shape, from ours."""
        first = tuple(shapes[self.ours[0]])
        if self.boxed:
            return (1, *first)
        if self.transposed:
            return first[::-1]
        if len(self.ours) > 1:
            return (sum(shapes[name][0] for name in self.ours), *first[1:])
        return first


def same(theirs: str, ours: str, *leaves: str) -> list[Entry]:
    """One plain entry per leaf (``weight``, ``bias``) under two prefixes."""
    return [Entry(f"{theirs}.{leaf}", (f"{ours}.{leaf}",)) for leaf in leaves or ("weight", "bias")]


def from_theirs(
    entries: Sequence[Entry],
    state: Mapping[str, Tensor],
    shapes: Shapes,
    what: str,
    *,
    tolerated: Iterable[str] = (),
    account: Account | None = None,
) -> dict[str, Tensor]:
    """Our state dict from theirs. ``shapes`` are ours; keys that end in one of ``tolerated`` may be there besides.

    Raises CheckpointError that names every missing, unexpected and mismatched key.
    """
    known = {entry.theirs for entry in entries}
    missing = sorted(known - set(state))
    unexpected = sorted(k for k in set(state) - known if not k.endswith(tuple(tolerated)))
    mismatched = [
        f"{e.theirs} is {tuple(state[e.theirs].shape)}, expected {e.shape(shapes)}"
        for e in entries
        if e.theirs in state and tuple(state[e.theirs].shape) != e.shape(shapes)
    ]
    problems = [
        f"{label}: {_shorten(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit {what}. " + ". ".join(problems) + ".")
    load_report.ignored(account, sorted(set(state) - known), load_report.DERIVED)
    return {name: value for entry in entries for name, value in entry.decode(state[entry.theirs])}


def to_theirs(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours. Raises CheckpointError when ours is not what the entries cover."""
    covered = {name for entry in entries for name in entry.ours}
    if covered != set(state):
        odd = _shorten(sorted(covered ^ set(state)))
        raise CheckpointError(f"these weights are not the configured model's: {odd}.")
    return {entry.theirs: entry.encode(state) for entry in entries}


def shapes_of(net: nn.Module) -> Shapes:
    """Name -> shape of everything a net stores; build it on the meta device, it costs nothing there."""
    return {name: value.shape for name, value in net.state_dict().items()}


def depth(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks there are after the prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _shorten(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
