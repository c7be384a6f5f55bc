"""Attention of a language model to visual tokens in its own sequence, and its way back to the patches."""

import pytest
import torch

from isthmus.batch import Places
from isthmus.errors import CapabilityError
from isthmus.language import LanguageModel
from isthmus.nn.attention_maps import patch_maps, self_attention
from tests.models.redrawn import redraw
from tests.models.tiny_llava import LANGUAGE


def places(*rows):
    row, visual, start, length = torch.tensor(rows).T
    return Places(row=row, visual=visual, start=start, length=length)


def test_a_map_shares_out_what_a_token_gave_to_the_visual():
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 3] = torch.tensor([0.1, 0.6, 0.2, 0.1])
    made_of = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.5, 0.5]]])  # two tokens of three patches
    ((found,),) = patch_maps(weights, places((0, 0, 1, 2)), [4], [made_of])
    assert found.shape == (1, 4, 1, 3)
    torch.testing.assert_close(found[0, 3, 0], torch.tensor([0.75, 0.125, 0.125]))
    assert not found[:, :3].any()  # before the visual, and within it


def test_maps_are_in_the_order_of_places_not_of_visuals():
    weights = torch.full((2, 1, 6, 6), 1 / 6)
    one, other = torch.eye(1)[:, None], torch.eye(2)[:, None]
    first, second = patch_maps(weights, places((0, 0, 3, 1), (0, 1, 0, 2), (1, 2, 0, 1)), [6, 2], [one, other, one])
    assert [m.shape[-1] for m in first] == [2, 1]
    assert [m.shape[1] for m in second] == [2]


@torch.no_grad()
def test_self_attention_is_causal_and_leaves_the_kernel_as_it_was():
    language = LanguageModel.build(LANGUAGE).eval()
    redraw(language)
    kernel = language.lm.config._attn_implementation
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = self_attention(language.lm, embeds)
    assert found.shape == (2, 2, 5, 5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 5))
    assert not found.triu(1).any()
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert language.lm.config._attn_implementation == kernel


def test_a_model_without_attention_says_so():
    language = LanguageModel.build(
        {"model_type": "mamba", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    )
    with pytest.raises(CapabilityError, match="mamba"):
        self_attention(language.lm, torch.randn(1, 3, 8))
