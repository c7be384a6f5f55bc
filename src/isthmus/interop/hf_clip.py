"""CLIP and SigLIP in transformers' layout: full models, single towers, and folders with config.json.

Facts about that layout come from transformers 5.23. The library is not imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, nearest
from isthmus.interop.archives import read_state
from isthmus.interop.entries import Entry, Shapes, from_theirs, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, must, shards
from isthmus.interop.hf_files import (
    image_processor,
    swapped,
    tokenizer_files,
    with_dtype,
)
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.towers import TextEncoderConfig
from isthmus.nn.text_tower import TextConfig, TextTower
from isthmus.nn.vit import VisionConfig, VisionTransformer

_Reads = TypeVar("_Reads", ClipConfig, TextEncoderConfig)
_Tower = TypeVar("_Tower", VisionConfig, TextConfig)
LEGACY_EOT = 2
"""The end-of-text id that early configurations name by mistake; transformers' CLIP reads at the largest id instead."""

TOLERATED = ("embeddings.position_ids",)
"""Buffers of older files, recomputed by everybody."""

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}

# What transformers fills in for a key that a config.json leaves out.
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_DEFAULTS: dict[str, dict[str, object]] = {
    "clip_vision_model": {
        **_BASE,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
    },
    "siglip_vision_model": {
        **_BASE,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "vision_use_head": True,
    },
    "clip_text_model": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    },
    "siglip_text_model": {
        "vocab_size": 32000,
        **_BASE,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "projection_size": None,
    },
}

_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_CLIP_EOS = 49407


# Configurations.


class _TowerFields(TypedDict):
    """What is read of a tower's configuration once the defaults of its class are filled in."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class _VisionFields(_TowerFields):
    image_size: int | Sequence[int]
    patch_size: int | Sequence[int]
    num_channels: int
    vision_use_head: NotRequired[bool]


class _TextFields(_TowerFields):
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int
    pad_token_id: int | None
    projection_size: NotRequired[int | None]


class _ModelFields(TypedDict, total=False):
    """What is read of a model's config.json."""

    vision_config: Mapping[str, object] | None
    vision_config_dict: Mapping[str, object] | None
    text_config: Mapping[str, object] | None
    text_config_dict: Mapping[str, object] | None
    projection_dim: int
    logit_scale_init_value: float


class WrittenClip(TypedDict):
    """The config.json that is written."""

    architectures: list[str]
    model_type: str
    vision_config: dict[str, object]
    text_config: dict[str, object]
    projection_dim: NotRequired[int]
    logit_scale_init_value: NotRequired[float | None]


def clip_config_from_hf(config: Mapping[str, object]) -> ClipConfig:
    """From the config.json of a ``CLIPModel`` or ``SiglipModel``. Raises CheckpointError for another model's."""
    layout = config.get("model_type")
    if layout not in ("clip", "siglip"):
        raise CheckpointError(f"config.json: model_type {layout!r} is neither 'clip' nor 'siglip'.")
    values = cast(_ModelFields, config)
    override = (values.get("vision_config_dict"), values.get("text_config_dict")) if layout == "clip" else (None, None)
    vision = vision_config_from_hf(_tower(f"{layout}_vision_model", values.get("vision_config"), override[0]))
    text_values = _tower(f"{layout}_text_model", values.get("text_config"), override[1])
    text = text_config_from_hf(text_values)
    if layout == "clip":
        return ClipConfig(
            vision=vision,
            text=text,
            embed_dim=values.get("projection_dim", 512),
            init_scale=values.get("logit_scale_init_value", 2.6592),
        )
    return ClipConfig(
        vision=vision,
        text=text,
        embed_dim=cast(_TextFields, text_values).get("projection_size") or text.width,
        loss="sigmoid",
        vision_projection=False,
        text_projection_bias=True,
    )


def clip_config_to_hf(config: ClipConfig) -> WrittenClip:
    """A config.json that transformers opens. Raises CheckpointError for variants it has no place for."""
    layout = _layout(config)
    values: WrittenClip = {
        "architectures": [_CLASSES[layout]],
        "model_type": layout,
        "vision_config": vision_config_to_hf(config.vision),
        "text_config": text_config_to_hf(config.text),
    }
    if layout == "clip":
        values["projection_dim"] = config.embed_dim
        values["logit_scale_init_value"] = config.init_scale
    else:
        values["text_config"]["projection_size"] = config.embed_dim
    return values


