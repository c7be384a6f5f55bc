"""Processors: widening, truncation that never cuts a picture, prompts, saving."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from isthmus.batch import IGNORE
from isthmus.data.images import ImageTransform, as_image
from isthmus.data.processor import ContrastiveProcessor, SpliceProcessor, TextProcessor
from isthmus.data.processors import processor_from_dict
from isthmus.data.record import Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import assistant, byte_level, picture, record, user
from tests.narrow import must_be

TOKENIZER = byte_level()
IMAGE = ImageTransform.clip(8)
TALL = ImageTransform(size=8, mode="aspect", patch=4)


def splice(**options) -> SpliceProcessor:
    return SpliceProcessor(TOKENIZER, IMAGE, **{"num_tokens": 5, "template": "vicuna_bare", **options})


def test_contrastive_row_is_start_text_end():
    pair = record(picture(), Text(("a cat", "a red cube"), learn=True))
    processor = ContrastiveProcessor(TOKENIZER, IMAGE, context=77)
    for draw, caption in ((0, "a cat"), (1, "a red cube"), (2, "a cat")):
        example = processor.example(pair, draw)
        assert example.streams["text"].ids == [TOKENIZER.bos_id, *TOKENIZER.encode(caption), TOKENIZER.eos_id]
        assert example.streams["text"].labels is None
    assert processor.prompt(pair).streams == processor.example(pair, 0).streams
    assert torch.equal(must_be(torch.Tensor, example.pixels[0](example.visuals[0])), IMAGE(picture()))
    assert not example.places
    answer = record(picture(), user("describe"), assistant("a cat"))
    assert processor.example(answer).streams["text"].ids[1:-1] == TOKENIZER.encode("a cat")


def test_over_long_caption_keeps_the_context_and_its_end():
    processor = ContrastiveProcessor(TOKENIZER, IMAGE, context=6)
    ids = processor.text_example("the red cube and a small blue sphere and a cat").streams["text"].ids
    assert len(ids) == 6
    assert ids[0] == TOKENIZER.bos_id
    assert ids[-1] == TOKENIZER.eos_id
    exact = processor.text_example("x" * 4).streams["text"].ids
    assert exact == [TOKENIZER.bos_id, *TOKENIZER.encode("xxxx"), TOKENIZER.eos_id]


def test_contrastive_errors():
    processor = ContrastiveProcessor(TOKENIZER, IMAGE)
    for bad, words in (
        (record(Text("a")), "one picture a sample and this has 0"),
        (record(picture(), picture(), Text("a")), "has 2"),
        (record(picture(), Text(" ")), "empty text"),
        (record(picture(), user("q")), "one caption a sample and this has 0"),
    ):
        with pytest.raises(DataError, match=words):
            processor.example(bad)
    with pytest.raises(ConfigError, match="at least 2"):
        ContrastiveProcessor(TOKENIZER, IMAGE, context=1)


def test_a_tokenizer_without_a_start_gives_texts_none():
    bare = ContrastiveProcessor(Tokenizer(TOKENIZER.backend, eos="</s>"), IMAGE).text_example("a red cube")
    whole = ContrastiveProcessor(TOKENIZER, IMAGE).text_example("a red cube")
    assert [TOKENIZER.bos_id, *bare.streams["text"].ids] == whole.streams["text"].ids


def test_a_picture_is_widened_to_its_visual_tokens():
    example = splice().example(record(picture(), user("what?"), assistant("yes")))
    (place,) = example.places
    span = example.streams["lm"]
    before = [TOKENIZER.bos_id, *TOKENIZER.encode("USER: ")]
    assert (place.visual, place.stream, place.start, place.length) == (0, "lm", len(before), 5)
    assert span.ids[: place.start] == before
    assert span.ids[place.start : place.start + 5] == [TOKENIZER.pad_id] * 5
    assert span.labels is not None
    assert set(span.labels[: place.start + 5]) == {IGNORE}
    assert TOKENIZER.decode([x for x in span.labels if x != IGNORE], skip_special=False) == " yes</s>"
    assert len(example.visuals) == len(example.pixels) == 1


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_same_text_for_any_number_of_pictures(pictures):
    colours = [(255, 0, 0), (0, 0, 255)][:pictures]
    example = splice().example(record(*map(picture, colours), user("what?"), assistant("yes")))
    ids = list(example.streams["lm"].ids)
    for place in reversed(example.places):
        del ids[place.start : place.start + place.length]
    lines = "\n" * pictures
    assert TOKENIZER.decode(ids, skip_special=False) == f"<s>USER: {lines}what? ASSISTANT: yes</s>"
    assert len(example.places) == len(example.pixels) == pictures
    for colour, image, pixels in zip(colours, example.visuals, example.pixels, strict=True):
        assert torch.equal(must_be(torch.Tensor, pixels(image)), IMAGE(picture(colour)))


def test_truncation_leaves_the_picture_intact_at_the_front():
    long = record(picture(), user("what?"), assistant("yes no " * 1500))
    example = splice(num_tokens=576, max_length=2048, template="vicuna_v1").example(long)
    span = example.streams["lm"]
    assert len(span.ids) == len(span.labels or ()) == 2048
    (place,) = example.places
    assert place.start + place.length <= 2048
    assert place.length == 576
    whole = splice(num_tokens=576, max_length=9999, template="vicuna_v1").example(long)
    assert span.ids == whole.streams["lm"].ids[:2048]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.lists(st.booleans(), min_size=1, max_size=6))
def test_truncation_never_cuts_a_place(limit, turns):
    parts = [p for show in turns for p in ([picture()] if show else []) + [user("what?"), assistant("yes")]]
    whole = splice(max_length=10_000).example(record(*parts))
    try:
        example = splice(max_length=limit).example(record(*parts))
    except DataError as error:
        assert "nothing learnt" in str(error)  # noqa: PT017
        return
    span = example.streams["lm"]
    assert len(span.ids) <= limit
    assert span.ids == whole.streams["lm"].ids[: len(span.ids)]
    assert example.places == whole.places[: len(example.places)]
    assert len(example.visuals) == len(example.pixels) == len(example.places)
    assert all(p.start + p.length <= len(span.ids) for p in example.places)


def test_prompts_have_no_labels_and_end_at_the_answer():
    asked = record(picture(), user("what?"), assistant("yes"))
    example = splice().prompt(asked)
    span = example.streams["lm"]
    assert span.labels is None
    assert TOKENIZER.decode(span.ids[example.places[0].start + 5 :]) == "\nwhat? ASSISTANT:"
    assert splice().example(asked).streams["lm"].ids[: len(span.ids)] == span.ids
    text = TextProcessor(TOKENIZER, template="vicuna_bare").prompt(record(user("what?")))
    assert TOKENIZER.decode(text.streams["lm"].ids) == "USER: what? ASSISTANT:"
    assert TOKENIZER.decode(splice().prompt(record(picture(), Text("a cat", learn=True))).streams["lm"].ids) == ""
    for processor in (splice(max_length=4), TextProcessor(TOKENIZER, template="vicuna_bare", max_length=4)):
        with pytest.raises(DataError, match="prompt too long"):
            processor.prompt(record(user("what is it?"), assistant("yes")))


def test_text_processor():
    processor = TextProcessor(TOKENIZER, max_length=64)
    span = processor.example(record(Text("the red cube", learn=True))).streams["lm"]
    body = TOKENIZER.encode("the red cube")
    assert span.ids == [TOKENIZER.bos_id, *body, TOKENIZER.eos_id]
    assert span.labels == [IGNORE, *body, TOKENIZER.eos_id]
    chat = TextProcessor(TOKENIZER, template="vicuna_bare").example(record(user("what?"), assistant("yes")))
    assert TOKENIZER.decode([x for x in chat.streams["lm"].labels or () if x != IGNORE]) == " yes"
    with pytest.raises(DataError, match="picture without eyes"):
        processor.example(record(picture(), Text("a", learn=True)))


def test_nothing_learnt_says_why():
    with pytest.raises(DataError, match="first 8 tokens hold no token to be learnt"):
        splice(max_length=8).example(record(user("what is the red cube?"), assistant("yes")))
    with pytest.raises(DataError, match="no part of the sample is marked"):
        splice().example(record(user("what?"), assistant("yes", learn=False)))
    with pytest.raises(DataError, match="no part of the sample is marked"):
        TextProcessor(TOKENIZER).example(record(Text("the red cube")))


@pytest.mark.parametrize(
    "processor",
    [
        ContrastiveProcessor(TOKENIZER, IMAGE, context=12),
        splice(max_length=99),
        SpliceProcessor(TOKENIZER, TALL, num_tokens={"8x8": 4, "8x4": 2, "4x8": 3}, template="plain"),
        TextProcessor(TOKENIZER, max_length=9),
    ],
    ids=lambda p: p.kind,
)
def test_processors_survive_json(processor):
    described = json.loads(json.dumps(processor.to_dict()))
    again = processor_from_dict(described, TOKENIZER)
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict()
    assert again.image == processor.image


@pytest.mark.parametrize(("size", "shape", "places"), [((9, 9), (8, 8), 4), ((5, 20), (8, 4), 2), ((20, 5), (4, 8), 3)])
def test_places_follow_the_shape_of_a_picture(size, shape, places):
    counts = {"8x8": 4, "8x4": 2, "4x8": 3}
    processor = SpliceProcessor(TOKENIZER, TALL, num_tokens=counts, template="vicuna_bare")
    example = processor.prompt(record(as_image(PilImage.new("RGB", size)), user("what?")))
    assert [place.length for place in example.places] == [places]
    pixels = example.pixels[0](example.visuals[0])
    assert isinstance(pixels, torch.Tensor)
    assert tuple(pixels.shape[1:]) == shape


def test_configuration_errors():
    with pytest.raises(ConfigError, match="did you mean 'splice'"):
        processor_from_dict({"kind": "splise"}, TOKENIZER)
    with pytest.raises(ConfigError, match="missing or unknown option"):
        processor_from_dict({"kind": "text", "length": 3}, TOKENIZER)
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        splice(template="plane")
    with pytest.raises(ConfigError, match="at least one visual token"):
        splice(num_tokens=0)
    with pytest.raises(ConfigError, match=r"one of 4x8 pixels would take 0; with a larger image\.patch"):
        SpliceProcessor(TOKENIZER, TALL, num_tokens={"8x8": 4, "8x4": 2, "4x8": 0})
    with pytest.raises(ConfigError, match="every shape of a picture; 4x8 is missing"):
        SpliceProcessor(TOKENIZER, TALL, num_tokens={"8x8": 4, "8x4": 2})
    with pytest.raises(ConfigError, match="max_length must be"):
        TextProcessor(TOKENIZER, max_length=1)


def test_a_prompt_of_which_the_template_leaves_nothing_names_a_way_out():
    """`plain` reads pictures alone, and a language model such as SmolLM2 has no token that begins a text."""
    tokenizer = Tokenizer(TOKENIZER.backend, eos="</s>")
    processor = SpliceProcessor(tokenizer, IMAGE, num_tokens=5, template="plain")
    with pytest.raises(DataError, match=r"'plain' leaves out what is asked.*--template chat"):
        processor.prompt(record(user("what is there?")))
    assert len(processor.prompt(record(picture(), user("what is there?"))).streams["lm"].ids) == 5
