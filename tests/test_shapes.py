"""The shapes in signatures: checked under pytest, with one legend, and nothing of it at run time."""

import re
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from isthmus.nn.attention import attend
from tests.conftest import SHAPED

SOURCE = Path(__file__).parents[1] / "src"
SHAPE = re.compile(r'(?:Float|Int|Bool)\[Tensor, "([^"]*)"\]')


def files(package):
    place = SOURCE / package.replace(".", "/")
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def test_a_wrong_shape_is_refused_under_pytest():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeCheckError, match="B H S Dh"):
        attend(q, q[0], q, mask=None)


def test_every_letter_of_a_shape_is_in_the_legend():
    legend = set(re.findall(r"^\| `([^`]+)` \|", (SOURCE.parent / "docs/glossary.md").read_text(), flags=re.M))
    used = {
        letter
        for package in SHAPED
        for file in files(package)
        for shape in SHAPE.findall(file.read_text())
        for letter in re.findall(r"[A-Za-z]\w*", re.sub(r"\{[^}]*\}", "", shape))
    }
    assert not used - legend, "give them a line in docs/glossary.md, or take a letter from there"


def test_modules_with_shapes_are_the_ones_that_are_checked():
    with_shapes = {file for file in (SOURCE / "isthmus").rglob("*.py") if SHAPE.search(file.read_text())}
    assert with_shapes <= {file for package in SHAPED for file in files(package)}
