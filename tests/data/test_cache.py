"""The feature cache: what goes in comes out, in another process too; damage is found, the bound is kept."""

import pytest
import torch

from isthmus.data.cache import FeatureCache, Features
from isthmus.data.collate import collate, load_pixels
from isthmus.data.record import Example, Image, Span
from isthmus.errors import CheckpointError
from tests.evaluation.fakes import Word
from tests.narrow import there

MIB = 2**20


def test_features_are_kept_by_key_and_read_again(tmp_path):
    cache = FeatureCache(tmp_path / "new" / "folder", MIB)
    first, second = torch.randn(1, 9, 4), torch.randn(3, 5, 4)
    assert cache.get("a") is None
    cache.put("a", first)
    assert torch.equal(there(cache.get("a")), first)
    cache.put("b/ü", second.double())
    cache.put("a", second)  # a picture is kept once
    for found in (cache, FeatureCache(tmp_path / "new" / "folder", MIB)):
        assert len(found) == 2
        assert found.size == 4 * (first.numel() + second.numel())
        assert torch.equal(there(found.get("a")), first)
        assert torch.equal(there(found.get("b/ü")), second)


def test_what_does_not_fit_is_not_kept(tmp_path):
    cache = FeatureCache(tmp_path, 100)
    cache.put("a", torch.ones(1, 5, 4))
    cache.put("b", torch.ones(1, 5, 4))
    cache.put("c", torch.ones(1, 1, 5))
    assert [cache.get(k) is None for k in "abc"] == [False, True, False]
    assert (tmp_path / "features.bin").stat().st_size == cache.size == 100


def test_a_killed_process_leaves_nothing_that_matters(tmp_path):
    cache = FeatureCache(tmp_path, MIB)
    cache.put("a", torch.ones(1, 2, 3))
    with (tmp_path / "features.bin").open("ab") as file:
        file.write(b"an array without a line")
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"key": "b", "sha')
    again = FeatureCache(tmp_path, MIB)
    again.put("b", torch.full((1, 2, 3), 2.0))
    assert torch.equal(there(FeatureCache(tmp_path, MIB).get("b")), torch.full((1, 2, 3), 2.0))
    assert torch.equal(there(FeatureCache(tmp_path, MIB).get("a")), torch.ones(1, 2, 3))


def test_damage_is_found(tmp_path):
    FeatureCache(tmp_path, MIB).put("a", torch.ones(1, 2, 3))
    data, index = tmp_path / "features.bin", tmp_path / "index.jsonl"
    good = data.read_bytes()
    data.write_bytes(good[:5] + b"x" + good[6:])
    with pytest.raises(CheckpointError, match="damaged at byte 0"):
        FeatureCache(tmp_path, MIB).get("a")
    data.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="shorter than its index"):
        FeatureCache(tmp_path, MIB)
    data.write_bytes(good)
    index.write_text("{}\n" + index.read_text())
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        FeatureCache(tmp_path, MIB)


def test_kept_pictures_are_not_decoded(tmp_path):
    cache = FeatureCache(tmp_path, MIB)
    images = tuple(Image(Word(w), key=w) for w in ("cat", "dog", "cow"))
    decoded = []
    pixels = (lambda image: decoded.append(image.key) or torch.zeros(3, 4, 4),) * 3
    cache.put("cat", torch.ones(1, 9, 5))
    cache.put("cow", torch.full((1, 9, 5), 2.0))
    example = Example("x", "s", {"lm": Span([1, 2])}, visuals=images, pixels=pixels)
    made = load_pixels(cache.stand_in(example))
    assert decoded == ["dog"]
    assert [isinstance(make(image), Features) for make, image in zip(made.pixels, images, strict=True)] == [
        True,
        False,
        True,
    ]
    kept, drawn = collate([made]).visuals
    assert (kept.index.tolist(), drawn.index.tolist()) == ([0, 2], [1])
    assert kept.pixels is None
    assert there(kept.features).shape == (2, 1, 9, 5)
    assert drawn.features is None
    assert there(drawn.pixels).shape == (1, 1, 3, 4, 4)
