"""A vision encoder of the user's own in each of the four systems: trained, opened, scored; what is wrong with one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import plain, strict
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.convert import write_model
from isthmus.nn.vit import VisionConfig, VisionTransformer, build_vision
from isthmus.opening import load
from isthmus.recipes.check import check
from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe, parse_recipe
from isthmus.testing.contracts import verify
from isthmus.user_code import pin, pinned_in
from tests.miniature import tree
from tests.narrow import must_be
from tests.recipes.test_blip2 import tree as blip2_tree
from tests.recipes.test_flamingo import recipe as flamingo_recipe
from tests.systems.test_own_system import EXAMPLES

SIZES: dict[str, Any] = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    return Path(shutil.copy(EXAMPLES / "my_encoder.py", folder))


@pytest.fixture(scope="module")
def place(file: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of that encoder, and the story's language model."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "lm").symlink_to(story / "lm")
    own = tree("clip")
    own["config"]["vision"] = {"kind": f"{file}:ConvNet", **SIZES, "options": {"kernel": 5}}
    train(pinned_in(own), folder / "clip", progress=False)
    return folder


def test_a_clip_learns_with_it_and_holds_every_contract(place: Path) -> None:
    model = load(place / "clip")
    assert type(model.net.vision).__name__ == "ConvNet"
    assert model.net.vision.blocks[0][0].kernel_size == (5, 5)
    assert {row.name for row in verify(model) if row.verdict == "FAIL"} == set()
    with pytest.raises(CheckpointError, match=r"encoder is of your own code, my_encoder\.py:ConvNet"):
        write_model(model, place / "hf", "hf")


@pytest.mark.parametrize("name", ["llava", "flamingo", "blip2"])
def test_the_others_take_it_as_their_part(place: Path, name: str) -> None:
    recipe: Recipe = {
        "llava": lambda: parse_recipe(tree("llava", place)),
        "flamingo": lambda: flamingo_recipe(place),
        "blip2": lambda: parse_recipe(blip2_tree(place)),
    }[name]()
    model = train(recipe, place / name, progress=False)
    assert type(model.net.vision).__name__ == "ConvNet"
    theirs = load(place / "clip").net.vision.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.net.vision.state_dict().items())
    assert {row.name for row in verify(model) if row.verdict == "FAIL"} <= {"picture matters"}  # Flamingo's gates


def test_a_preflight_with_an_encoder_of_transformers(file: Path) -> None:
    own = tree("clip") | {"evaluate": []}
    vit = {"model_type": "vit", "num_attention_heads": 2, "intermediate_size": 48}
    must_be(dict, own["config"])["vision"] = {"kind": f"{file}:Library", **SIZES, "options": {"settings": vit}}
    own["stages"][0]["train"] = [{"pattern": "vision.model.layers.*", "lr": 1e-3}, {"pattern": "text.*", "lr": 1e-3}]
    assert check(parse_recipe(pinned_in(own)), samples=0).problems == ()


def test_a_vision_transformer_is_said_as_before() -> None:
    config = VisionConfig(**SIZES, heads=2, mlp_width=48)
    assert {"kind", "options"}.isdisjoint(plain(config))
    assert strict(VisionConfig, plain(config), "vision") == config
    assert isinstance(build_vision(config), VisionTransformer)
    states = build_vision(config).hidden_states(torch.zeros(1, 3, 64, 64))
    assert [tuple(state.shape) for state in states] == [(1, 17, 32)] * 3


WRONG = """
import torch
from isthmus.nn.vit import VisionEncoder

class Short(VisionEncoder):
    def hidden_states(self, pixels):
        return [torch.zeros(len(pixels), 16, 32)] * 2

class WithClass(VisionEncoder):
    def hidden_states(self, pixels):
        return [torch.zeros(len(pixels), 17, 32)] * 3

class NotOne(torch.nn.Module):
    pass
"""


@pytest.mark.parametrize(
    ("cls", "own", "fault"),
    [
        ("Short", {}, r"Short gave the hidden states .*layers \+ 1 = 3, each \(1, 16, 32\)"),
        ("WithClass", {}, r"WithClass gave the hidden states \[\(1, 17, 32\)"),
        ("NotOne", {}, r"wrong\.py:NotOne' must be a class that derives from isthmus\.nn\.vit\.VisionEncoder"),
        ("Short", {"options": {"depth": 2}}, r"vision wrong\.py:Short: unknown option 'depth'"),
        ("", {"options": {"depth": 2}, "heads": 2, "mlp_width": 8}, "options belong to an encoder of your own"),
        ("", {"heads": 2}, "missing 'mlp_width'"),
    ],
)
def test_what_does_not_fit_says_so(tmp_path: Path, cls: str, own: dict[str, Any], fault: str) -> None:
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    kind = {"kind": pin(f"{tmp_path / 'wrong.py'}:{cls}")} if cls else {}
    with pytest.raises(ConfigError, match=fault):
        build_vision(strict(VisionConfig, {**SIZES, **kind, **own}, "vision"))(torch.zeros(1, 3, 64, 64), layers=(-1,))
