"""Captions that a first-stage BLIP-2 writes without any language model: searched and drawn."""

from dataclasses import replace

import pytest
import torch

from isthmus.errors import ConfigError
from isthmus.language import Decoding
from tests.models.tiny_blip2 import CLS, SEP, WORDS, pairs, tiny, tokens


@torch.no_grad()
def test_a_caption_without_a_language_model() -> None:
    net, batch = tiny(), pairs()
    start = replace(batch, text={"qformer": tokens([[WORDS - 1]] * 4)})
    decoding = Decoding(max_new_tokens=6, num_beams=3, stop_ids=(SEP,), min_new_tokens=2)
    found = net.generate(start, decoding)
    assert len({tuple(text) for text in found}) > 1  # it depends on the picture
    assert all(2 <= len(text) <= 6 for text in found)
    assert found[2] == net.generate(start.select([2]), decoding)[0]
    greedy = net.generate(start, Decoding(max_new_tokens=4))
    pixels = batch.visuals[0].pixels
    assert pixels is not None
    for row, text in enumerate(greedy):
        past = net.connector.encode_image(net.normed(pixels[row])).past
        for place, token in enumerate(text):
            logits = net.writing_logits(past, tokens([[CLS, *text[:place]]]))
            assert int(logits[0, -1].argmax()) == token
    with pytest.raises(ConfigError, match="passes the Q-Former's"):
        net.generate(start, Decoding(max_new_tokens=4000))


@torch.no_grad()
def test_captions_without_a_language_model_are_drawn_too() -> None:
    """CapFilt wants several unlike captions of a picture from any captioner."""
    net, batch = tiny(), pairs()
    start = replace(batch, text={"qformer": tokens([[WORDS - 1]] * 4)})
    draws = Decoding(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=(1, 2, 3, 4))
    found = net.generate(start, draws)
    assert found == net.generate(start, draws) != net.generate(start, replace(draws, seed=(5, 6, 7, 8)))
    for row in range(4):
        assert net.generate(start.select([row]), replace(draws, seed=row + 1)) == [found[row]]
    cold = net.generate(start, replace(draws, temperature=1e-4))
    assert cold == net.generate(start, Decoding(max_new_tokens=5))
    # The first token comes as often as its probability says.
    pixels = batch.visuals[0].pixels
    assert pixels is not None
    logits = net.writing_logits(net.connector.encode_image(net.normed(pixels[0])).past, tokens([[CLS]]))[0, -1]
    best = int(logits.argmax())
    first = Decoding(max_new_tokens=1, temperature=1.0)
    drawn = [net.generate(start.select([0]), replace(first, seed=n))[0][0] for n in range(400)]
    assert drawn.count(best) / 400 == pytest.approx(float(logits.softmax(-1)[best]), abs=0.1)
    twice = Decoding(max_new_tokens=12, no_repeat_ngram=1)
    assert all(len(set(text)) == len(text) for text in net.generate(start, twice))
    assert any(len(set(text)) < len(text) for text in net.generate(start, replace(twice, no_repeat_ngram=0)))
