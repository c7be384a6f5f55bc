"""Requests in words that the scenes' data never has: is their form kept, and is what is said there in the picture?

    python -m benchmarks.held_out_phrasing MODEL [MODEL ...] [--template NAME] [--count 40] [--json FILE]

A caption in one word, as a list and in a sentence, and a colour asked for in other words, beside the colour asked for
as in training. Scored by rule: `form` is the share of answers in the form asked for, `right` the share that says what
is there and nothing that is not (a list and a sentence: of the colours and shapes named; a list names as many things as
there are); `blind` is `right` of the same answers held against another scene, what can be had without looking.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import isthmus
from isthmus.data.record import Image, Record, Text
from isthmus.demo.scenes import COLOURS, SHAPES, Scene, ScenePicture, Solid, make_scene

_WORDS = re.compile(r"[a-z]+")
_ITEMS = re.compile(r"[\n,;]|\band\b")


@dataclass(frozen=True)
class Request:
    """``ask`` gives the words of a request about a scene and its ``solid``; ``form`` tells by the answer, ``right`` by
    the answer, the scene and the solid."""

    name: str
    ask: Callable[[Solid], str]
    form: Callable[[str], bool]
    right: Callable[[str, Scene, Solid], bool]


def _named(answer: str, names: tuple[str, ...]) -> set[str]:
    """Which of the names an answer holds, one or many of each."""
    found = _WORDS.findall(answer.lower())
    return {name for name in names if name in found or f"{name}s" in found}


def _there(answer: str, scene: Scene, _: Solid) -> bool:
    """Something of the picture is named, and nothing that is not in it."""
    shapes, colours = _named(answer, SHAPES), _named(answer, COLOURS)
    return (
        bool(shapes | colours)
        and shapes <= {s.shape for s in scene.solids}
        and colours <= {s.colour for s in scene.solids}
    )


def _coloured(answer: str, scene: Scene, solid: Solid) -> bool:
    del scene
    return _named(answer, COLOURS) == {solid.colour}


def _few(answer: str) -> bool:
    return 0 < len(answer.split()) <= 12


def _items(answer: str) -> int:
    return len([item for item in _ITEMS.split(answer) if _WORDS.search(item.lower())])


REQUESTS = (
    Request("colour, as in training", lambda s: f"what colour is the {s.shape}?", _few, _coloured),
    Request("colour, other words", lambda s: f"Name the hue in which the {s.shape} was painted.", _few, _coloured),
    Request(
        "colour, as a choice",
        lambda s: f"If I wanted paint to match the {s.shape}, which pot would I open?",
        _few,
        _coloured,
    ),
    Request(
        "in one word",
        lambda _: "Sum up the picture in one word.",
        lambda answer: len(answer.split()) == 1,
        _there,
    ),
    Request(
        "as a list",
        lambda _: "Make a list of the things in the picture, one on each line.",
        lambda answer: "\n" in answer.strip() or answer.lstrip().startswith(("-", "*", "1.")),
        lambda answer, scene, solid: _there(answer, scene, solid) and _items(answer) == len(scene.solids),
    ),
    Request(
        "in a sentence",
        lambda _: "Write one sentence about the picture.",
        lambda answer: len(re.findall(r"[.!?](?:\s|$)", answer)) == 1 and len(answer.split()) >= 4,
        _there,
    ),
)


def scenes(count: int) -> list[tuple[Scene, Solid]]:
    """Test scenes in which a shape is there once, with the solid of that shape."""
    found: list[tuple[Scene, Solid]] = []
    number = 0
    while len(found) < count:
        scene = make_scene(0, "test", number)
        number += 1
        once = [s for s in scene.solids if sum(o.shape == s.shape for o in scene.solids) == 1]
        if once:
            found.append((scene, once[number % len(once)]))
    return found


def measured(model: Any, asked: list[tuple[Scene, Solid]]) -> dict[str, dict[str, Any]]:
    """Per request ``form``, ``right``, ``blind`` as shares, and three answers."""
    table: dict[str, dict[str, Any]] = {}
    for request in REQUESTS:
        records = [
            Record(
                f"{n}",
                (Image(ScenePicture(scene.seed, scene.split, scene.index)), Text(request.ask(solid), role="user")),
            )
            for n, (scene, solid) in enumerate(asked)
        ]
        answers = model.generate(records, max_new_tokens=48, batch_size=8)
        others = [*asked[1:], asked[0]]
        table[request.name] = {
            "form": sum(map(request.form, answers)) / len(asked),
            "right": sum(request.right(a, *case) for a, case in zip(answers, asked, strict=True)) / len(asked),
            "blind": sum(request.right(a, *case) for a, case in zip(answers, others, strict=True)) / len(asked),
            "answers": answers[:3],
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--template", help="asks in this one, such as chat, and not in the last stage's")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    asked, found = scenes(given.count), {}
    for name in given.models:
        start = time.time()
        found[name] = measured(isthmus.load(name, template=given.template), asked)
        print(f"{name}, {given.count} scenes, {time.time() - start:.0f} s")
        print("\n| request | form | right | blind |\n|---|---|---|---|")
        for request, row in found[name].items():
            print(f"| {request} | " + " | ".join(f"{row[k]:.0%}" for k in ("form", "right", "blind")) + " |")
        for request, row in found[name].items():
            print(f"{request}: {row['answers']}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
