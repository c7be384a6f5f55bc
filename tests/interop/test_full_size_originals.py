"""Every published size in the layouts of the original code, without weights: names and shapes accepted as they are.

That code is not installed, so the lists are put together here: the parts that it takes from transformers come from the
library's classes on the meta device, what is its own is written down by hand from the files' descriptions.
"""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, LlamaConfig, LlamaForCausalLM

from isthmus.interop.lavis import _eva, _qformer, from_lavis, to_lavis
from isthmus.interop.open_flamingo import trained_from_open_flamingo, trained_to_open_flamingo
from isthmus.interop.original_llava import llava_from_original, llava_to_original
from isthmus.models.blip2 import Blip2
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.vit import VisionConfig
from tests.interop.test_full_size import BLIP2S, blip2_of_transformers, on_meta, shapes, tower

State = dict[str, torch.Tensor]


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# LLaVA (haotian-liu/LLaVA): Llama's names, the tower under its own, the projector's layers by number.

LLAVAS = {
    "1.0-7b": (LlavaConfig.v1_7b, (4096, 11008, 32, 32), 224, 1),
    "1.0-13b": (LlavaConfig.v1_13b, (5120, 13824, 40, 40), 224, 1),
    "1.5-7b": (LlavaConfig.v1_5_7b, (4096, 11008, 32, 32), 336, 2),
    "1.5-13b": (LlavaConfig.v1_5_13b, (5120, 13824, 40, 40), 336, 2),
    "1.6-7b": (LlavaConfig.v1_6_7b, (4096, 11008, 32, 32), 336, 2),
    "1.6-13b": (LlavaConfig.v1_6_13b, (5120, 13824, 40, 40), 336, 2),
}


def original_llava(width: int, hidden: int, layers: int, heads: int, side: int, depth: int) -> State:
    text = LlamaConfig(**tower(width, layers, heads, hidden), vocab_size=32000)
    vision = CLIPVisionConfig(**tower(1024, 24, 16), patch_size=14, image_size=side, projection_dim=768)
    state = on_meta(LlamaForCausalLM, text)
    own = {n: t for n, t in on_meta(CLIPVisionModelWithProjection, vision).items() if n != "visual_projection.weight"}
    state |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in own.items()}
    sizes = [(1024, width), (width, width)][:depth]
    for n, (across, out) in enumerate(sizes):
        at = "model.mm_projector" if depth == 1 else f"model.mm_projector.{2 * n}"
        state |= {f"{at}.weight": empty(out, across), f"{at}.bias": empty(out)}
    return state


@pytest.mark.parametrize("name", LLAVAS)
def test_llava(name: str) -> None:
    preset, sizes, side, depth = LLAVAS[name]
    state = original_llava(*sizes, side, depth)
    if preset().pinpoints:
        state["model.image_newline"] = empty(sizes[0])
    want = on_meta(Llava, preset())
    assert shapes(llava_from_original(state, preset())) == shapes(want)
    assert shapes(llava_to_original(want, preset())) == shapes(state)
    tower_outside = {n: t for n, t in state.items() if "vision_tower" not in n}
    vision = {n.removeprefix("vision."): t for n, t in want.items() if n.startswith("vision.")}
    assert shapes(llava_from_original(tower_outside, preset(), vision=vision)) == shapes(want)


# LAVIS: transformers' classes under the original names.

_QFORMER = {
    "attention.attention.": "attention.self.",
    "crossattention.attention.": "crossattention.self.",
}


def lavis_names(theirs: State, kind: str) -> State:
    """The published conversion, backwards. q and v biases stand apart there, and keys have none."""
    projection, lm = {
        "opt": ("opt_proj", "opt_model"),
        "t5": ("t5_proj", "t5_model"),
        "llama": ("llm_proj", "llm_model"),
    }[kind]
    found: State = {}
    for key, tensor in theirs.items():
        name = key.removeprefix("model.")
        if name.endswith("position_ids"):
            continue
        if name.startswith("vision_model.encoder.layers."):
            number, _, rest = name.removeprefix("vision_model.encoder.layers.").partition(".")
            at = f"visual_encoder.blocks.{number}."
            if rest == "self_attn.qkv.bias":
                found |= {f"{at}attn.{part}_bias": empty(len(tensor) // 3) for part in "qv"}
                continue
            for a, b in (("self_attn.projection", "attn.proj"), ("self_attn.", "attn."), ("layer_norm", "norm")):
                rest = rest.replace(a, b)
            found[f"{at}{rest}"] = tensor
            continue
        for a, b in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "ln_vision"),
            ("language_projection", projection),
            ("language_model", lm),
            ("qformer.encoder.layer.", "Qformer.bert.encoder.layer."),
            ("qformer.embeddings.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.embeddings.", "Qformer.bert.embeddings."),
            ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
        ):
            if name.startswith(a):
                name = b + name.removeprefix(a)
                break
        for a, b in _QFORMER.items():
            name = name.replace(a, b)
        found[name] = tensor
    return found


