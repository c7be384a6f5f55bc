"""Mix: several sources as one epoch, in an order that is a pure function of (seed, epoch).

No state is kept: what epoch 7 visits can be computed without the epochs before it. That is what makes an exact
resume one pair of numbers.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from isthmus.data.record import Record
from isthmus.errors import ConfigError, DataError


@runtime_checkable
class Source(Protocol):
    """Records by number. Reading one is cheap: its pictures stay undecoded. A source of one's own derives from this
    class and gives ``name``, ``len()`` and the i-th record; the rest has defaults."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...

    def listing(self) -> Iterable[object]:
        """All that the source keeps in memory anyway, for its fingerprint: rows of text, names and sizes."""
        return ()


class Visit(NamedTuple):
    """One sample's turn in an epoch: the ``turn``-th visit (from 0) to sample ``index`` of source ``source``."""

    source: int
    index: int
    turn: int


def key(*parts: object) -> int:
    """A 64-bit number from any printable parts: the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def permutation(count: int, seed: int) -> np.ndarray:
    """(count,) int64: 0..count-1 in the order of their keyed hashes (SplitMix64), a function of ``seed`` alone."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


class Mix:
    """Sources with weights: a source of weight w has each of its samples visited w times an epoch on average.

    A fraction is spread over epochs without chance: with w = 0.5 one epoch visits one half, the next the other;
    with w = 2.5 every sample comes twice and a half of them, in turns, three times.
    Raises ConfigError for weights that are not positive, DataError for an empty source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.sources = tuple(sources)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.sources)
        if not self.sources:
            raise ConfigError("a mixture needs at least one source")
        if len(self.weights) != len(self.sources):
            raise ConfigError(f"{len(self.sources)} sources need as many weights, not {len(self.weights)}")
        if any(not (math.isfinite(w) and w > 0) for w in self.weights):
            raise ConfigError(f"weights must be positive numbers, not {list(self.weights)}")
        for source in self.sources:
            if not len(source):
                raise DataError(f"source {source.name!r} holds no sample; check its files and fields")

    def record(self, visit: Visit) -> Record:
        """The sample of a visit. Raises DataError when it cannot be read."""
        return self.sources[visit.source][visit.index]

    def epoch(self, seed: int, epoch: int, *, shuffle: bool = True) -> np.ndarray:
        """(visits, 3) int64, rows as :class:`Visit`; in the order of the sources when not shuffled."""
        parts = []
        for number, (source, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
            count = len(source)
            # The source is an endless stream of permutations; this epoch takes its share of the stream.
            stream = np.arange(math.floor(epoch * weight * count), math.floor((epoch + 1) * weight * count))
            turn, place = stream // count, stream % count
            index = place.copy()
            if shuffle:
                for t in np.unique(turn):
                    chosen = turn == t
                    index[chosen] = permutation(count, key(seed, "source", number, int(t)))[place[chosen]]
            parts.append(np.stack([np.full_like(index, number), index, turn], axis=1))
        visits = np.concatenate(parts)
        return visits[permutation(len(visits), key(seed, "epoch", epoch))] if shuffle else visits
