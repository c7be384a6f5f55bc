"""Attention maps: a language model's attention to the visual tokens in its own sequence, traced back to the patches.

Legend: B rows, T tokens, R visual tokens of a visual, F frames, P patches.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.batch import Places
from isthmus.errors import CapabilityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def self_attention(lm: "PreTrainedModel", embeds: Float[Tensor, "B T D"]) -> Float[Tensor, "B layers T T"]:
    """(B, layers, T, T) attention of a causal LM of transformers over right-padded rows, the mean over heads.

    The library returns attention weights only from its eager kernel, which is set for this call. Raises
    CapabilityError for an LM that returns none.
    """
    before = cast(str, lm.config._attn_implementation)
    lm.set_attn_implementation("eager")
    try:
        found = lm.base_model(inputs_embeds=embeds, use_cache=False, output_attentions=True, return_dict=True)
    finally:
        lm.set_attn_implementation(before)
    layers = getattr(found, "attentions", None)
    if not layers or any(layer is None for layer in layers):
        raise CapabilityError(
            f"A {lm.config.model_type} language model returns no attention weights, so there is no map."
        )
    return torch.stack([layer.float().mean(1) for layer in layers], dim=1)


def patch_maps(
    weights: Float[Tensor, "B layers T T"],
    places: Places,
    lengths: Sequence[int],
    made_of: Sequence[Float[Tensor, "_ _ _"]],
) -> list[list[Float[Tensor, "layers _ _ _"]]]:
    """Per row and per its visual, in order of the places, a map (layers, T, F, P).

    ``weights`` are those of :func:`self_attention`; ``made_of`` says of each visual which patches its tokens were made
    of, (R, F, P). The map of one token sums to 1: its attention to this visual, distributed over the patches. A token
    before the visual has zeros.
    """
    rows: list[list[Tensor]] = [[] for _ in lengths]
    spots = zip(*(t.tolist() for t in (places.row, places.start, places.visual, places.length)), strict=True)
    for row, start, visual, length in sorted(spots):
        given = weights[row, :, : lengths[row], start : start + length]
        heat = torch.einsum("ltr,rfp->ltfp", given, made_of[visual].to(given))
        after = torch.arange(lengths[row], device=heat.device) >= start + length
        heat = heat * after[None, :, None, None]
        rows[row].append(heat / heat.sum((-2, -1), keepdim=True).clamp(min=1e-12))
    return rows
