"""Rows against libraries of the peers' environment (`make peers`): open_clip and OpenFlamingo over exported weights.

They are imported where they are used: `make bench` runs these rows, both sides, with that environment's interpreter.
"""

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.side_by_side.models import Sizes, clip, flamingo
from benchmarks.side_by_side.samples import (
    contrast_records,
    interleaved_records,
    own_step,
    pixels_of,
    step,
    with_features,
)
from torch import nn

from isthmus.checkpoint import load_tensors, read_json
from isthmus.data.collate import collate
from isthmus.interop.convert import write_model
from isthmus.stage import Group, apply_stage


def clip_beside_open_clip(sizes: Sizes, rows: int) -> tuple[Any, Any]:
    """Loss and gradients of both towers. Texts are as long as they are here, and of the whole context there."""
    from open_clip.loss import ClipLoss  # type: ignore[import-not-found]
    from open_clip.model import CLIP, CustomTextCLIP  # type: ignore[import-not-found]

    model = clip(sizes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "open_clip"
        write_model(model, folder, "open_clip")
        config = read_json(folder / "open_clip_config.json")["model_cfg"]
        theirs: Any = (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config)
        theirs.load_state_dict(load_tensors(folder / "open_clip_model.safetensors"), strict=False)
    context = model.net.config.text.context
    examples = [model.processor.example(record, 0) for record in contrast_records(rows * 4, model.net.image_size)]
    batch = collate(examples)
    own = batch.text["text"].ids
    ids = torch.zeros(len(own), context, dtype=torch.long)
    ids[:, : own.shape[1]] = own.where(batch.text["text"].mask, 0)
    pixels, contrast = pixels_of(batch)[:, 0], ClipLoss()
    for net in (model.net, theirs):
        net.float().train().requires_grad_(True)

    def loss() -> torch.Tensor:
        return contrast(theirs.encode_image(pixels, True), theirs.encode_text(ids, True), theirs.logit_scale.exp())

    return own_step(model.net, batch, sizes), step(theirs, loss, sizes)


class _Visual(nn.Module):
    """A tower as open_clip gave it up to 2.22: (pooled, patch tokens before the last norm)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixels)
        return out.pooler_output, out.last_hidden_state[:, 1:]


@cache
def _opened(sizes: Sizes) -> tuple[Any, Any]:
    """Our Flamingo in OpenFlamingo's proportions, and theirs out of the folder that we export."""
    from open_flamingo.src.flamingo import Flamingo  # type: ignore[import-not-found]
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin  # type: ignore[import-not-found]
    from open_flamingo.src.utils import extend_instance  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    model = flamingo(sizes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "open_flamingo"
        write_model(model, folder, "open_flamingo")
        facts = read_json(folder / "open_flamingo.json")
        lm: Any = AutoModelForCausalLM.from_pretrained(folder / "lang_encoder")
        trained = torch.load(folder / "checkpoint.pt", weights_only=True)
        tower = CLIPVisionModel.from_pretrained(folder / "vision_encoder")
    lm.resize_token_embeddings(len(trained["lang_encoder.model.embed_tokens.weight"]))
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name(facts["decoder_layers_attr_name"])
    clip_like = nn.Module()
    clip_like.visual = _Visual(tower)
    config = model.net.config
    every = facts["cross_attn_every_n_layers"]
    theirs = Flamingo(clip_like, lm, config.end_id, config.image_id, config.vision.width, every)
    missing = theirs.load_state_dict(trained, strict=False)
    if missing.unexpected_keys:
        raise RuntimeError(f"keys of the export that OpenFlamingo does not know: {missing.unexpected_keys[:3]}")
    return model, theirs


def flamingo_beside_open_flamingo(sizes: Sizes, rows: int, *, cached: bool) -> tuple[Any, Any]:
    """Loss and gradients of resampler, gated blocks and the new tokens' rows."""
    model, theirs = _opened(sizes)
    apply_stage(model.net, tuple(Group(p, lr=1.0) for p in ("connector.*", "xattn.*", "language.new_rows.*")))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("perceiver", "gated_cross_attn", "embed_tokens")))
    model.net.float().train()
    theirs.float().train()
    examples = [model.processor.example(record, 0) for record in interleaved_records(rows, sizes.side)]
    text = collate(examples).text["lm"]
    pixels = pixels_of(collate(examples)).unflatten(0, (rows, -1))  # (B, pictures, frames, 3, H, W)
    if cached:
        with torch.no_grad():
            examples = [with_features(model.net, example) for example in examples]
    batch = collate(examples)

    def loss() -> torch.Tensor:
        return theirs(pixels, text.ids, attention_mask=text.mask.long(), labels=text.labels).loss

    return own_step(model.net, batch, sizes), step(theirs, loss, sizes)


flamingo_cached = partial(flamingo_beside_open_flamingo, cached=True)
flamingo_whole = partial(flamingo_beside_open_flamingo, cached=False)
