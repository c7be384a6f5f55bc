"""AnyRes against transformers' own functions, over many sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from isthmus.errors import ConfigError
from isthmus.nn.tiles import PINPOINTS, arrange, best_canvas, check_pinpoints, fitted, num_tokens, turned, unpadded

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
TOKENS = {  # width x height -> tokens of the published models, counted with transformers
    (336, 336): 1176,
    (400, 300): 1368,
    (640, 480): 2340,
    (672, 672): 2928,
    (1000, 600): 1948,
    (300, 900): 2376,
    (1600, 400): 1890,
}


@pytest.mark.parametrize(("picture", "tokens"), TOKENS.items())
def test_tokens_of_the_published_models(picture: tuple[int, int], tokens: int) -> None:
    width, height = picture
    assert num_tokens((height, width), PINPOINTS, tile=336, side=24) == tokens


@given(SIZES)
def test_the_canvas_is_the_reference_s_in_both_orders(size: tuple[int, int]) -> None:
    for pinpoints in (PINPOINTS, turned(PINPOINTS)):
        assert best_canvas(size, pinpoints) == select_best_resolution(size, list(pinpoints))
    if 336 < max(size) <= 3 * min(size):
        assert best_canvas(size, PINPOINTS) == best_canvas(size, turned(PINPOINTS))


@given(SIZES, st.sampled_from(PINPOINTS))
def test_what_is_left_of_the_map_is_the_reference_s(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    grid = (canvas[0] // 14, canvas[1] // 14)
    places = torch.arange(grid[0] * grid[1]).view(1, *grid)
    expected = unpad_image(places, size)[0]
    assert tuple(expected.shape) == unpadded(size, grid)
    if 0 in expected.shape:  # a picture this thin fills not one row of patches: the view of the whole is all there is
        assert num_tokens(size, (canvas,), tile=336, side=24) in (576, 576 + expected.shape[0])
        return
    tile = 336
    tokens = torch.arange(-576, grid[0] * grid[1]).float()
    views = tokens[576:].view(canvas[0] // tile, 24, canvas[1] // tile, 24).transpose(1, 2).reshape(-1, 576)
    stacked = torch.cat([tokens[None, :576], views])[..., None]
    found = arrange(stacked, size, (canvas,), tile=tile, newline=torch.tensor([7777.0]))[:, 0]
    lines = found[576:].view(expected.shape[0], -1)
    assert torch.equal(found[:576], tokens[:576])
    assert torch.equal(lines[:, :-1], expected.float())
    assert (lines[:, -1] == 7777).all()
    assert len(found) == num_tokens(size, (canvas,), tile=tile, side=24)


@given(SIZES, st.sampled_from(PINPOINTS))
def test_a_picture_fills_its_canvas_one_way(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    height, width = fitted(size, canvas)
    assert height == canvas[0] or width == canvas[1]
    assert 1 <= height <= canvas[0]
    assert 1 <= width <= canvas[1]


@pytest.mark.parametrize("canvas", [(336, 500), (0, 672), (-336, 672)])
def test_canvases_that_are_no_tiles_are_refused(canvas: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="whole tiles of 336 x 336"):
        check_pinpoints([canvas], 336)
