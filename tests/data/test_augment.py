import pytest
import torch
from PIL import Image as PilImage

from isthmus.data.augment import Augment
from isthmus.data.images import ImageTransform, as_image
from isthmus.data.loader import Loader
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.record import Example, Video
from isthmus.demo.scenes import SceneSource
from isthmus.demo.scenes.source import Form
from isthmus.errors import ConfigError
from isthmus.recipes.schema import read_recipe
from tests.data.helpers import byte_level, pixel
from tests.narrow import must_be

SQUASH = ImageTransform.siglip(16)


@pytest.fixture
def ramp() -> PilImage.Image:
    """Every pixel tells where it is: red its column, green its row."""
    picture = PilImage.new("RGB", (100, 60))
    picture.putdata([(x, y, 0) for y in range(60) for x in range(100)])
    return picture


def test_a_crop_keeps_aspect_and_at_least_its_share_of_the_area(ramp):
    shares = []
    for draw in range(200):
        found = Augment(crop=0.5).picture(ramp, draw)
        assert found.width / found.height == pytest.approx(100 / 60, rel=0.03)
        left, top, _ = pixel(found, (0, 0))
        right, bottom, _ = pixel(found, (found.width - 1, found.height - 1))
        assert (right - left + 1, bottom - top + 1) == found.size  # one piece of the picture, not scaled
        shares.append(found.width * found.height / 6000)
    assert 0.49 <= min(shares) < 0.55
    assert 0.95 < max(shares) <= 1
    assert len({Augment(crop=0.5).picture(ramp, d).getpixel((0, 0)) for d in range(200)}) > 100


def test_what_is_cut_into_tiles_is_not_cropped():
    example = Example(id="x", source="", streams={}, visuals=(as_image(PilImage.new("RGB", (9, 5))),))
    tiles = ImageTransform(size=8, mode="anyres", pinpoints=((8, 16), (16, 8)))
    with pytest.raises(ConfigError, match="only flip"):
        Augment(crop=0.5)(example, tiles, 0)
    assert len(must_be(torch.Tensor, Augment(flip=True)(example, tiles, 0).pixels[0](example.visuals[0]))) == 3


def test_a_flip_mirrors_about_half(ramp):
    mirrored = sum(pixel(Augment(flip=True).picture(ramp, d), (0, 0))[0] == 99 for d in range(400))
    assert 160 < mirrored < 240
    assert Augment().picture(ramp, 3).tobytes() == ramp.tobytes()


@pytest.mark.parametrize("crop", [0, -0.1, 1.5])
def test_a_share_that_makes_no_sense_is_refused(crop):
    with pytest.raises(ConfigError, match="crop"):
        Augment(crop=crop)


def _steps(augment, form: Form = "captions", steps=3, **options):
    processor = ContrastiveProcessor(byte_level(), SQUASH, context=64)
    source = SceneSource(form, count=8, **options)
    loader = Loader(source, processor, batch_size=4, group=False, augment=augment, prefetch=0)
    found = []
    for _, batches in loader.steps():
        found.append(batches[0].visuals[0].pixels)
        if len(found) == steps:
            return found
    raise AssertionError


def test_every_visit_is_drawn_anew_and_a_second_run_sees_the_same():
    plain, once, again = _steps(None, steps=4), _steps(Augment(crop=0.3), steps=4), _steps(Augment(crop=0.3), steps=4)
    for a, b, c in zip(plain, once, again, strict=True):
        assert torch.equal(b, c)
        assert not torch.equal(a, b)


def test_the_frames_of_a_clip_are_cropped_alike():
    clip = must_be(Video, SceneSource("clips", count=1, frames=3)[0].images[0])
    augment, draw = Augment(crop=0.3), 5
    frames = augment.pixels(clip, SQUASH, draw)
    assert frames.shape == (3, 3, 16, 16)
    for frame, seen in zip(clip.source.read(), frames, strict=True):
        assert torch.equal(SQUASH(augment.picture(frame, draw)), seen)


def test_a_recipe_names_it_and_an_unknown_key_is_refused():
    recipe = read_recipe("clip-tiny", ["stages.contrast.augment={crop: 0.8, flip: true}"])
    assert recipe.stages[0].augment == Augment(crop=0.8, flip=True)
    with pytest.raises(ConfigError, match="crop"):
        read_recipe("clip-tiny", ["stages.contrast.augment={corp: 0.8}"])
