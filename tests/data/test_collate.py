"""Collate: rows, padding, numbering of pictures and places."""

from dataclasses import replace

import pytest
import torch

from isthmus.batch import IGNORE
from isthmus.data.collate import collate, load_pixels
from isthmus.data.images import BytesImage, ImageTransform
from isthmus.data.processor import ContrastiveProcessor, SpliceProcessor
from isthmus.data.record import Example, Image, Span, Text
from isthmus.errors import DataError
from tests.data.helpers import assistant, byte_level, picture, record, user

TOKENIZER = byte_level()
IMAGE = ImageTransform.clip(8)
SPLICE = SpliceProcessor(TOKENIZER, IMAGE, num_tokens=3, template="vicuna_bare")
RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))


def test_rows_pictures_and_places():
    records = [
        record(RED, BLUE, user("what?"), assistant("yes no"), id="two"),
        record(user("what?"), assistant("a"), id="none"),
        record(BLUE, user("what is the red cube?"), assistant("no"), id="one"),
    ]
    examples = [SPLICE.example(r) for r in records]
    batch = collate(examples)
    assert batch.ids == ("two", "none", "one")
    assert batch.sources == ("test",) * 3
    tokens = batch.text["lm"]
    assert tokens.labels is not None
    for row, example in enumerate(examples):
        span, length = example.streams["lm"], int(tokens.lengths[row])
        assert tokens.ids[row, :length].tolist() == span.ids
        assert tokens.labels[row, :length].tolist() == span.labels
        assert set(tokens.labels[row, length:].tolist()) <= {IGNORE}
    places = batch.places["lm"]
    assert places.row.tolist() == [0, 0, 2]
    assert places.visual.tolist() == [0, 1, 2]
    assert set(places.length.tolist()) == {3}
    for row, start in zip(places.row.tolist(), places.start.tolist(), strict=True):
        assert tokens.ids[row, start : start + 3].tolist() == [TOKENIZER.pad_id] * 3
    assert batch.owner.tolist() == [0, 0, 2]
    assert batch.keys == ("", "", "")  # nothing contrasts them
    keyed = collate([replace(example, keyed=True) for example in examples])
    assert keyed.keys == (RED.content_key(), BLUE.content_key(), BLUE.content_key())
    (group,) = batch.visuals
    assert group.pixels is not None
    assert group.pixels.shape == (3, 1, 3, 8, 8)
    assert torch.equal(group.pixels[1, 0], IMAGE(BLUE))


def test_pictures_are_grouped_by_shape_and_numbered_in_order():
    def made(size: int, id: str) -> Example:
        image = Image(BytesImage(b"", id), key=id)
        return Example(
            id, "s", {"text": Span([1, 2])}, (image,), (lambda image: torch.full((3, size, size), float(size)),)
        )

    batch = collate([made(4, "a"), made(6, "b"), made(4, "c")])
    assert [v.index.tolist() for v in batch.visuals] == [[0, 2], [1]]
    assert batch.keys == ("a", "b", "c")
    assert batch.text["text"].labels is None
    assert batch.places == {}


def test_select_and_split_agree_with_collating_the_rows():
    records = [record(RED, user("what?"), assistant("yes " * n), id=str(n)) for n in (1, 5, 2, 3)]
    examples = [SPLICE.example(r) for r in records]
    for part, rows in zip(collate(examples).split(2), (examples[:2], examples[2:]), strict=True):
        alone = collate(rows)
        assert torch.equal(part.text["lm"].ids, alone.text["lm"].ids)
        assert torch.equal(part.places["lm"].start, alone.places["lm"].start)
        assert part.keys == alone.keys


def test_a_damaged_picture_fails_alone_and_early():
    broken = Image(BytesImage(b"nothing", "broken.png"))
    example = ContrastiveProcessor(TOKENIZER, IMAGE).example(record(broken, Text("a cat")))
    with pytest.raises(DataError, match=r"broken\.png"):
        load_pixels(example)
    good = load_pixels(ContrastiveProcessor(TOKENIZER, IMAGE).example(record(RED, Text("a cat"))))
    assert good.pixels[0](RED) is good.pixels[0](RED)


def test_one_batch_takes_one_processor():
    pair = ContrastiveProcessor(TOKENIZER, IMAGE).example(record(RED, Text("a cat")))
    with pytest.raises(DataError, match="the examples of one processor"):
        collate([pair, SPLICE.example(record(user("q"), assistant("a")))])
    with pytest.raises(DataError, match="at least one example"):
        collate([])
