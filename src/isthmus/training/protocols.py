"""What the loop needs of a loader. What it needs of a net stands in :mod:`isthmus.net`."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from isthmus.batch import Batch

T = TypeVar("T")


class Position(Protocol):
    """Where a loader stands, as JSON-able data."""

    def to_dict(self) -> Mapping[str, object]: ...


class Loader(Protocol):
    """An endless, resumable stream of steps: a pure function of its seed and the position."""

    def position(self, saved: Mapping[str, object]) -> Position:
        """The position that ``to_dict`` gave; ``{"epoch": 0, "index": 0}`` is the beginning."""
        ...

    def steps(self, start: Any) -> Iterator[tuple[Position, list[Batch]]]:
        """From ``start`` on, a position of the loader's own class: the position after each step, and this process's
        share of the step's micro-batches (one of several processes may have none)."""
        ...


@contextmanager
def ending(stream: Iterator[T]) -> Iterator[Iterator[T]]:
    """While inside, the stream. Generators stop their workers when closed; a plain iterator has nothing to stop."""
    try:
        yield stream
    finally:
        if isinstance(stream, Generator):
            stream.close()