def vision_config_from_hf(config: Mapping[str, object]) -> VisionConfig:
    """From a CLIP or SigLIP ``vision_config`` (its ``model_type`` says which; keys left out have their defaults)."""
    values = cast(_VisionFields, _filled(config))
    image_size, patch_size = _square(values["image_size"]), _square(values["patch_size"])
    activation = activation_from_hf(values["hidden_act"])
    if values["num_channels"] != 3:
        raise CheckpointError(f"vision_config: pictures have 3 channels here, not {values['num_channels']}.")
    siglip = partial(VisionConfig.siglip, pool="attention" if values.get("vision_use_head") else "none")
    tower = siglip if values["model_type"] == "siglip_vision_model" else VisionConfig
    return tower(
        image_size=image_size,
        patch_size=patch_size,
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        activation=activation,
        eps=values["layer_norm_eps"],
    )


def vision_config_to_hf(config: VisionConfig) -> dict[str, object]:
    """A ``vision_config``. Raises CheckpointError for a tower that is neither CLIP's nor SigLIP's."""
    layout = _vision_layout(config)
    values: dict[str, object] = {
        "model_type": f"{layout}_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": activation_to_hf(config.activation),
        "layer_norm_eps": config.eps,
    }
    return values if layout == "clip" else {**values, "vision_use_head": config.pool == "attention"}


def text_config_from_hf(config: Mapping[str, object]) -> TextConfig:
    """From a CLIP or SigLIP ``text_config``; end-of-text id 2 means pooling at the largest id, as it does there."""
    values = cast(_TextFields, _filled(config))
    vocab_size, eot, pad = values["vocab_size"], values["eos_token_id"], values["pad_token_id"] or 0
    if values["model_type"] == "siglip_text_model":
        # Such a tower is read at its last place; published configurations carry an end-of-text id outside the table.
        pool, eot = "last", eot if eot < vocab_size else pad
    elif eot == LEGACY_EOT:
        pool, eot = "argmax", min(_CLIP_EOS, vocab_size - 1)  # what the tower searches is CLIP's own end of text
    else:
        pool = "eot"
    return TextConfig(
        context=values["max_position_embeddings"],
        vocab_size=vocab_size,
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        activation=activation_from_hf(values["hidden_act"]),
        eps=values["layer_norm_eps"],
        pool=pool,
        eot_id=eot,
        pad_id=pad,
    )


def text_config_to_hf(config: TextConfig) -> dict[str, object]:
    """A ``text_config``."""
    layout = "clip" if config.causal else "siglip"
    return {
        "model_type": f"{layout}_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": activation_to_hf(config.activation),
        "layer_norm_eps": config.eps,
        "eos_token_id": LEGACY_EOT if config.pool == "argmax" else config.eot_id,
        "pad_token_id": config.pad_id,
    }


def _tower(
    model_type: str, own: Mapping[str, object] | None, override: Mapping[str, object] | None
) -> dict[str, object]:
    """One tower's configuration. A ``*_config_dict`` beside it wins and, being read alone, resets what it omits."""
    values = {"model_type": model_type, **(own or {})}
    if override is not None:
        values |= _DEFAULTS[model_type] | dict(override)
    return values


def _filled(config: Mapping[str, object]) -> dict[str, object]:
    layout = config.get("model_type")
    if not isinstance(layout, str) or layout not in _DEFAULTS:
        raise CheckpointError(f"model_type {layout!r} is no CLIP or SigLIP tower; {nearest(str(layout), _DEFAULTS)}")
    return _DEFAULTS[layout] | dict(config)


def _square(side: int | Sequence[int]) -> int:
    sides = [side, side] if isinstance(side, int) else list(side)
    if sides[0] != sides[1]:
        raise CheckpointError(f"vision_config: {sides[0]}x{sides[1]} is not square.")
    return sides[0]


