"""Dice: a tiny seeded source of chance whose throws are the same on every machine and library version.

Scenes must be a pure function of (seed, split, index) for years, so nothing here leans on a library's generator:
the state is a 64-bit number, the mixing function SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators").
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Dice:
    """Throws named by a key of numbers and words: ``Dice(7, "train", 12)`` always throws the same."""

    def __init__(self, *key: int | str) -> None:
        state = 0
        for part in key:
            number = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
            while True:
                state = _mix((state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK)
                number >>= 64
                if number in (0, -1):
                    break
        self._state = state

    def bits(self) -> int:
        """The next 64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return _mix(self._state)

    def below(self, n: int) -> int:
        """A whole number in 0..n-1."""
        return (self.bits() * n) >> 64

    def unit(self) -> float:
        """A number in [0, 1)."""
        return (self.bits() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, p: float) -> bool:
        return self.unit() < p

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        left = self.unit() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def different(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items, drawn without shuffling them all: for few of many."""
        drawn: list[T] = []
        while len(drawn) < count:
            item = self.choice(items)
            if item not in drawn:
                drawn.append(item)
        return drawn

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out
