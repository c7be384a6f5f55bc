"""Where a model looked, as pictures."""

import io

import numpy as np
import torch
from PIL import Image as PilImage

from isthmus.comparison.attention_pictures import attention_pictures
from isthmus.comparison.curves import overlay
from isthmus.demo.scenes import SceneSource
from isthmus.opening import load


def test_what_was_looked_at_keeps_its_light_and_the_rest_is_dark():
    red = PilImage.new("RGB", (40, 20), (200, 0, 0))
    lit = np.asarray(overlay(red, torch.tensor([[0.0, 0.5]])), dtype=int)
    assert lit.shape == (20, 40, 3)
    assert (lit[:, -5:] == [200, 0, 0]).all()
    assert lit[:, :5, 0].max() < 60
    assert overlay(red, torch.zeros(1, 2)).size == (40, 20)  # nothing was looked at: no division by nothing


def test_every_design_shows_where_it_looked(rivals):
    source = SceneSource("questions", split="test", count=3)
    records = [source[i] for i in range(3)]
    for name in ("llava", "flamingo", "blip2"):
        model = load(rivals[name])
        found = attention_pictures(model, records, {"max_new_tokens": 3, "min_new_tokens": 2})
        assert list(found) == [r.id for r in records]
        assert PilImage.open(io.BytesIO(found[records[0].id])).size == (64, 64)
        texts = model.answer_records(records, max_new_tokens=3, min_new_tokens=2)
        assert [a.text for a in model.attend(records, max_new_tokens=3, min_new_tokens=2)] == texts
    assert attention_pictures(load(rivals["lm"]), records, {}) == {}
