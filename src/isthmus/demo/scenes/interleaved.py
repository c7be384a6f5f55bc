"""Scenes for Flamingo: pages of several pictures, lessons whose rule is only in the examples, and short clips.

A lesson makes up a word for each of a few values of one attribute and shows examples; nothing but these can say what
the words mean. A clip shows one solid that moves, a second one that comes or goes, or one after the other: one frame
alone does not show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image as PilImage

from isthmus.data.record import Image, Part, Text, Video
from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.draw import draw
from isthmus.demo.scenes.few_shot import RESERVED_WORDS, TRAINING_WORDS
from isthmus.demo.scenes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, Scene, Solid, Split
from isthmus.demo.scenes.words import listed, symbols
from isthmus.errors import ConfigError

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES}
CLIP_KINDS = ("moved", "appeared", "vanished", "sequence")
VALUES_PER_LESSON = 4
CONTROLS = ("", "permuted", "shuffled", "frame-N", "still-N")
"""Of lessons: ``permuted`` shuffles the examples' words. Of clips: ``shuffled`` frames; only frame number N, alone or
for as long as the clip was."""

_ENDS = ("", ".", ",", ";", "\n")
"""What ends an example in text. One form alone makes a tiny LM count its tokens, and a new one throws it off."""
_EVALUATION_WORDS = tuple(sorted(RESERVED_WORDS))
_DIRECTIONS = {"left": ("column", False), "right": ("column", True), "up": ("row", False), "down": ("row", True)}


@dataclass(frozen=True, slots=True)
class MadeScene:
    """A picture of a scene that was put together rather than drawn from a number."""

    scene: Scene
    name: str
    side: int = 64

    def describe(self) -> str:
        return self.name

    def read(self) -> PilImage.Image:
        return draw(self.scene, self.side)


@dataclass(frozen=True, slots=True)
class SceneClip:
    """The frames of a clip, drawn when read."""

    frames: tuple[Scene, ...]
    name: str
    side: int = 64

    def describe(self) -> str:
        return self.name

    def read(self) -> list[PilImage.Image]:
        return [draw(scene, self.side) for scene in self.frames]


@dataclass(frozen=True, slots=True)
class Lesson:
    """``things`` are one solid each, ``words`` what they are called; the last is the query.

    In text alone ``end`` stands after each example.
    """

    attribute: str
    things: tuple[Solid, ...]
    words: tuple[str, ...]
    end: str


def make_lesson(
    dice: Dice,
    *,
    split: Split,
    shots: int,
    attributes: Sequence[str] = tuple(sorted(ATTRIBUTES)),
    permuted: bool = False,
) -> Lesson:
    """``shots`` examples and one thing to name, whose value is among the examples' when there are enough of them.

    Every value in use comes about equally often; ``permuted`` shuffles the words of the examples, nothing else.
    """
    attribute = dice.choice(attributes)
    values = dice.shuffled(ATTRIBUTES[attribute])[:VALUES_PER_LESSON]
    words = _different_words(dice, TRAINING_WORDS if split == "train" else _EVALUATION_WORDS, len(values))
    meaning = dict(zip(values, words, strict=True))
    pool = [v for _ in range(shots // len(values) + 1) for v in values][: max(shots, 1)]
    order = dice.shuffled(pool)[:shots]
    order.append(dice.choice(order or values))
    things = tuple(lone_solid(dice, split, **{attribute: value}) for value in order)
    shown = [meaning[value] for value in order]
    if permuted:
        shown = [*dice.shuffled(shown[:-1]), shown[-1]]
    return Lesson(attribute, things, tuple(shown), dice.choice(_ENDS))


def _different_words(dice: Dice, words: Sequence[str], count: int) -> list[str]:
    """Words of a lesson, each with a first syllable of its own: who has said it has chosen."""
    while True:
        chosen = dice.shuffled(dice.different(words, count))
        if len({word.partition("-")[0] for word in chosen}) == count:
            return chosen


def lesson_parts(
    lesson: Lesson, *, name: str, side: int, seed: int, split: Split, number: int, in_words: int = 0
) -> list[Part]:
    """Shots and query as turns: a picture without a question, and its word. The first ``in_words`` shots are in words.

    Learnt is every word beside a picture that an earlier shot has explained, and the query's.
    """
    parts: list[Part] = []
    for place, (solid, word, learn) in enumerate(_known(lesson)):
        if place < in_words:
            parts.append(Text(f" {getattr(solid, lesson.attribute)} {word}{lesson.end}", role="system"))
            continue
        scene = Scene(seed, split, number, (solid,))
        parts.append(Image(MadeScene(scene, f"{name}/{place}", side), key=f"{name}/{side}/{place}"))
        parts.append(Text(word, role="assistant", learn=learn))
    return parts


def lesson_text(lesson: Lesson) -> list[Part]:
    """The same in words alone, for a language model without pictures: the value stands for the picture.

    It stands right before its word, where cross-attention will put what the picture shows: `` red ba-da; blue gi-ko``.
    """
    parts: list[Part] = []
    for place, (solid, word, learn) in enumerate(_known(lesson)):
        end = lesson.end if place else ""
        parts += [Text(f"{end} {getattr(solid, lesson.attribute)}"), Text(f" {word}", learn=learn)]
    return parts


def _known(lesson: Lesson) -> list[tuple[Solid, str, bool]]:
    """Each thing with its word and whether that word has been explained before it."""
    found: list[tuple[Solid, str, bool]] = []
    explained: set[str] = set()
    for place, (solid, word) in enumerate(zip(lesson.things, lesson.words, strict=True)):
        found.append((solid, word, word in explained or place + 1 == len(lesson.things)))
        explained.add(word)
    return found


@dataclass(frozen=True, slots=True)
class Clip:
    """What happens in a clip: its frames, a sentence, a question and the answer."""

    frames: tuple[Scene, ...]
    sentence: str
    question: str
    answer: str
    kind: str


def make_clip(
    dice: Dice,
    *,
    split: Split,
    seed: int,
    number: int,
    frames: int,
    kinds: Sequence[str] = CLIP_KINDS,
    control: str = "",
) -> Clip:
    """A solid moves one of four ways, a second one comes or goes halfway, or each frame shows another; which of
    ``kinds`` it is goes by ``number``.

    Raises ConfigError for a clip of fewer than two frames or a control that clips do not have.
    """
    if frames < 2:
        raise ConfigError(f"a clip needs at least two frames, not {frames}")
    kind = kinds[number % len(kinds)]
    if kind == "moved":
        event = _move(dice, split, frames)
    elif kind == "sequence":
        event = _in_turn(dice, split, frames)
    else:
        event = _come_or_go(dice, split, frames, kind)
    solids, sentence, question, answer = event
    scenes = [Scene(seed, split, number, s) for s in solids]
    return Clip(_controlled(scenes, control, dice), sentence, question, answer, kind)


def clip_text(clip: Clip, dice: Dice) -> str:
    """The clip in words, for a language model without eyes: what stands where in its first frame and in its last.

    ``first large red cube top left, then large red cube top right``
    """
    return f"first {symbols(clip.frames[0], dice)}, then {symbols(clip.frames[-1], dice)}"


def clip_part(clip: Clip, *, name: str, side: int, control: str, role: str = "user") -> Video:
    """The clip as a record's part."""
    return Video(SceneClip(clip.frames, name, side), role=role, key=f"{name}/{side}/{control}")  # type: ignore[arg-type]


