"""The embedded data: small pictures of coloured solids, drawn from a seed, with full ground truth."""

from isthmus.demo.scenes.draw import ScenePicture, draw
from isthmus.demo.scenes.export import export
from isthmus.demo.scenes.few_shot import RESERVED_WORDS, TRAINING_WORDS
from isthmus.demo.scenes.questions import KINDS, Question, make_question
from isthmus.demo.scenes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, Scene, Solid, make_scene
from isthmus.demo.scenes.source import FORMS, SceneSource

__all__ = [
    "COLOURS",
    "FORMS",
    "HELD_OUT",
    "KINDS",
    "RESERVED_WORDS",
    "SHAPES",
    "SIZES",
    "TRAINING_WORDS",
    "Question",
    "Scene",
    "ScenePicture",
    "SceneSource",
    "Solid",
    "draw",
    "export",
    "make_question",
    "make_scene",
]