def activation_from_hf(name: str) -> str:
    """Ours, by the name in ``hidden_act``. Raises CheckpointError for one that is not here."""
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"hidden_act {name!r} is unknown here; {nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_to_hf(name: str) -> str:
    """The inverse."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if name not in names:
        raise CheckpointError(f"transformers has no activation {name!r}; it can hold {', '.join(names)}.")
    return names[name]


def _vision_layout(config: VisionConfig) -> str:
    clip = (config.class_token, config.pre_norm, config.patch_bias, config.post_norm, config.pool)
    if clip == (True, True, False, "pooled", "class"):
        return "clip"
    if clip[:4] == (False, False, True, "all"):
        return "siglip"
    raise CheckpointError("transformers has neither a CLIP nor a SigLIP tower of this variant.")


def _layout(config: ClipConfig) -> str:
    """``clip`` or ``siglip``. The loss is a matter of training, but a bias has a place only in SigLIP."""
    layout = _vision_layout(config.vision)
    fits = (config.text.causal, config.vision_projection, config.text_projection_bias, config.init_bias is None)
    if fits != ((True, True, False, True) if layout == "clip" else (False, False, True, False)):
        raise CheckpointError(
            "transformers holds CLIP's towers with CLIP's head, or SigLIP's with SigLIP's; this model mixes them."
        )
    return layout


# Weights.


def clip_from_hf(state: Mapping[str, Tensor], config: ClipConfig, account: Account | None = None) -> dict[str, Tensor]:
    """Our state dict from a ``CLIPModel``'s or ``SiglipModel``'s; dtypes stay. Raises CheckpointError on any misfit."""
    with torch.device("meta"):
        shapes = shapes_of(Clip(config))
    what = _CLASSES[_layout(config)]
    return from_theirs(_clip(config), state, shapes, what, tolerated=TOLERATED, account=account)


def clip_to_hf(state: Mapping[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """Their state dict."""
    return to_theirs(_clip(config), state)


def vision_from_hf(
    state: Mapping[str, Tensor], config: VisionConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """A :class:`VisionTransformer`'s state dict from a ``CLIPVisionModel``'s or ``SiglipVisionModel``'s.

    Its keys may start with ``vision_model.`` (files of older versions) or not (newer ones).
    """
    with torch.device("meta"):
        shapes = shapes_of(VisionTransformer(config))
    return _single(_vision, "vision_model.", state, config, shapes, account)


def vision_to_hf(state: Mapping[str, Tensor], config: VisionConfig, *, prefix: str = "") -> dict[str, Tensor]:
    """Their state dict; ``prefix="vision_model."`` for the older layout."""
    return to_theirs(_vision(config, prefix, ""), state)


def text_from_hf(state: Mapping[str, Tensor], config: TextConfig, account: Account | None = None) -> dict[str, Tensor]:
    """A :class:`TextTower`'s state dict from a ``CLIPTextModel``'s; prefix as in :func:`vision_from_hf`."""
    with torch.device("meta"):
        shapes = shapes_of(TextTower(config))
    return _single(_text, "text_model.", state, config, shapes, account)


def text_to_hf(state: Mapping[str, Tensor], config: TextConfig, *, prefix: str = "") -> dict[str, Tensor]:
    """Their state dict; ``prefix="text_model."`` for the older layout."""
    return to_theirs(_text(config, prefix, ""), state)


def _single(
    entries: Callable[[_Tower, str, str], list[Entry]],
    prefix: str,
    state: Mapping[str, Tensor],
    config: _Tower,
    shapes: Shapes,
    account: Account | None,
) -> dict[str, Tensor]:
    found = prefix if any(name.startswith(prefix) for name in state) else ""
    rows = entries(config, found, "")
    return from_theirs(rows, state, shapes, "a single tower", tolerated=TOLERATED, account=account)


def _clip(config: ClipConfig) -> list[Entry]:
    siglip = _layout(config) == "siglip"
    rows = [Entry("logit_scale", ("heads.logit_scale",), boxed=siglip)]
    rows += _vision(config.vision, "vision_model.", "vision.") + _text(config.text, "text_model.", "text.")
    if siglip:
        rows.append(Entry("logit_bias", ("heads.logit_bias",), boxed=True))
        return rows + same("text_model.head", "heads.text_projection")
    return [
        *rows,
        *same("visual_projection", "heads.vision_projection", "weight"),
        *same("text_projection", "heads.text_projection", "weight"),
    ]


def _vision(config: VisionConfig, theirs: str, ours: str) -> list[Entry]:
    leaves = ("weight", "bias") if config.patch_bias else ("weight",)
    rows = same(f"{theirs}embeddings.patch_embedding", f"{ours}patch_embed", *leaves)
    rows.append(Entry(f"{theirs}embeddings.position_embedding.weight", (f"{ours}positions",)))
    if config.class_token:
        rows.append(Entry(f"{theirs}embeddings.class_embedding", (f"{ours}class_token",)))
    if config.pre_norm:
        rows += same(f"{theirs}pre_layrnorm", f"{ours}ln_pre")  # the misspelling is theirs
    rows += _blocks(f"{theirs}encoder.layers", f"{ours}blocks", config.layers)
    rows += same(f"{theirs}post_layernorm", f"{ours}ln_post")
    if config.pool == "attention":
        rows += _attention_pool(f"{theirs}head", f"{ours}pool")
    return rows


def _attention_pool(theirs: str, ours: str) -> list[Entry]:
    """SigLIP's head, whose attention keeps q, k and v in one matrix."""
    rows = [Entry(f"{theirs}.probe", (f"{ours}.probe",))]
    for leaf in ("weight", "bias"):
        stacked = tuple(f"{ours}.attn.{part}_proj.{leaf}" for part in "qkv")
        rows.append(Entry(f"{theirs}.attention.in_proj_{leaf}", stacked))
    rows += same(f"{theirs}.attention.out_proj", f"{ours}.attn.out_proj")
    rows += same(f"{theirs}.layernorm", f"{ours}.ln")
    return rows + same(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1") + same(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")


