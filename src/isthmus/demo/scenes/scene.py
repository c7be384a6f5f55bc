"""Scene: one to four solids on a square, with full ground truth, drawn from (seed, split, index) alone.

Solids stand in the cells of a 3 x 3 grid, one per cell, each shifted a little within its cell. So every relation is
unambiguous: solids of different columns are left and right of each other by a clear margin, and solids of one
column are neither. Eight of the 48 (shape, colour) pairs never occur in training; each scene of the other splits
holds at least one of them, so a model must put shape and colour together by itself.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from isthmus.demo.scenes.dice import Dice
from isthmus.errors import DataError, nearest

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SHAPES = ("sphere", "cube", "cylinder", "cone", "ring", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
RADIUS = {"small": 0.100, "large": 0.150}
"""Half the side of the square a solid fits in, as a fraction of the picture's side."""
HELD_OUT = frozenset((SHAPES[(5 * i + 1) % len(SHAPES)], colour) for i, colour in enumerate(COLOURS))
"""(shape, colour) pairs that no training scene holds: one per colour, one or two per shape."""

_SHIFT = 0.06
_GAP = 0.015
_HOW_MANY, _HOW_OFTEN = (1, 2, 3, 4), (1, 2, 3, 3)
_REPEAT = 0.3


@dataclass(frozen=True, slots=True)
class Solid:
    """One solid. ``row`` and ``column`` are 0..2; ``x`` and ``y`` its centre in fractions of the side, y downwards."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float
    y: float

    @property
    def name(self) -> str:
        """``red cube``: unique within a scene."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """``top left``: unique within a scene."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The ground truth of one picture."""

    seed: int
    split: Split
    index: int
    solids: tuple[Solid, ...]

    @property
    def layout(self) -> frozenset[tuple[str, str, str, int, int]]:
        """What captions can say about the scene: equal layouts are equal scenes to any caption."""
        return frozenset((s.shape, s.colour, s.size, s.row, s.column) for s in self.solids)


@lru_cache(maxsize=4096)
def make_scene(seed: int, split: Split, index: int, attempt: int = 0) -> Scene:
    """The scene of this number. ``attempt`` counts redraws by callers who need a scene of a certain kind."""
    if split not in SPLITS:
        raise DataError(f"scenes have no split {split!r}; {nearest(split, SPLITS)}")
    dice = Dice("scene", seed, split, index, attempt)
    count = dice.weighted(_HOW_MANY, _HOW_OFTEN)
    pairs = _pairs(dice, count, split)
    cells = dice.shuffled(range(len(ROWS) * len(COLUMNS)))[:count]
    solids: list[Solid] = []
    for (shape, colour), cell in zip(pairs, cells, strict=True):
        solids.append(_placed(dice, solids, shape, colour, dice.choice(SIZES), *divmod(cell, len(COLUMNS))))
    return Scene(seed, split, index, tuple(solids))


def _pairs(dice: Dice, count: int, split: Split) -> list[tuple[str, str]]:
    """Different (shape, colour) pairs; attributes repeat more than by chance, so that counting means something."""
    pairs: list[tuple[str, str]] = []
    if split != "train":
        pairs.append(dice.choice(sorted(HELD_OUT)))
    while len(pairs) < count:
        shape, colour = dice.choice(SHAPES), dice.choice(COLOURS)
        if pairs and dice.chance(_REPEAT):
            shape = dice.choice(pairs)[0]
        elif pairs and dice.chance(_REPEAT):
            colour = dice.choice(pairs)[1]
        if (shape, colour) not in pairs and not (split == "train" and (shape, colour) in HELD_OUT):
            pairs.append((shape, colour))
    return pairs


def _placed(dice: Dice, others: list[Solid], shape: str, colour: str, size: str, row: int, column: int) -> Solid:
    """The solid somewhere in its cell, clear of the picture's edge and of the solids already there."""
    radius = RADIUS[size]

    def along(cell: int, shift: float) -> float:
        return min(max((cell + 0.5) / 3 + dice.between(-shift, shift), radius + _GAP), 1 - radius - _GAP)

    for tries in range(64):
        # The middle of the cell is always free: two large solids at the middles are 0.33 - 0.06 apart at least.
        shift = _SHIFT if tries < 63 else 0.0
        x, y = along(column, shift), along(row, shift)
        if all(max(abs(x - o.x), abs(y - o.y)) >= radius + RADIUS[o.size] + _GAP for o in others):
            break
    else:
        return _placed(dice, others, shape, colour, "small", row, column)
    return Solid(shape, colour, size, row, column, x, y)
