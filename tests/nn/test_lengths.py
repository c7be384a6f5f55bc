"""Rows of like length together: the same rows come out, in their order, and less padding goes in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.nn.lengths import blocks_by_length, in_blocks

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=70).map(torch.tensor)


@given(LENGTHS)
def test_every_row_is_in_one_block(lengths: torch.Tensor) -> None:
    everyone = torch.arange(len(lengths))
    found = torch.cat([everyone[rows] for rows in blocks_by_length(lengths)])
    assert sorted(found.tolist()) == everyone.tolist()


@given(LENGTHS)
def test_blocks_are_made_only_where_they_save_padding(lengths: torch.Tensor) -> None:
    blocks = blocks_by_length(lengths)
    padded = sum(lengths[rows].numel() * int(lengths[rows].max()) for rows in blocks)
    whole = len(lengths) * int(lengths.max())
    assert padded <= 0.9 * whole if len(blocks) > 1 else padded == whole


def test_few_rows_and_equal_rows_stay_together() -> None:
    assert len(blocks_by_length(torch.arange(1, 16))) == 1
    assert len(blocks_by_length(torch.full((64,), 9))) == 1
    assert len(blocks_by_length(torch.arange(1, 65))) == 4


def test_half_precision_asks_for_larger_blocks() -> None:
    """A block casts all weights anew; on a machine with bf16 four small ones took a quarter longer than one."""
    few, many = torch.arange(1, 65), torch.arange(1, 65).repeat(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [len(blocks_by_length(lengths)) for lengths in (few, many)] == [1, 4]


@given(LENGTHS)
def test_outputs_come_back_in_the_order_of_the_rows(lengths: torch.Tensor) -> None:
    assert torch.equal(in_blocks(lengths, lambda rows: lengths[rows] * 2), lengths * 2)
