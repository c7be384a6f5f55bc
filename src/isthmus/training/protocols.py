"""What the loop needs of a loader. What it needs of a net stands in :mod:`isthmus.net`."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from isthmus.batch import Batch


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
