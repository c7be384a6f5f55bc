"""How often a picture is opened and decoded: at most once a visit in training; decoded once in an evaluation."""

from collections import Counter

import pytest
from PIL import Image as PilImage

from isthmus.data.loader import Loader
from isthmus.errors import IsthmusWarning
from isthmus.opening import load
from isthmus.recipes.build import build
from isthmus.recipes.run import make_loader
from isthmus.recipes.schema import EvalSpec, parse_recipe
from isthmus.recipes.scoring import score_model
from tests.miniature import tree
from tests.narrow import must_be, there
from tests.recipes.visits import count_visits, epoch_of, questions


@pytest.fixture
def visits(monkeypatch):
    return count_visits(monkeypatch)


def task(data, **options):
    return EvalSpec(name="vqa", task="vqa", data=data, options={"decoding": {"max_new_tokens": 2}} | options)


@pytest.mark.parametrize("name", ["llava", "flamingo", "blip2"])
def test_an_evaluation_decodes_each_picture_once(rivals, tmp_path, visits, name):
    opened, decoded = visits
    score_model(load(rivals[name]), [task(questions(tmp_path, 6))], tmp_path / "out", model_hash="x")
    assert (set(opened.values()), decoded["all"]) == ({2}, 6)  # opened to be hashed, and to be decoded


def test_many_pictures_and_gaps_decode_each_once_too(rivals, tmp_path, visits, monkeypatch):
    opened, decoded = visits
    monkeypatch.setattr("isthmus.evaluation.controls.windows.__defaults__", (4,))
    score_model(load(rivals["llava"]), [task(questions(tmp_path, 18), gaps=True)], tmp_path / "out", model_hash="x")
    assert (set(opened.values()), decoded["all"]) == ({2}, 18)


def test_a_picture_that_cannot_be_decoded_costs_its_sample_alone(rivals, tmp_path):
    data = questions(tmp_path, 3)
    PilImage.effect_noise((64, 64), 40).save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])  # its header is sound
    with pytest.warns(IsthmusWarning, match=r"truncated or damaged.*begins anew"):
        (result,) = score_model(load(rivals["llava"]), [task(data)], tmp_path / "out", model_hash="x")
    (again,) = score_model(load(rivals["llava"]), [task(data)], tmp_path / "out", model_hash="x")
    assert [r["id"] for r in result.rows] == ["data/0", "data/2"]
    assert (result.left_out, again.rows) == (1, result.rows)


@pytest.mark.parametrize(("name", "stage"), [("clip", 0), ("llava", 1)])
def test_a_training_visit_opens_and_decodes_once(story, tmp_path, visits, name, stage):
    opened, decoded = visits
    found = tree(name, story)
    found["stages"][stage]["data"] = [questions(tmp_path, 8)]
    recipe = parse_recipe(found)
    loader = must_be(Loader, make_loader(build(recipe).enter(recipe.stages[stage]), recipe.stages[stage]))
    opened.clear()
    for epoch in range(1, 3):
        keys = [key for batches in loader.epoch(epoch) for batch in batches for key in batch.keys]
        assert len(set(keys)) == (8 if name == "clip" else 1)  # content is asked for where it is contrasted
        assert (set(opened.values()), decoded["all"]) == ({epoch}, 8 * epoch)


def test_a_visit_of_a_picture_in_tiles_decodes_once(story, tmp_path, visits):
    """How many tokens its tiles take is known from its header."""
    opened, decoded = visits
    found = tree("llava", story)
    found["stages"] = [found["stages"][0] | {"config": {"pinpoints": [[64, 128], [128, 64]]}, "image_mode": "anyres"}]
    found["stages"][0]["data"] = [questions(tmp_path, 8)]
    recipe = parse_recipe(found)
    loader = must_be(Loader, make_loader(build(recipe).enter(recipe.stages[0]), recipe.stages[0]))
    opened.clear()
    visuals = [v for batches in loader.epoch(1) for batch in batches for v in batch.visuals]
    shapes = {tuple(there(v.pixels).shape[1:]) for v in visuals}
    assert shapes == {(3, 3, 64, 64)}  # the overview and two tiles
    assert (set(opened.values()), decoded["all"]) == ({2}, 8)


def test_processes_share_the_visits_of_an_epoch(tmp_path):
    data = questions(tmp_path, 16)
    opened, decoded = zip(*(epoch_of(part, data) for part in range(2)), strict=True)
    assert decoded == (8, 8)
    assert Counter(opened[0]) + Counter(opened[1]) == Counter(f"{n}.png" for n in range(16))
