"""Visual tokens in their places, checked against writing them in by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.batch import Places
from isthmus.errors import ConfigError, DataError
from isthmus.nn.splice import at_places, splice


def places(*rows: tuple[int, int, int, int]) -> Places:
    row, visual, start, length = torch.tensor(rows).T
    return Places(row=row, visual=visual, start=start, length=length)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_splice_equals_writing_by_hand(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    found: list[tuple[int, int, int, int]] = []
    for row in range(rows):
        cuts = sorted(data.draw(st.lists(st.integers(0, width), max_size=4, unique=True)))
        found += [(row, 0, a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    order = data.draw(st.permutations(range(len(found))))
    found = [(row, visual, start, length) for (row, _, start, length), visual in zip(found, order, strict=True)]
    embeds = torch.randn(rows, width, 3)
    visual_tokens = [torch.randn(length, 3) for _, _, _, length in sorted(found, key=lambda p: p[1])]
    expected = embeds.clone()
    for row, visual, start, length in found:
        expected[row, start : start + length] = visual_tokens[visual]
    where = places(*found) if found else Places.none()
    assert torch.equal(splice(embeds, visual_tokens, where), expected)
    mark = torch.zeros(rows, width, dtype=torch.bool)
    for row, _, start, length in found:
        mark[row, start : start + length] = True
    assert torch.equal(at_places(where, torch.zeros(rows, width, dtype=torch.long)), mark)


def test_gradient_reaches_tokens_and_the_text_around_them_only() -> None:
    embeds = torch.zeros(2, 5, 3, requires_grad=True)
    visuals = torch.zeros(1, 2, 3, requires_grad=True)
    splice(embeds, visuals, places((1, 0, 2, 2))).sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[..., 0].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
    assert visuals.grad is not None
    assert visuals.grad.eq(1).all()


def test_a_visual_may_stand_twice_and_takes_the_dtype_of_the_text() -> None:
    visuals = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    found = splice(torch.zeros(1, 3, 2), visuals, places((0, 0, 0, 1), (0, 0, 2, 1)))
    assert found.dtype == torch.float32
    assert found[0, :, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([(0, 0, 0, 3)], "sample 'cat': the text keeps 3 places for visual 0, but the connector made 2"),
        ([(0, 0, 4, 2)], "stand at 4 to 6, outside the batch of 2 rows and 5 tokens"),
        ([(2, 0, 0, 2)], "row 2: visual 0 should stand"),
        ([(1, 0, 0, 2), (1, 0, 1, 2)], "sample 'dog': visual 0 starts at 1, inside the visual before it"),
        ([(1, 1, 0, 2)], "sample 'dog': a place is for visual 1, but the batch has 1"),
        ([], "visual 0 of the batch has no place"),
    ],
)
def test_errors_name_sample_and_numbers(where: list[tuple[int, int, int, int]], message: str) -> None:
    found = places(*where) if where else Places.none()
    with pytest.raises(DataError, match=message):
        splice(torch.zeros(2, 5, 3), torch.zeros(1, 2, 3), found, names=("cat", "dog"))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 2, 3)])
def test_tokens_of_another_width_or_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"the connector made \({shape[0]}.*number of tokens, 3"):
        splice(torch.zeros(1, 5, 3), [torch.zeros(shape)], places((0, 0, 1, 2)))
