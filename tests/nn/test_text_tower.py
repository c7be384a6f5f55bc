"""Pooling at end-of-text, padding, truncation to the longest row, refusals."""

from typing import Literal

import pytest
import torch

from isthmus.errors import ConfigError, DataError
from isthmus.nn.lengths import blocks_by_length
from isthmus.nn.text_tower import TextConfig, TextTower

EOT, VOCAB = 30, 40


def _tower(pool: Literal["eot", "argmax", "last"] = "eot") -> TextTower:
    torch.manual_seed(0)
    tower = TextTower(
        TextConfig(
            context=10, vocab_size=VOCAB, width=16, layers=2, heads=2, mlp_width=32, pool=pool, eot_id=EOT, pad_id=1
        )
    ).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, EOT, (3, 7))
    lengths = torch.tensor([4, 6, 5])
    ids[torch.arange(3), lengths - 1] = EOT
    return ids, lengths


@torch.no_grad()
def test_padding_never_matters_to_a_causal_tower():
    tower, (ids, lengths) = _tower(), _rows()
    expected = tower(ids, lengths)
    for padding in (0, EOT, VOCAB - 1):
        padded = torch.nn.functional.pad(ids, (0, 3), value=padding)
        padded = padded.masked_fill(torch.arange(10)[None] >= lengths[:, None], padding)
        torch.testing.assert_close(tower(padded, lengths), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(tower(ids[:1, :4], lengths[:1]), expected[:1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_many_rows_of_unlike_length_come_out_as_each_alone(monkeypatch):
    monkeypatch.setattr("isthmus.nn.lengths._FEWEST_TOKENS", 64)
    tower, lengths = _tower(), torch.arange(24) % 8 + 2
    ids = torch.randint(2, EOT, (24, 10))
    ids[torch.arange(24), lengths - 1] = EOT
    assert len(blocks_by_length(lengths)) > 1
    alone = torch.cat([tower(ids[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(tower(ids, lengths), alone, atol=1e-12, rtol=0)


@torch.no_grad()
def test_tokens_after_end_of_text_are_unseen():
    tower, (ids, lengths) = _tower(), _rows()
    longer = torch.cat([ids, torch.randint(2, EOT, (3, 3))], dim=1)
    torch.testing.assert_close(tower(longer, torch.full_like(lengths, 10)), tower(ids, lengths), atol=1e-12, rtol=0)


def test_nothing_right_of_the_longest_end_of_text_is_computed():
    tower, (ids, lengths) = _tower(), _rows()
    widths = []
    tower.blocks[0].register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    tower(torch.nn.functional.pad(ids, (0, 3)), lengths)
    assert widths == [6]


@torch.no_grad()
def test_largest_id_and_explicit_pooling_agree_until_a_higher_id_appears():
    explicit, largest = _tower("eot"), _tower("argmax")
    ids, lengths = _rows()
    torch.testing.assert_close(explicit(ids, lengths), largest(ids, lengths))
    ids[0, 1] = VOCAB - 1
    assert torch.equal(explicit(ids, lengths)[1:], largest(ids, lengths)[1:])
    assert not torch.allclose(explicit(ids, lengths)[0], largest(ids, lengths)[0])
    other = ids.clone()
    other[0, 2] = ids[0, 2] % (EOT - 2) + 2  # after the higher id and before the end of text
    assert torch.allclose(largest(other, lengths)[0], largest(ids, lengths)[0])
    assert not torch.allclose(explicit(other, lengths)[0], explicit(ids, lengths)[0])


@pytest.mark.parametrize("pool", ["eot", "argmax"])
def test_a_row_without_end_of_text_is_refused(pool):
    ids, lengths = _rows()
    ids[1, 5] = 3
    with pytest.raises(DataError, match="row 1 has no end-of-text"):
        _tower(pool)(ids, lengths)


def test_an_end_of_text_in_the_padding_does_not_count():
    ids, _ = _rows()
    with pytest.raises(DataError, match="row 0 has no end-of-text"):
        _tower()(ids, torch.tensor([3, 6, 5]))


@torch.no_grad()
def test_a_tower_read_at_its_last_place_ignores_batch_padding():
    tower, (ids, lengths) = _tower("last"), _rows()
    pooled = tower(ids, lengths)
    torch.testing.assert_close(tower(torch.nn.functional.pad(ids, (0, 3), value=7), lengths), pooled)
    filled = torch.full((3, 10), 1)
    for row, length in enumerate(lengths):
        filled[row, :length] = ids[row, :length]
    torch.testing.assert_close(tower(filled, torch.full((3,), 10)), pooled)
    filled[:, -2] = 7
    assert not torch.allclose(tower(filled, torch.full((3,), 10)), pooled)


def test_too_long_a_row():
    with pytest.raises(DataError, match="row 0 has 11 tokens; the text tower reads at most 10"):
        _tower()(torch.full((1, 11), EOT), torch.tensor([11]))


def test_ids_outside_the_vocabulary():
    with pytest.raises(ConfigError, match="eot_id 40 lies outside"):
        TextConfig(vocab_size=40, width=16, layers=1, heads=2, mlp_width=32, eot_id=40)


def test_start_deviations():
    torch.manual_seed(0)
    tower = TextTower(TextConfig(vocab_size=500, width=128, layers=2, heads=2, mlp_width=512, eot_id=499))
    assert tower.tokens.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert tower.positions.std().item() == pytest.approx(0.01, rel=0.03)