_Event = tuple[list[tuple[Solid, ...]], str, str, str]
"""The solids of each frame, a sentence, a question and its answer."""


def _move(dice: Dice, split: Split, frames: int) -> _Event:
    """From the middle of a cell to that of another in its row or column: a cell says as much about one way along it as
    about the other."""
    solid = lone_solid(dice, split)
    way = dice.choice(sorted(_DIRECTIONS))
    near, far = dice.choice(((0, 1), (1, 2), (0, 2)))
    axis, forward = _DIRECTIONS[way]
    ends = [replace(solid, **{axis: cell}) for cell in ((near, far) if forward else (far, near))]
    there, here = (replace(s, x=(s.column + 0.5) / 3, y=(s.row + 0.5) / 3) for s in ends)
    path = [there]
    for frame in range(1, frames):
        t = frame / (frames - 1)
        path.append(replace(here, x=there.x + (here.x - there.x) * t, y=there.y + (here.y - there.y) * t))
    sentence = f"a {solid.full_name} moves {way} from the {there.place} to the {here.place}"
    return [(s,) for s in path], sentence, "which way did it move?", way


def _come_or_go(dice: Dice, split: Split, frames: int, kind: str) -> _Event:
    first = lone_solid(dice, split)
    other = lone_solid(dice, split)
    while other.name == first.name or (other.row, other.column) == (first.row, first.column):
        other = lone_solid(dice, split)
    turn = 1 + dice.below(frames - 1)
    both, alone = (first, other), (first,)
    shown = [(both if (i >= turn) == (kind == "appeared") else alone) for i in range(frames)]
    verb = "appears beside" if kind == "appeared" else "vanishes beside"
    return shown, f"a {other.full_name} {verb} a {first.full_name}", f"what {kind}?", other.name


def _in_turn(dice: Dice, split: Split, frames: int) -> _Event:
    shown: list[Solid] = []
    while len(shown) < frames:
        solid = lone_solid(dice, split)
        if solid.name not in {s.name for s in shown}:
            shown.append(solid)
    which = dice.choice(("first", "last"))
    sentence = listed([f"a {s.full_name} at the {s.place}" for s in shown])
    return [(s,) for s in shown], sentence, f"what came {which}?", shown[0 if which == "first" else -1].name


def _controlled(scenes: Sequence[Scene], control: str, dice: Dice) -> tuple[Scene, ...]:
    if not control:
        return tuple(scenes)
    if control == "shuffled":
        return tuple(dice.shuffled(scenes))
    kind, _, place = control.partition("-")
    if kind not in ("frame", "still") or not place.isdigit() or int(place) >= len(scenes):
        last = len(scenes) - 1
        known = f"shuffled, frame-0 to frame-{last}, still-0 to still-{last}"
        raise ConfigError(f"clips have no control {control!r}; known: {known}")
    return (scenes[int(place)],) * (1 if kind == "frame" else len(scenes))


def lone_solid(dice: Dice, split: Split, *, colour: str | None = None, shape: str | None = None) -> Solid:
    """A solid in the middle of any cell; training never holds a pair kept for evaluation."""
    while True:
        made = (shape or dice.choice(SHAPES), colour or dice.choice(COLOURS))
        if split != "train" or made not in HELD_OUT:
            break
    size, cell = dice.choice(SIZES), dice.below(9)
    row, column = divmod(cell, 3)
    x, y = ((along + 0.5) / 3 for along in (column, row))
    return Solid(made[0], made[1], size, row, column, x, y)
