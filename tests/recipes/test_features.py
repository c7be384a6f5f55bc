"""Stages with a feature cache: the losses of a run without one, each picture encoded once, resumed bit for bit."""

import copy

import pytest
import torch

from isthmus.errors import ConfigError
from isthmus.nn.tap import Tap
from isthmus.recipes import run as run_module
from isthmus.recipes.check import check
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from tests.miniature import tree
from tests.recipes import test_blip2, test_flamingo
from tests.recipes.test_run import losses, weights

PICTURES = 6
CANVASES = [[64, 128], [128, 64], [128, 128]]


def recipe(kind, story, cached):
    """One stage of three epochs or more over six pictures, or as many pages and clips."""
    own = {"flamingo": test_flamingo.TREE, "blip2": test_blip2.TREE}
    mine = copy.deepcopy(own.get(kind.split()[0]) or tree("llava"))
    mine["parts"] = {"vision": str(story / "clip"), "language": str(story / "lm")}
    mine["stages"] = mine["stages"][:1]
    mine["evaluate"] = []
    stage = mine["stages"][0]
    stage |= {"steps": 6, "precision": "fp32"}
    stage["data"] = [{**source, "count": PICTURES} for source in stage["data"]]
    if kind.endswith("told places"):
        mine["config"]["patch_positions"] = True
    if kind == "llava in tiles":
        stage |= {
            "config": {"pinpoints": CANVASES},
            "train": [{"pattern": "image_newline", "lr": 1e-2}, *stage["train"]],
        }
    if cached is not None:
        stage["feature_cache"] = cached
    return parse_recipe(mine)


@pytest.fixture
def encoded(monkeypatch):
    """The number of pictures in each call of a net's vision encoder."""
    calls, real = [], Tap.features

    def counted(self, encoder, pixels):
        calls.append(len(pixels))
        return real(self, encoder, pixels)

    monkeypatch.setattr(Tap, "features", counted)
    return calls


@pytest.mark.parametrize("kind", ["llava", "llava in tiles", "flamingo told places", "blip2 told places"])
def test_losses_equal_those_without_a_cache_and_encoding_is_once(kind, story, tmp_path, encoded):
    torch.manual_seed(0)
    plain, once, again = (tmp_path / name for name in ("plain", "once", "again"))
    train(recipe(kind, story, None), plain, progress=False)
    stage = recipe(kind, story, None).stages[0].name
    seen = sum(encoded)
    encoded.clear()
    train(recipe(kind, story, {}), once, progress=False)
    (folder,) = (once / "features").iterdir()
    kept = len((folder / "index.jsonl").read_text().splitlines())
    assert encoded == [1] * kept  # alone, and once
    assert kept < seen
    encoded.clear()
    shared = {"folder": str(once / "features")}
    train(recipe(kind, story, shared), again, progress=False)
    assert encoded == []
    assert losses(again, stage) == losses(once, stage)
    for (_, a), (_, b) in zip(losses(plain, stage), losses(once, stage), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(once)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gib", [1, 3 * 16 * 32 * 4 / 2**30])
def test_a_stopped_run_ends_as_one_that_was_not_stopped(story, tmp_path, monkeypatch, gib):
    """Also when only three pictures fit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    mine = recipe("llava", story, {"gib": gib})
    train(mine, whole, progress=False)
    real = run_module.train_stage

    def breaks(net, loader, *args, **kwargs):
        class Three:
            position = loader.position

            def steps(self, start):
                for number, item in enumerate(loader.steps(start)):
                    if number == 3:
                        raise KeyboardInterrupt
                    yield item

        return real(net, Three(), *args, **kwargs)

    monkeypatch.setattr(run_module, "train_stage", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(mine, stopped, progress=False)
    monkeypatch.setattr(run_module, "train_stage", real)
    train(mine, stopped, progress=False)
    assert losses(stopped, "align") == losses(whole, "align")
    assert all(torch.equal(t, weights(stopped)[n]) for n, t in weights(whole).items())


def test_features_of_another_encoder_or_transform_are_not_taken(story, tmp_path, encoded):
    shared = {"folder": str(tmp_path / "features")}
    for number, image in enumerate(({}, {"mode": "squash"}, {"resample": "bilinear"})):
        mine = recipe("llava", story, shared).model_copy(update={"image": image})
        encoded.clear()
        train(mine, tmp_path / str(number), progress=False)
        assert encoded, f"run {number} took the features of a run before it"


def test_features_that_tell_places_are_kept_apart_from_those_that_do_not(story, tmp_path, encoded):
    shared = {"folder": str(tmp_path / "features")}
    for kind in ("flamingo", "flamingo told places"):
        encoded.clear()
        train(recipe(kind, story, shared), tmp_path / kind, progress=False)
        assert encoded


def test_what_changes_at_every_step_is_refused(story, tmp_path):
    opened = recipe("llava", story, {}).model_dump(mode="json")
    opened["stages"][0]["stage"]["train"].append({"pattern": "vision.*", "lr": 1e-3})
    with pytest.raises(ConfigError, match=r"trains vision\..* features change at every step"):
        train(parse_recipe(opened), tmp_path / "a", progress=False)
    with pytest.raises(ConfigError, match="features change at every step"):
        check(parse_recipe(opened))
    clip = tree("clip")
    clip["stages"][0]["feature_cache"] = {}
    with pytest.raises(ConfigError, match="a clip has no feature cache"):
        train(parse_recipe(clip), tmp_path / "b", progress=False)
    clip["stages"][0]["augment"] = {"flip": True}
    with pytest.raises(ConfigError, match="take out augment or feature_cache"):
        parse_recipe(clip)
    clip["stages"][0]["feature_cache"] = {"gb": 3}
    with pytest.raises(ConfigError, match="gib"):
        parse_recipe(clip)


def test_tiles_and_an_image_mode_that_makes_none_are_refused(story, tmp_path):
    with pytest.raises(ConfigError, match="do not go together"):
        train(replaced(recipe("llava in tiles", story, None), "square"), tmp_path / "square", progress=False)
    with pytest.raises(ConfigError, match="do not go together"):
        train(replaced(recipe("llava", story, None), "anyres"), tmp_path / "anyres", progress=False)


def replaced(recipe, mode):
    stages = [stage.model_copy(update={"image_mode": mode}) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages})
