"""CLIP's and SigLIP's towers in transformers' layout: configuration and weights of each by itself.

Facts about that layout come from transformers 5.23. The library is not imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from isthmus.errors import CheckpointError, nearest
from isthmus.interop.entries import Entry, Shapes, from_theirs, same, shapes_of, to_theirs
from isthmus.load_report import Account
from isthmus.nn.text_tower import TextConfig, TextTower
from isthmus.nn.vit import VisionConfig, VisionTransformer

LEGACY_EOT = 2
"""The end-of-text id that early configurations name by mistake; transformers' CLIP reads at the largest id instead."""

TOLERATED = ("embeddings.position_ids",)
"""Buffers of older files, recomputed by everybody."""

_CLIP_EOS = 49407
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


# Configurations.


class TowerFields(TypedDict):
    """What every tower's configuration there has, and is read once the defaults of its class are filled in."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class _VisionFields(TowerFields):
    image_size: int | Sequence[int]
    patch_size: int | Sequence[int]
    num_channels: int
    vision_use_head: NotRequired[bool]


class TextFields(TowerFields):
    """Of a text tower; ``projection_size`` is SigLIP's."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int
    pad_token_id: int | None
    projection_size: NotRequired[int | None]


Fields = TypeVar("Fields", bound=TowerFields)
_Tower = TypeVar("_Tower", VisionConfig, TextConfig)

# What transformers fills in for a key that a config.json leaves out.
_VISION: dict[str, _VisionFields] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "vision_use_head": True,
    },
}
_TEXT: dict[str, TextFields] = {
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
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "projection_size": None,
    },
}


def filled(defaults: Fields, config: Mapping[str, object]) -> Fields:
    """A tower's configuration, with the defaults of its class for what it leaves out."""
    return cast(Fields, {**defaults, **config})


def vision_config_from_hf(config: Mapping[str, object]) -> VisionConfig:
    """From a CLIP or SigLIP ``vision_config`` (its ``model_type`` says which; keys left out have their defaults)."""
    layout = _known(config, _VISION)
    values = filled(_VISION[layout], config)
    image_size, patch_size = _square(values["image_size"]), _square(values["patch_size"])
    activation = activation_from_hf(values["hidden_act"])
    if values["num_channels"] != 3:
        raise CheckpointError(f"vision_config: pictures have 3 channels here, not {values['num_channels']}.")
    siglip = partial(VisionConfig.siglip, pool="attention" if values.get("vision_use_head") else "none")
    tower = siglip if layout == "siglip_vision_model" else VisionConfig
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
    layout = vision_layout(config)
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
    values = text_fields(config)
    vocab_size, eot, pad = values["vocab_size"], values["eos_token_id"], values["pad_token_id"] or 0
    if config["model_type"] == "siglip_text_model":
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


def text_fields(config: Mapping[str, object]) -> TextFields:
    """What is read of a ``text_config``, the defaults of its ``model_type`` filled in."""
    return filled(_TEXT[_known(config, _TEXT)], config)


def overridden(
    model_type: str, own: Mapping[str, object] | None, override: Mapping[str, object] | None
) -> dict[str, object]:
    """One tower's configuration. A ``*_config_dict`` beside it wins and, being read alone, resets what it omits."""
    values = {"model_type": model_type, **(own or {})}
    return values if override is None else {**values, **{**_VISION, **_TEXT}[model_type], **override}


def _known(config: Mapping[str, object], classes: Mapping[str, object]) -> str:
    """The ``model_type`` of a configuration, one of the classes."""
    layout = config.get("model_type")
    if not isinstance(layout, str) or layout not in classes:
        raise CheckpointError(f"model_type {layout!r} is no CLIP or SigLIP tower; {nearest(str(layout), classes)}")
    return layout


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


def vision_layout(config: VisionConfig) -> str:
    clip = (config.class_token, config.pre_norm, config.patch_bias, config.post_norm, config.pool)
    if clip == (True, True, False, "pooled", "class"):
        return "clip"
    if clip[:4] == (False, False, True, "all"):
        return "siglip"
    raise CheckpointError("transformers has neither a CLIP nor a SigLIP tower of this variant.")


# Weights.


def vision_from_hf(
    state: Mapping[str, Tensor], config: VisionConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """A :class:`VisionTransformer`'s state dict from a ``CLIPVisionModel``'s or ``SiglipVisionModel``'s.

    Its keys may start with ``vision_model.`` (files of older versions) or not (newer ones).
    """
    with torch.device("meta"):
        shapes = shapes_of(VisionTransformer(config))
    return _single(vision_entries, "vision_model.", state, config, shapes, account)


def vision_to_hf(state: Mapping[str, Tensor], config: VisionConfig, *, prefix: str = "") -> dict[str, Tensor]:
    """Their state dict; ``prefix="vision_model."`` for the older layout."""
    return to_theirs(vision_entries(config, prefix, ""), state)


def text_from_hf(state: Mapping[str, Tensor], config: TextConfig, account: Account | None = None) -> dict[str, Tensor]:
    """A :class:`TextTower`'s state dict from a ``CLIPTextModel``'s; prefix as in :func:`vision_from_hf`."""
    with torch.device("meta"):
        shapes = shapes_of(TextTower(config))
    return _single(text_entries, "text_model.", state, config, shapes, account)


def text_to_hf(state: Mapping[str, Tensor], config: TextConfig, *, prefix: str = "") -> dict[str, Tensor]:
    """Their state dict; ``prefix="text_model."`` for the older layout."""
    return to_theirs(text_entries(config, prefix, ""), state)


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


def vision_entries(config: VisionConfig, theirs: str, ours: str) -> list[Entry]:
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


def text_entries(config: TextConfig, theirs: str, ours: str) -> list[Entry]:
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
