"""Instruction data about scenes: the symbols that a language model reads in place of the picture, and all three kinds
of data written from the truth by templates, without any model."""

from pathlib import Path

from isthmus.data.instruct import Box, Kind, Symbols, Written
from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.draw import draw
from isthmus.demo.scenes.questions import KINDS as QUESTIONS
from isthmus.demo.scenes.questions import Question, make_question
from isthmus.demo.scenes.scene import RADIUS, SHAPES, Scene, Split, make_scene
from isthmus.demo.scenes.source import EXPLAIN, REQUESTS, turns_about
from isthmus.demo.scenes.words import captions, describe

TEMPLATES = "scene templates 1"
"""Who wrote what no model wrote; the number is raised with every change of what is written."""
_TRIES = 64
CATEGORIES = SHAPES


def scene_symbols(count: int, *, split: Split = "train", seed: int = 0) -> list[tuple[Scene, Symbols]]:
    """The first ``count`` scenes with what their captions and boxes say; the pictures are named ``000000.png`` ..."""
    found = []
    for number in range(count):
        scene = make_scene(seed, split, number)
        boxes = tuple(Box(s.shape, _corners(s.x, s.y, RADIUS[s.size])) for s in scene.solids)
        found.append((scene, Symbols(f"{number:06d}", f"{number:06d}.png", captions(scene), boxes)))
    return found


def _corners(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def draw_scenes(folder: Path, scenes: list[tuple[Scene, Symbols]], size: int) -> None:
    """Those pictures that are not there yet, as PNG, each written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene, symbols in scenes:
        path = folder / symbols.image
        if not path.is_file():
            aside = folder / f".{symbols.image}.part"
            draw(scene, size).save(aside, "PNG")
            aside.replace(path)


def written(scene: Scene, symbols: Symbols, kind: Kind, *, turns: int = 6) -> Written:
    """What the templates say about a scene: a conversation of short answers, all that is there, or an answer with its
    reason. The same scene always gives the same."""
    dice = Dice("instruct", kind, scene.seed, scene.split, scene.index)
    if kind == "detail":
        pairs = [(dice.choice(REQUESTS), describe(scene))]
    elif kind == "reasoning":
        question = _some_question(scene, dice)
        pairs = [(f"{question.text} {EXPLAIN}", f"{question.reason}, so the answer is {question.answer}.")]
    else:
        pairs = [(q.text, q.answer) for q in turns_about(scene, dice, turns, QUESTIONS)]
    return Written(symbols, kind, tuple(pairs), TEMPLATES)


def _some_question(scene: Scene, dice: Dice) -> Question:
    for _ in range(_TRIES):
        if question := make_question(scene, dice.choice(QUESTIONS), dice):
            return question
    raise AssertionError("no question fits a scene")  # what and colour fit every scene