def _text(config: TextConfig, theirs: str, ours: str) -> list[Entry]:
    return [
        *same(f"{theirs}embeddings.token_embedding", f"{ours}tokens", "weight"),
        Entry(f"{theirs}embeddings.position_embedding.weight", (f"{ours}positions",)),
        *_blocks(f"{theirs}encoder.layers", f"{ours}blocks", config.layers),
        *same(f"{theirs}final_layer_norm", f"{ours}ln_final"),
    ]


def _blocks(theirs: str, ours: str, layers: int) -> list[Entry]:
    rows: list[Entry] = []
    for i in range(layers):
        a, b = f"{theirs}.{i}", f"{ours}.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows += same(f"{a}.self_attn.{part}", f"{b}.attn.{part}")
        rows += same(f"{a}.layer_norm1", f"{b}.ln_1") + same(f"{a}.layer_norm2", f"{b}.ln_2")
        rows += same(f"{a}.mlp.fc1", f"{b}.mlp.fc1") + same(f"{a}.mlp.fc2", f"{b}.mlp.fc2")
    return rows


# Folders.


def read_clip_folder(path: str | Path, account: Account | None = None) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Configuration and our state dict from a folder with config.json and weights (one file, or sharded).

    Raises CheckpointError when something is missing or does not fit.
    """
    config = clip_config_from_hf(read_json(Path(path) / "config.json"))
    return config, clip_from_hf(read_state(path, account), config, account)


def clip_export(model: Source[Clip, ContrastiveProcessor], *, shard_bytes: int) -> Export:
    config, state, tokenizer = model.net.config, model.net.state_dict(), model.processor.tokenizer
    must(config.similarity == "cosine", "similarity", config.similarity, "transformers", "cosine")
    if config.text.causal and config.text.pool == "eot" and config.text.eot_id == LEGACY_EOT:
        state, config, tokenizer = last_eot(state, config, tokenizer)
    described = clip_config_to_hf(config)
    described["text_config"]["bos_token_id"] = tokenizer.bos_id
    siglip = described["model_type"] == "siglip"
    weights = clip_to_hf(state, config)
    files = {
        "config.json": with_dtype(described, weights),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            tokenizer,
            begin=True,
            end=True,
            context=config.text.context,
            processor_class="SiglipProcessor" if siglip else "CLIPProcessor",
            pad_token=str(tokenizer.backend.id_to_token(config.text.pad_id if siglip else tokenizer.pad_id)),
        ),
        "preprocessor_config.json": image_processor(model.processor.image),
    }
    return Export(files=files, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)")


def last_eot(
    state: Mapping[str, Tensor], config: _Reads, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], _Reads, Tokenizer]:
    """The same model with its end-of-text under the tokenizer's largest id, where every reader finds it."""
    old, new = config.text.eot_id, tokenizer.vocab_size - 1
    table = state["text.tokens.weight"].clone()
    table[[old, new]] = table[[new, old]]
    text = replace(config.text, eot_id=new)
    return {**state, "text.tokens.weight": table}, replace(config, text=text), swapped(tokenizer, old, new)
