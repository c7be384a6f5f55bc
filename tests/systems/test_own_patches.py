"""The example without a vision encoder: pictures of any shape, maps, and what is said where a size is missing."""

import shutil
from pathlib import Path

import pytest
from PIL import Image as PilImage

from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from isthmus.errors import ConfigError
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.opening import load
from isthmus.recipes.build import build
from isthmus.recipes.check import SEES, UNTRAINED, check
from isthmus.recipes.run import train
from isthmus.recipes.schema import read_recipe
from isthmus.serving.engine import speaker_of
from isthmus.serving.limits import Limits
from isthmus.testing.contracts import verify
from tests.systems.test_own_system import EXAMPLES, LITTLE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("patches")
    for name in ("my_patches.py", "my_patches.yaml"):
        shutil.copy(EXAMPLES / name, place)
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    train(place / "my_patches.yaml", place / "run", overrides=LITTLE, progress=False)
    return load(place / "run")


def test_it_holds_every_contract(model: Model) -> None:
    assert {row.name for row in verify(model) if row.verdict == "FAIL"} == set()


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (4, 4)), ((90, 30), (1, 4)), ((30, 128), (4, 1)), ((9, 6), (3, 4))]
)
def test_a_picture_takes_the_places_of_its_shape(model: Model, size: tuple[int, int], grid: tuple[int, int]) -> None:
    picture = PilImage.effect_noise(size, 60).convert("RGB")
    record = Record(id="1", parts=(as_image(picture), Text("what?", role="user")))
    (found,) = model.attend([record], min_new_tokens=2, max_new_tokens=2)
    assert found.maps[0].shape[2:] == (1, *grid)
    assert found.maps[0].sum((-3, -2, -1)).min() > 0.99
    (place,) = model.processor.prompt(record).places
    assert place.length == grid[0] * (grid[1] + 1)


def test_it_is_served_though_it_reads_no_features(model: Model) -> None:
    picture = as_image(PilImage.effect_noise((40, 64), 60).convert("RGB"))
    record = Record(id="1", parts=(picture, Text("what?", role="user")))
    speaker = speaker_of(model, Limits())
    speaker.begin("row", model.processor.prompt(record), Decoding(min_new_tokens=2, max_new_tokens=2), None)
    said = [token.id for _ in range(2) for token in speaker.step() if token.id is not None]
    (answer,) = model.generate([record], min_new_tokens=2, max_new_tokens=2)
    assert model.processor.tokenizer.decode(said).strip() == answer


def test_a_preflight_tries_it(place: Path) -> None:
    checked = check(read_recipe(place / "my_patches.yaml", [*LITTLE, "evaluate=[]"]), samples=0)
    assert checked.problems == ()
    assert dict(checked.contracts) == dict.fromkeys((*UNTRAINED, SEES), "pass")


@pytest.mark.parametrize(("image", "fault"), [("{mode: squash}", "image.size"), ("null", "image.size")])
def test_without_a_size_of_pictures_it_says_so(place: Path, image: str, fault: str) -> None:
    recipe = read_recipe(place / "my_patches.yaml", [*LITTLE, f"image={image}"])
    with pytest.raises(ConfigError, match=fault):
        build(recipe).processor(recipe.stages[0])


def test_a_language_model_alone_has_no_use_for_pictures(place: Path) -> None:
    recipe = read_recipe(place / "my_patches.yaml", [*LITTLE, "model=lm", "evaluate=[]"])
    with pytest.raises(ConfigError, match="reads no pictures; take `image` out"):
        build(recipe).processor(recipe.stages[0])
