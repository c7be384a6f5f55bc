"""An answer in pieces is the answer."""

import pytest
from PIL import Image as PilImage

import isthmus
from isthmus.errors import CapabilityError, ConfigError, DataError
from tests.interop import tiny_models
from tests.models.tiny_blip2 import T5


@pytest.fixture(scope="module")
def llava(story):
    return isthmus.load(story / "llava")


def asked(picture=None):
    shown = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "what is it?"}]}]


@pytest.fixture
def picture():
    return PilImage.effect_noise((70, 50), 90).convert("RGB")


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3}, {"num_beams": 2}])
def test_pieces_together_are_the_answer(llava, picture, options):
    settings = {"max_new_tokens": 12, "min_new_tokens": 10, **options}
    found = list(llava.stream(asked(picture), **settings))
    assert "".join(found) == llava.chat(asked(picture), **settings) != ""
    assert (len(found) > 1) == ("num_beams" not in options)
    record = isthmus.Record(id="x", parts=(isthmus.Text("a red", role="user"),))
    assert "".join(llava.stream(record, **settings)) == llava.generate([record], **settings)[0]
    assert list(llava.stream(asked=asked(picture), **settings)) == found


def test_an_encoder_decoder_streams_too(picture):
    model = tiny_models.blip2({**T5, "vocab_size": tiny_models.ROWS})
    said = model.chat(asked(picture), max_new_tokens=8, min_new_tokens=8)
    assert "".join(model.stream(asked(picture), max_new_tokens=8, min_new_tokens=8)) == said


def test_what_cannot_be_streamed_is_refused_at_once(llava, story, picture):
    with pytest.raises(CapabilityError, match="This clip model cannot chat"):
        isthmus.load(story / "clip").stream(asked())
    with pytest.raises(DataError, match="must end with a question of the user's"):
        llava.stream([])
    with pytest.raises(ConfigError, match="no field 'max_tokens'"):
        llava.stream(asked(picture), max_tokens=3)
