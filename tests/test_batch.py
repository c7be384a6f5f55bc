"""Batch: selecting and splitting rows keeps every fact, and padding never decides anything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.batch import IGNORE, Batch, Places, Term, Tokens, Visuals
from tests.narrow import there


def make_batch(lengths: list[int], pictures: list[int]) -> Batch:
    """Row r has lengths[r] tokens valued 100*r + position and pictures[r] visuals filled with their own number."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for r, n in enumerate(lengths):
        ids[r, :n] = 100 * r + torch.arange(n)
        labels[r, n // 2 : n] = ids[r, n // 2 : n]
    owner = torch.tensor([r for r, k in enumerate(pictures) for _ in range(k)], dtype=torch.long)
    total = len(owner)
    pixels = torch.arange(total, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(total, 1, 3, 2, 2)
    visuals = (Visuals(index=torch.arange(total), pixels=pixels),) if total else ()
    places = {
        "lm": Places(
            row=owner, visual=torch.arange(total), start=torch.zeros_like(owner), length=torch.ones_like(owner)
        )
    }
    return Batch(
        ids=tuple(f"r{r}" for r in range(len(lengths))),
        sources=("s",) * len(lengths),
        text={"lm": Tokens(ids=ids, lengths=torch.tensor(lengths), labels=labels)},
        visuals=visuals,
        places=places,
        owner=owner,
        keys=tuple(f"k{n}" for n in range(total)),
    )


rows = st.lists(st.tuples(st.integers(2, 9), st.integers(0, 3)), min_size=1, max_size=6)


@given(rows, st.data())
def test_select_keeps_rows_visuals_and_places_together(shape, data):
    batch = make_batch([n for n, _ in shape], [k for _, k in shape])
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=len(batch), unique=True))
    small = batch.select(chosen)
    assert small.ids == tuple(batch.ids[r] for r in chosen)
    assert small.text["lm"].ids.shape[1] == max(shape[r][0] for r in chosen)
    assert small.num_visuals == sum(shape[r][1] for r in chosen)
    for group in small.visuals:
        for number, picture in zip(group.index.tolist(), there(group.pixels), strict=True):
            was = int(picture.flatten()[0])
            assert small.keys[number] == f"k{was}"
            assert chosen[int(small.owner[number])] == int(batch.owner[was])
    for row, visual in zip(small.places["lm"].row.tolist(), small.places["lm"].visual.tolist(), strict=True):
        assert int(small.owner[visual]) == row


@given(rows, st.integers(1, 8))
def test_split_covers_every_row_once_and_no_supervised_token_is_lost(shape, parts):
    batch = make_batch([n for n, _ in shape], [k for _, k in shape])
    pieces = batch.split(parts)
    assert [i for p in pieces for i in p.ids] == list(batch.ids)
    assert sum(p.supervised() for p in pieces) == batch.supervised()
    assert all(len(p) for p in pieces)


def test_mask_comes_from_lengths_not_from_an_id():
    tokens = Tokens(ids=torch.tensor([[0, 0, 5], [7, 0, 0]]), lengths=torch.tensor([3, 1]))
    assert tokens.mask.tolist() == [[True, True, True], [True, False, False]]


def test_term_mean():
    assert float(Term(torch.tensor(6.0), 4).mean) == pytest.approx(1.5)
