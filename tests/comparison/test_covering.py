"""Where a model looked for each word, and what covering each region changes; and the command that writes both."""

import json

import pytest
import torch
from PIL import Image as PilImage

from isthmus.cli import look
from isthmus.comparison.covering import Covered, boxes, cover, drawn, request, word_pictures
from isthmus.data.record import Image
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.model import Model
from tests.data.helpers import pixel
from tests.interop import tiny_models
from tests.narrow import must_be
from tests.serving.helpers import picture

QUESTION = "what is red?"


class OneCorner(Model):
    """Scores an answer by how white the top left quarter is."""

    def __init__(self):
        """It has no net."""

    def need(self, capability):
        assert capability == "score"

    def score(self, parts, candidates):
        shown = must_be(PilImage.Image, must_be(Image, parts[0]).source.read())
        left, top = shown.width // 2, shown.height // 2
        levels = [pixel(shown, (x, y))[0] for x in range(left) for y in range(top)]
        return [sum(levels) / len(levels) / 255 for _ in candidates]


def test_only_what_the_answer_depends_on_changes_it():
    white = PilImage.new("RGB", (40, 24), "white")
    found = cover(OneCorner(), white, QUESTION, "red", cells=4)
    assert found.logprob == 1
    rows, columns = torch.nonzero(found.drop > 1e-6, as_tuple=True)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    shown = drawn(white, found)
    red, plain = pixel(shown, (20, 20)), pixel(shown, (shown.width - 20, 20))
    assert red[0] > red[1] + 100
    assert plain == (255, 255, 255)
    likelier = pixel(drawn(white, Covered("red", 0.0, -found.drop)), (20, 20))
    assert likelier[2] > likelier[0] + 100


@pytest.mark.parametrize("size", [(7, 5), (64, 64), (5, 9)])
def test_cells_are_the_whole_picture_once(size):
    counts = torch.zeros(size[1], size[0])
    for left, top, right, bottom in boxes(size, 5):
        assert right > left
        assert bottom > top
        counts[top:bottom, left:right] += 1
    assert bool((counts == 1).all())


def test_scores_are_those_of_the_model_and_its_covered_picture():
    model = tiny_models.llava()
    shown = picture(1, (20, 16))
    found = cover(model, shown, QUESTION, "red cube", cells=2)
    hidden = shown.copy()
    hidden.paste((128, 128, 128), (10, 0, 20, 8))
    alone = model.score(request(hidden, QUESTION).parts, ["red cube"])[0]
    assert float(found.drop[0, 1]) == pytest.approx(found.logprob - alone, abs=1e-4)
    with pytest.raises(DataError, match="answer is empty"):
        cover(model, shown, QUESTION, " ", cells=2)
    with pytest.raises(ConfigError, match="no grid of 17"):
        cover(model, shown, QUESTION, "red", cells=17)


@pytest.mark.parametrize("make", [tiny_models.llava, tiny_models.llava_next, tiny_models.blip2])
def test_a_picture_per_word(make):
    model = make()
    answer, words = word_pictures(model, picture(1, (30, 20)), QUESTION, max_new_tokens=6)
    assert answer == model.answer(picture(1, (30, 20)), QUESTION, max_new_tokens=6)
    assert "".join(word for word, _ in words) == "".join(answer.split())
    assert all(min(shown.size) >= 448 for _, shown in words)


def test_the_command_writes_both_and_says_what_it_cannot(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("llava", "clip"):
        getattr(tiny_models, name)().save(tmp_path / name)
    file, out = tmp_path / "one.png", tmp_path / "look"
    picture(1).save(file)
    options = {"cells": 2, "max_new_tokens": 6, "given": {}}
    look.run(str(tmp_path / "llava"), QUESTION, file, out, **options)
    facts = json.loads((out / "look.json").read_text())
    assert len(list(out.glob("word-*.png"))) == len(facts["words"]) > 0
    assert [len(row) for row in facts["drop"]] == [2, 2]
    with PilImage.open(out / "covering.png") as covering:
        assert min(covering.size) >= 448
    said = capsys.readouterr().out
    assert "attention and not proof" in said
    assert "red where covering makes the answer less likely" in said
    with pytest.raises(ConfigError, match="is not empty"):
        look.run(str(tmp_path / "llava"), QUESTION, file, out, **options)
    with monkeypatch.context() as patched:
        patched.setattr("isthmus.comparison.covering.cover", interrupted)
        with pytest.raises(KeyboardInterrupt):
            look.run(str(tmp_path / "llava"), QUESTION, file, tmp_path / "again", **options)
    look.run(str(tmp_path / "llava"), QUESTION, file, tmp_path / "again", **options)
    with pytest.raises(CapabilityError, match="neither gives attention maps nor scores"):
        look.run(str(tmp_path / "clip"), QUESTION, file, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