@pytest.mark.parametrize("name", BLIP2S)
def test_lavis(name: str) -> None:
    preset, text = BLIP2S[name]
    _, theirs = blip2_of_transformers(name, 30523)
    state, want = lavis_names(theirs, text["model_type"]), on_meta(Blip2, preset())
    assert shapes(from_lavis(state, want, text["model_type"])) == shapes(want)
    assert shapes(to_lavis(_without_key_bias(want), text["model_type"])) == shapes(state)
    assert _eva(state) == VisionConfig.eva_g_14()
    assert _qformer(state, 1408) == preset().qformer


def _without_key_bias(state: State) -> State:
    """On the meta device a number cannot be seen to be zero."""
    zero = {n for n in state if n.startswith("vision.") and n.endswith("k_proj.bias")}
    return {n: t for n, t in state.items() if n not in zero}


# OpenFlamingo 2.0.1: what its checkpoint.pt holds.

RELEASED = 50280
"""Rows of the tables: GPT-NeoX's 50,277 tokens and the three new ones, less than the language models' 50,432."""
FLAMINGOS = {
    "3b": (FlamingoConfig.open_flamingo_3b, "transformer.blocks", 2048, 24, 1, ("transformer.wte",)),
    "4b": (FlamingoConfig.open_flamingo_4b, "gpt_neox.layers", 2560, 32, 2, ("gpt_neox.embed_in", "embed_out")),
    "9b": (FlamingoConfig.open_flamingo_9b, "transformer.blocks", 4096, 32, 4, ("transformer.wte",)),
}


def open_flamingo(path: str, width: int, layers: int, every: int, tables: tuple[str, ...]) -> State:
    def block(at: str, size: int, media: int, norm: str) -> State:
        attention = {"to_q": (512, size), "to_kv": (1024, media), "to_out": (size, 512)}
        mlp = {"0.weight": (size,), "0.bias": (size,), "1.weight": (4 * size, size), "3.weight": (size, 4 * size)}
        found = {f"{at}.{norm}.{part}.weight": empty(*shape) for part, shape in attention.items()}
        return found | {f"{at}.{'ff' if norm == 'attn' else '1'}.{leaf}": empty(*shape) for leaf, shape in mlp.items()}

    state = {"perceiver.latents": empty(64, 1024)}
    state |= {f"perceiver.norm.{leaf}": empty(1024) for leaf in ("weight", "bias")}
    for i in range(6):
        at = f"perceiver.layers.{i}"
        state |= block(at, 1024, 1024, "0")
        state |= {
            f"{at}.0.{n}.{leaf}": empty(1024) for n in ("norm_media", "norm_latents") for leaf in ("weight", "bias")
        }
    for j in range(every - 1, layers, every):
        at = f"lang_encoder.{path}.{j}.gated_cross_attn_layer"
        state |= block(at, width, 1024, "attn")
        state |= {f"{at}.attn.norm.{leaf}": empty(width) for leaf in ("weight", "bias")}
        state |= {f"{at}.{gate}": empty(1) for gate in ("attn_gate", "ff_gate")}
    return state | {f"lang_encoder.{table}.weight": empty(RELEASED, width) for table in tables}


@pytest.mark.parametrize("name", FLAMINGOS)
def test_open_flamingo(name: str) -> None:
    preset, *sizes = FLAMINGOS[name]
    state: Any = open_flamingo(*sizes)
    with torch.device("meta"):
        net = Flamingo(preset())
    want = {n: t for n, t in shapes(net.state_dict()).items() if not n.startswith(("vision.", "language.lm."))}
    assert shapes(trained_from_open_flamingo(state, net)) == want
    run = {"epoch": 3, "model_state_dict": {f"module.{n}": t for n, t in state.items()}}
    assert shapes(trained_from_open_flamingo(run, net)) == want
    assert shapes(trained_to_open_flamingo(net, RELEASED)) == shapes(state)
