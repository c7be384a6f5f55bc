"""Every published size, without weights: our net takes exactly the names and shapes of the published layout.

The sizes are written down here as the papers and model files state them; the reference classes are built from them on
the meta device, and what they store must be what our preset stores after the key map. Layouts whose code is not
installed (OpenAI's and open_clip's) are listed by hand.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from isthmus.interop.hf_blip2 import from_hf as blip2_from_hf
from isthmus.interop.hf_blip2 import to_hf as blip2_to_hf
from isthmus.interop.hf_blip2_config import config_from_hf as blip2_config_from_hf
from isthmus.interop.hf_clip import clip_config_from_hf, clip_from_hf, clip_to_hf
from isthmus.interop.hf_llava import llava_config_from_hf, llava_from_hf
from isthmus.interop.open_clip import clip_from_open_clip
from isthmus.interop.openai import clip_from_openai, clip_to_openai
from isthmus.models.blip2 import Blip2
from isthmus.models.blip2 import Blip2Config as OurBlip2
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.llava import Llava
from isthmus.models.llava import LlavaConfig as OurLlava

Shapes = dict[str, tuple[int, ...]]


def shapes(state: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(build: Any, config: Any) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(build(config).state_dict())


# CLIP (2103.00020, table 20), SigLIP (2303.15343): width, layers, heads, patch, side of a picture; text; joint space.

CLIPS = {
    "ViT-B/32": (ClipConfig.vit_b_32, (768, 12, 12, 32, 224), (512, 12, 8), 512),
    "ViT-B/16": (ClipConfig.vit_b_16, (768, 12, 12, 16, 224), (512, 12, 8), 512),
    "ViT-L/14": (ClipConfig.vit_l_14, (1024, 24, 16, 14, 224), (768, 12, 12), 768),
    "ViT-L/14@336": (ClipConfig.vit_l_14_336, (1024, 24, 16, 14, 336), (768, 12, 12), 768),
}
SIGLIPS = {
    "B/16": (ClipConfig.siglip_b_16(), (768, 3072, 12, 12, 16, 224)),
    "B/16@512": (ClipConfig.siglip_b_16(512), (768, 3072, 12, 12, 16, 512)),
    "So400m/14@384": (ClipConfig.siglip_so400m_14(), (1152, 4304, 27, 16, 14, 384)),
}


def tower(width: int, layers: int, heads: int, hidden: int | None = None) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    preset, (width, layers, heads, patch, side), text, joint = CLIPS[name]
    config = CLIPConfig(
        text_config={**tower(*text), "projection_dim": joint, "eos_token_id": 49407},
        vision_config={**tower(width, layers, heads), "patch_size": patch, "image_size": side, "projection_dim": joint},
        projection_dim=joint,
    )
    _same_sizes(clip_config_from_hf(config.to_dict()), preset())
    _both_ways(on_meta(CLIPModel, config), preset())


@pytest.mark.parametrize("name", SIGLIPS)
def test_siglip(name: str) -> None:
    preset, (width, hidden, layers, heads, patch, side) = SIGLIPS[name]
    config = SiglipConfig(
        text_config={**tower(width, layers, heads, hidden), "vocab_size": 32000, "max_position_embeddings": 64},
        vision_config={**tower(width, layers, heads, hidden), "patch_size": patch, "image_size": side},
    )
    _same_sizes(clip_config_from_hf(config.to_dict()), preset)
    _both_ways(on_meta(SiglipModel, config), preset)


def _same_sizes(read: ClipConfig, preset: ClipConfig) -> None:
    assert (read.vision, read.embed_dim) == (preset.vision, preset.embed_dim)
    # Which token ends and pads a text is the tokenizer's: a bare configuration of transformers holds no true value.
    assert replace(read.text, eot_id=0, pad_id=0) == replace(preset.text, eot_id=0, pad_id=0)


def _both_ways(theirs: dict[str, torch.Tensor], config: ClipConfig) -> None:
    ours = on_meta(Clip, config)
    assert shapes(clip_from_hf(theirs, config)) == shapes(ours)
    stored = {name: t for name, t in theirs.items() if not name.endswith("position_ids")}
    assert shapes(clip_to_hf(ours, config)) == shapes(stored)


def openai_layout(vision: tuple[int, ...], text: tuple[int, ...], joint: int) -> Shapes:
    """The names of OpenAI's state dicts, without the three numbers that its archives add."""
    width, layers, _, patch, side = vision
    grid, across, deep = side // patch, text[0], text[1]
    found: Shapes = {
        "logit_scale": (),
        "text_projection": (across, joint),
        "positional_embedding": (77, across),
        "token_embedding.weight": (49408, across),
        "visual.proj": (width, joint),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid * grid + 1, width),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    found |= {f"ln_final.{leaf}": (across,) for leaf in ("weight", "bias")}
    found |= {f"visual.{ln}.{leaf}": (width,) for ln in ("ln_pre", "ln_post") for leaf in ("weight", "bias")}
    for prefix, size, depth in (("visual.transformer", width, layers), ("transformer", across, deep)):
        for at in (f"{prefix}.resblocks.{n}" for n in range(depth)):
            found |= {f"{at}.attn.in_proj_weight": (3 * size, size), f"{at}.attn.in_proj_bias": (3 * size,)}
            found |= {f"{at}.attn.out_proj.weight": (size, size), f"{at}.attn.out_proj.bias": (size,)}
            found |= {f"{at}.{ln}.{leaf}": (size,) for ln in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
            found |= {f"{at}.mlp.c_fc.weight": (4 * size, size), f"{at}.mlp.c_fc.bias": (4 * size,)}
            found |= {f"{at}.mlp.c_proj.weight": (size, 4 * size), f"{at}.mlp.c_proj.bias": (size,)}
    return found


@pytest.mark.parametrize("name", CLIPS)
def test_openai_and_open_clip(name: str) -> None:
    preset, vision, text, joint = CLIPS[name]
    layout = openai_layout(vision, text, joint)
    state = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    ours = on_meta(Clip, preset())
    assert shapes(clip_from_open_clip(state, preset())) == shapes(ours)
    assert shapes(clip_from_openai(state, preset())) == shapes(ours)
    written = shapes(clip_to_openai(ours, preset()))
    assert {key: shape for key, shape in written.items() if key in layout} == layout
    assert set(written) - set(layout) <= {"input_resolution", "context_length", "vocab_size"}


# LLaVA (2304.08485, 2310.03744): width, MLP, layers and heads of the language model.

LLAVAS = {
    "1.5-7b": (OurLlava.v1_5_7b, (4096, 11008, 32, 32)),
    "1.5-13b": (OurLlava.v1_5_13b, (5120, 13824, 40, 40)),
    "1.6-7b": (OurLlava.v1_6_7b, (4096, 11008, 32, 32)),
    "1.6-13b": (OurLlava.v1_6_13b, (5120, 13824, 40, 40)),
}


@pytest.mark.parametrize("name", LLAVAS)
def test_llava(name: str) -> None:
    """1.6 over Vicuna; its canvases are the library's default."""
    preset, (width, hidden, layers, heads) = LLAVAS[name]
    tiled = bool(preset().pinpoints)
    kind, model = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration) if tiled else (LlavaConfig, LlavaForConditionalGeneration)
    )
    config = kind(
        text_config={
            "model_type": "llama",
            **tower(width, layers, heads, hidden),
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        vision_config={"model_type": "clip_vision_model", **tower(1024, 24, 16), "patch_size": 14, "image_size": 336},
        tie_word_embeddings=False,
    )
    theirs = on_meta(model, config)
    ours = llava_config_from_hf(config.to_dict())
    want = shapes(on_meta(Llava, preset(32064)))
    assert shapes(llava_from_hf(theirs, ours)) == want
    assert shapes(llava_from_hf(theirs, preset(32064))) == want
    assert ours.pinpoints == preset().pinpoints
    assert (want.get("image_newline") == (width,)) == tiled == name.startswith("1.6")


# BLIP-2 (2301.12597), InstructBLIP (2305.06500). EVA's ViT-g/14 is 39 layers of 1408; transformers has no ViT-L row.

_G = {**tower(1408, 39, 16, 6144), "patch_size": 14, "image_size": 224, "qkv_bias": True}
_OPT = {"2.7b": (2560, 10240, 32, 32), "6.7b": (4096, 16384, 32, 32)}
_T5 = {"xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
_VICUNA = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}


def _opt(size: str) -> dict[str, Any]:
    width, hidden, layers, heads = _OPT[size]
    sizes = {"hidden_size": width, "ffn_dim": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "opt", **sizes, "word_embed_proj_dim": width, "vocab_size": 50272}


def _t5(size: str) -> dict[str, Any]:
    width, hidden, layers, heads = _T5[size]
    sizes = {"d_model": width, "d_ff": hidden, "num_layers": layers, "num_heads": heads, "d_kv": 64}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {"model_type": "t5", **sizes, **kind, "vocab_size": 32128}


def _vicuna(size: str) -> dict[str, Any]:
    width, hidden, layers, heads = _VICUNA[size]
    return {"model_type": "llama", **tower(width, layers, heads, hidden), "vocab_size": 32001}


BLIP2S = {
    "opt-2.7b": (OurBlip2.vit_g_opt_2_7b, _opt("2.7b")),
    "opt-6.7b": (OurBlip2.vit_g_opt_6_7b, _opt("6.7b")),
    "flan-t5-xl": (OurBlip2.vit_g_flan_t5_xl, _t5("xl")),
    "flan-t5-xxl": (OurBlip2.vit_g_flan_t5_xxl, _t5("xxl")),
    "instruct-vicuna-7b": (OurBlip2.instruct_vicuna_7b, _vicuna("7b")),
    "instruct-vicuna-13b": (OurBlip2.instruct_vicuna_13b, _vicuna("13b")),
    "instruct-flan-t5-xl": (OurBlip2.instruct_flan_t5_xl, _t5("xl")),
    "instruct-flan-t5-xxl": (OurBlip2.instruct_flan_t5_xxl, _t5("xxl")),
}


def blip2_of_transformers(name: str, words: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The library's configuration and tensors of a published size, ``words`` rows in the Q-Former's word table."""
    build, kind = (
        (InstructBlipForConditionalGeneration, InstructBlipConfig)
        if name.startswith("instruct")
        else (Blip2ForConditionalGeneration, Blip2Config)
    )
    qformer = {**tower(768, 12, 12), "cross_attention_frequency": 2, "encoder_hidden_size": 1408, "vocab_size": words}
    config = kind(vision_config=_G, qformer_config=qformer, text_config=BLIP2S[name][1], num_query_tokens=32)
    return config, on_meta(build, config)


@pytest.mark.parametrize("name", BLIP2S)
def test_blip2_and_instructblip(name: str) -> None:
    preset, _ = BLIP2S[name]
    config, theirs = blip2_of_transformers(name, 30523 if name.startswith("instruct") else 30522)
    want = on_meta(Blip2, preset())
    read = blip2_from_hf(theirs)
    assert shapes(read) == shapes(want)
    assert shapes(on_meta(Blip2, blip2_config_from_hf(config.to_dict()))) == shapes(want)
    stored = {key for key in theirs if not key.endswith("position_ids")}
    assert {key.removeprefix("model.") for key in blip2_to_hf(want, preset())} == {
        key.removeprefix("model.") for key in stored
    }
