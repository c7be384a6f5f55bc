"""What the loop asks of a net and a loader. Neither has to inherit from anything."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from isthmus.batch import Batch, Term


class Net(Protocol):
    """An ``nn.Module`` with a loss.

    It may also have ``cached_loss(batches) -> terms`` (exact loss and gradients of the joined micro-batches, doing its
    own backward), ``contrasts`` (whether its loss needs the rows of all processes at once), ``after_step()`` (called
    after each update, for clamps) and ``unreachable()`` (see stage.py).
    """

    def loss(self, batch: Batch) -> Mapping[str, Term]:
        """Named terms of one batch."""
        ...


class Position(Protocol):
    """Where a loader stands, as JSON-able data."""

    def to_dict(self) -> Mapping[str, Any]: ...


class Loader(Protocol):
    """An endless, resumable stream of steps: a pure function of its seed and the position."""

    def position(self, saved: Mapping[str, Any]) -> Position:
        """The position that ``to_dict`` gave; ``{"epoch": 0, "index": 0}`` is the beginning."""
        ...

    def steps(self, start: Any) -> Iterator[tuple[Position, list[Batch]]]:
        """From the loader's own position ``start`` on: the position after each step, and this process's share of the
        step's micro-batches (one of several processes may have none)."""
        ...


def as_module(net: Net) -> nn.Module:
    """The same net, seen as the module it is. Raises TypeError for anything else."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"a net must be a torch.nn.Module, got {type(net).__name__}")
    return net
