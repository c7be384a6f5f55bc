"""Writes tests/fixtures/open_flamingo with open_flamingo 2.0.1: what isthmus' Flamingo is held against.

Run in the peers' environment:  .venv-peers/bin/python tools/write_open_flamingo_fixtures.py

Tiny random models on three families of language models with gates away from zero: the checkpoint's tensors under the
keys that open_flamingo writes, the frozen language model and vision encoder, and what it answers to rows with ragged
tags. Resampler and block also in float64, for float32 rounds either side by more than 1e-6. Weights are rounded to
half precision before anything is computed, so that the small files hold them exactly.
"""

# Its libraries are in the peers' environment alone.
# pyright: reportMissingImports=false

import json
from pathlib import Path

import torch
from open_flamingo.src.flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.helpers import GatedCrossAttentionBlock, PerceiverResampler
from open_flamingo.src.utils import extend_instance
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "open_flamingo"
TEXT, END, IMAGE = 40, 40, 41
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
RESAMPLER = {"depth": 2, "dim_head": 8, "heads": 2, "num_latents": 5}
LANGUAGE = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "mpt": {"d_model": 16, "n_layers": 4, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2},
}
LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "mpt": "transformer.blocks"}
EVERY = {"llama": 1, "gpt_neox": 2, "mpt": 4}


class Visual(nn.Module):
    """A tower as open_clip gave it up to 2.22: (pooled, patch tokens before the last norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixels)
        return out.pooler_output, out.last_hidden_state[:, 1:]


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()


def rounded(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn_like(parameter) * 0.25
            value = noise if parameter.ndim > 1 else parameter + noise
            parameter.copy_(value.half().float())


def ids_and_tags() -> torch.Tensor:
    """Four rows of 12: tags at unlike places, text before the first, two tags side by side."""
    ids = torch.randint(0, TEXT, (4, 12), generator=torch.Generator().manual_seed(3))
    for row, places in enumerate(((0, 6), (2, 3), (4, 11), (1, 8))):
        ids[row, list(places)] = IMAGE
    ids[0, 5] = ids[3, 7] = END
    return ids


def write(family: str) -> None:
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, vocab_size=TEXT, **LANGUAGE[family])
    lm = AutoModelForCausalLM.from_config(config)
    lm.resize_token_embeddings(TEXT + 2)
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name(LAYERS[family])
    net = Flamingo(Clip(), lm, END, IMAGE, vis_dim=16, cross_attn_every_n_layers=EVERY[family]).eval()
    net.perceiver = PerceiverResampler(dim=16, **RESAMPLER)
    rounded(net)
    with torch.no_grad():
        for block in lm.gated_cross_attn_layers:
            if block is not None:
                block.attn_gate.fill_(0.75)
                block.ff_gate.fill_(0.5)
    pixels = torch.randn(4, 2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).half().float()
    ids = ids_and_tags()
    features = torch.randn(2, 3, 1, 4, 16, generator=torch.Generator().manual_seed(2))
    hidden = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(4))
    tags = torch.zeros(2, 8, dtype=torch.bool)
    tags[0, [1, 5]] = tags[1, [2, 3]] = True
    block = next(b for b in lm.gated_cross_attn_layers if b is not None)
    assert isinstance(block, GatedCrossAttentionBlock)
    with torch.no_grad():
        logits = net(pixels, ids, attention_mask=torch.ones_like(ids)).logits
        resampled = net.perceiver(features)
        blocked = block(hidden, resampled[:, :2], media_locations=tags, use_cached_media=False)
        exactly = net.perceiver.double()(features.double())
        exactly_blocked = block.double()(
            hidden.double(), resampled[:, :2].double(), media_locations=tags, use_cached_media=False
        )
    exact = {"resampled64": exactly, "blocked64": exactly_blocked}
    net.float()
    state = {k: v for k, v in net.state_dict().items() if "old_decoder_blocks" not in k}
    state = {k: v for k, v in state.items() if not k.startswith("lang_encoder.gated_cross_attn_layers")}
    tensors = {f"net/{k}": v.half().contiguous() for k, v in state.items() if v.is_floating_point()}
    if lm.get_output_embeddings().weight is lm.get_input_embeddings().weight:
        tensors.pop("net/lang_encoder.lm_head.weight", None)
    tensors |= {"pixels": pixels.half(), "ids": ids, "logits": logits}
    tensors |= {"features": features, "resampled": resampled, "hidden": hidden, "tags": tags.long(), "blocked": blocked}
    tensors |= exact
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, FOLDER / f"{family}.safetensors")
    facts = {
        "family": family,
        "layers": LAYERS[family],
        "language": LANGUAGE[family],
        "vision": VISION,
        "resampler": RESAMPLER,
        "every": EVERY[family],
        "text": TEXT,
        "end": END,
        "image": IMAGE,
    }
    (FOLDER / f"{family}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in LANGUAGE:
        write(name)
