"""CLIP and SigLIP as open_clip stores them: its ``CLIP`` and ``CustomTextCLIP`` classes, its JSON model configurations
and its trainer's checkpoints. A SigLIP is a ``CustomTextCLIP`` whose image tower is timm's.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.clip_tokenizer import canonical, is_published
from isthmus.data.images import ImageTransform, Mode
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, read_state, tensors_of, unwrapped
from isthmus.interop.entries import Entry, from_theirs, to_theirs
from isthmus.interop.export import Export, Source, must
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_files import per_channel
from isthmus.interop.openai import (
    clip_shapes,
    entries,
    text_entries,
    tokenizer_read,
    tokenizer_written,
)
from isthmus.interop.timm_siglip import trunk_config, trunk_entries, trunk_name
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig
from isthmus.weights import load_into

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_VISION_READ = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "no_ln_pre", "norm_kwargs"}
_VISION_FIXED = {"pool_type": ("tok",), "final_ln_after_pool": (False, True), "pos_embed_type": ("learnable",)}
_TEXT_READ = {
    "context_length",
    "vocab_size",
    "width",
    "layers",
    "heads",
    "mlp_ratio",
    "pad_id",
    "eos_id",
    "pool_type",
    "proj_bias",
    "norm_kwargs",
    "no_causal_mask",
    "act_kwargs",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
}
_TEXT_FIXED = {"proj_type": ("linear",)}
_TIMM_READ = {"image_size", "timm_model_name"}
_TIMM_FIXED = {"timm_pool": ("map",), "timm_proj": ("none",)}
_TOP_READ = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
_TOP_FIXED = {"custom_text": (False, True)}
CANONICAL = {"clean": "canonicalize"}
"""SigLIP's cleaning of texts before they are split."""
_POOLS: dict[str, Literal["argmax", "eot", "last"]] = {"argmax": "argmax", "eos": "eot", "last": "last"}


class _TowerFields(TypedDict, total=False):
    width: int
    layers: int
    mlp_ratio: float
    norm_kwargs: Mapping[str, float] | None


class _VisionFields(_TowerFields, total=False):
    image_size: int
    patch_size: int
    head_width: int
    no_ln_pre: bool
    timm_model_name: str


class _TextFields(_TowerFields, total=False):
    context_length: int
    vocab_size: int
    heads: int
    pad_id: int
    eos_id: int
    pool_type: str
    proj_bias: bool
    no_causal_mask: bool
    act_kwargs: Mapping[str, object] | None
    hf_tokenizer_name: str | None
    tokenizer_kwargs: Mapping[str, object] | None


class _Fields(TypedDict):
    """What is read of a JSON model configuration."""

    embed_dim: int
    vision_cfg: NotRequired[_VisionFields]
    text_cfg: NotRequired[_TextFields]
    quick_gelu: NotRequired[bool]
    init_logit_scale: NotRequired[float | None]
    init_logit_bias: NotRequired[float | None]


class _PictureFields(TypedDict, total=False):
    resize_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _File(TypedDict):
    """A folder's open_clip_config.json."""

    model_cfg: _Fields
    preprocess_cfg: NotRequired[_PictureFields]


def clip_config_from_open_clip(config: Mapping[str, object]) -> ClipConfig:
    """Our configuration from a JSON model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, ...).

    ``quick_gelu`` left out means exact GELU, as there. Fields that change the architecture beyond CLIP's raise
    CheckpointError unless they are switched off.
    """
    _only_known(config, _TOP_READ, _TOP_FIXED, "the open_clip configuration")
    values = cast(_Fields, config)
    activation = "quick_gelu" if values.get("quick_gelu") else "gelu"
    vision = values.get("vision_cfg", {})
    timm = vision.get("timm_model_name")
    tower = _timm(vision, timm) if timm else _vision(vision, activation)
    if timm and tower.width != values["embed_dim"]:
        raise CheckpointError(
            f"embed_dim {values['embed_dim']} is not the tower's width {tower.width} (timm_proj none)."
        )
    text = values.get("text_cfg", {})
    return ClipConfig(
        vision=tower,
        text=_text(text, activation),
        embed_dim=values["embed_dim"],
        loss="softmax" if values.get("init_logit_bias") is None else "sigmoid",
        vision_projection=not timm,
        text_projection_bias=text.get("proj_bias", False),
        init_scale=_number(values.get("init_logit_scale")),
        init_bias=_number(values.get("init_logit_bias")),  # a whole number in the published files
    )


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _vision(values: _VisionFields, activation: str) -> VisionConfig:
    _only_known(values, _VISION_READ, _VISION_FIXED, "vision_cfg")
    width = values.get("width", 768)
    return VisionConfig(
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 16),
        width=width,
        layers=values.get("layers", 12),
        heads=width // values.get("head_width", 64),
        mlp_width=int(width * values.get("mlp_ratio", 4.0)),
        activation=activation,
        eps=_eps(values),
        pre_norm=not values.get("no_ln_pre", False),
    )


def _timm(values: _VisionFields, name: str) -> VisionConfig:
    config = trunk_config(name)
    _only_known(values, _TIMM_READ, _TIMM_FIXED, "vision_cfg")
    if values.get("image_size", 224) != config.image_size:
        raise CheckpointError(f"vision_cfg: image_size {values.get('image_size', 224)} is not that of {name}.")
    return config


def _text(values: _TextFields, activation: str) -> TextConfig:
    _only_known(values, _TEXT_READ, _TEXT_FIXED, "text_cfg")
    width, vocab_size, pool = (
        values.get("width", 512),
        values.get("vocab_size", 49408),
        values.get("pool_type", "argmax"),
    )
    if pool not in _POOLS:
        raise CheckpointError(f"text_cfg: pool_type {pool!r} is not known; known: {', '.join(_POOLS)}.")
    if (pool == "last") != bool(values.get("no_causal_mask")):
        raise CheckpointError(
            "text_cfg: isthmus has causal towers, and towers read at their last place that attend in both directions."
        )
    act = values.get("act_kwargs") or {}
    if act not in ({}, {"approximate": "tanh"}):
        raise CheckpointError(f"text_cfg: act_kwargs {act} is no activation that isthmus has.")
    how = values.get("tokenizer_kwargs") or {}
    if how not in ({}, CANONICAL):
        raise CheckpointError(f"text_cfg: tokenizer_kwargs {how} is a way of reading text that isthmus does not have.")
    pad = values.get("pad_id", 0)
    return TextConfig(
        context=values.get("context_length", 77),
        vocab_size=vocab_size,
        width=width,
        layers=values.get("layers", 12),
        heads=values.get("heads", 8),
        mlp_width=int(width * values.get("mlp_ratio", 4.0)),
        activation="gelu_tanh" if act else activation,
        eps=_eps(values),
        pool=_POOLS[pool],
        eot_id={"argmax": vocab_size - 1, "last": pad}.get(pool, values.get("eos_id", 2)),
        pad_id=pad,
    )


def clip_from_open_clip(
    state: Mapping[str, object], config: ClipConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """Our state dict from ``CLIP``'s, ``CustomTextCLIP``'s (distinguished by where the text projection stands) or a
    trainer checkpoint that holds either. Raises CheckpointError unless all fits.
    """
    weights = tensors_of(unwrapped(state), "the checkpoint")
    bare = "text_projection" in weights or "text_projection.weight" in weights
    what = f"open_clip's {'CLIP' if bare else 'CustomTextCLIP'}"
    return from_theirs(_layout(config, custom_text=not bare), weights, clip_shapes(config), what, account=account)


def clip_to_open_clip(
    state: Mapping[str, Tensor], config: ClipConfig, *, custom_text: bool = False
) -> dict[str, Tensor]:
    """Their state dict, of ``CustomTextCLIP`` on request; a SigLIP has no other form there."""
    return to_theirs(_layout(config, custom_text=custom_text), state)


def _layout(config: ClipConfig, *, custom_text: bool) -> list[Entry]:
    if not config.vision.class_token:
        return [*trunk_entries(config.vision), *text_entries(config, "text.")]
    return entries(config, text="text." if custom_text else "")


def _eps(tower: _TowerFields) -> float:
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def _only_known(
    values: Mapping[str, object], read: set[str], fixed: Mapping[str, tuple[object, ...]], where: str
) -> None:
    """Refuse what would be ignored: a field that is neither read nor switched off nor at a value equal to ours."""
    for name, value in values.items():
        if name in read or value in fixed.get(name, (None, False)):
            continue
        raise CheckpointError(f"{where}: {name} = {value!r} is a variant of CLIP that isthmus does not have.")


def open_clip_export(model: Source[Clip, ContrastiveProcessor], *, shard_bytes: int) -> Export:
    """The folder that open_clip pushes to the hub and opens by ``local-dir:FOLDER``; SigLIP's towers go by timm's name.

    A SigLIP's cleaning of texts is written into its tokenizer's file, so none is named beside it.
    """
    config, image, who = model.net.config, model.processor.image, "open_clip"
    must(config.similarity == "cosine", "similarity", config.similarity, who, "cosine")
    vision, text = config.vision, config.text
    siglip = not vision.class_token
    if not siglip:
        must(vision.activation == text.activation, "text.activation", text.activation, who, "the vision tower's")
        fits = vision.activation in ("gelu", "quick_gelu")
        must(fits, "vision.activation", vision.activation, who, "gelu or quick_gelu")
    must(siglip != text.causal, "text.pool", text.pool, who, "'last' for SigLIP's image tower, another for CLIP's")
    must(image.mode in ("square", "squash"), "processor.image.mode", image.mode, who, "square or squash")
    described = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "init_logit_scale": config.init_scale,
        **({} if config.init_bias is None else {"init_logit_bias": config.init_bias}),
        **({"custom_text": True} if siglip else {}),
        "vision_cfg": _open_clip_timm(vision) if siglip else _open_clip_vision(vision),
        "text_cfg": _open_clip_text(text, model.processor.tokenizer, proj_bias=config.text_projection_bias),
    }
    preprocess = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.resample,
        "resize_mode": "shortest" if image.mode == "square" else "squash",
    }
    files = {
        "open_clip_config.json": {"model_cfg": described, "preprocess_cfg": preprocess},
        "open_clip_model.safetensors": clip_to_open_clip(model.net.state_dict(), config),
        **tokenizer_written(model.processor.tokenizer, config),
    }
    return Export(files=files, opens="open_clip.create_model_and_transforms('local-dir:FOLDER')")


def _open_clip_vision(vision: VisionConfig) -> dict[str, object]:
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.layers,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        **({} if vision.pre_norm else {"no_ln_pre": True}),
        **_norm(vision.eps),
    }


def _open_clip_timm(vision: VisionConfig) -> dict[str, object]:
    return {
        "image_size": vision.image_size,
        "timm_model_name": trunk_name(vision),
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def _open_clip_text(text: TextConfig, tokenizer: Tokenizer, *, proj_bias: bool) -> dict[str, object]:
    """Without the name of a tokenizer their code reads by CLIP's own; with any, by the one in the folder."""
    must(
        text.activation != "relu" and (text.causal or text.activation in ("gelu", "gelu_tanh")),
        "text.activation",
        text.activation,
        "open_clip",
        "gelu or gelu_tanh",
    )
    pools = {"eot": {"pool_type": "eos", "eos_id": text.eot_id}, "last": {"pool_type": "last", "no_causal_mask": True}}
    return {
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "layers": text.layers,
        "heads": text.heads,
        "mlp_ratio": text.mlp_width / text.width,
        "pad_id": text.pad_id,
        **pools.get(text.pool, {}),
        **({} if text.causal and is_published(tokenizer) else {"hf_tokenizer_name": "."}),
        **({"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}),
        **({"proj_bias": True} if proj_bias else {}),
        **_norm(text.eps),
    }


def _norm(eps: float) -> dict[str, object]:
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def open_clip_config(folder: Path) -> _File | None:
    """The configuration of an open_clip folder, whichever of its JSON files holds one."""
    for file in sorted(folder.glob("*.json")):
        read = read_json if file.name == _OPEN_CLIP_CONFIG else _object
        values = read(file) if file.stat().st_size < 2**20 else {}
        inner = values.get("model_cfg", values)
        if isinstance(inner, Mapping) and "vision_cfg" in inner and "embed_dim" in inner:
            return cast(_File, {**values, "model_cfg": dict(inner)})
    return None


def _object(file: Path) -> dict[str, object]:
    """The JSON object in a file, empty for anything else: names of classes, lines of JSON, somebody's notes."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def open_bare_weights(path: Path, state: Mapping[str, Tensor], given: Given) -> Opened:
    """Weights around an image tower of timm's, without what tells which. Raises CheckpointError."""
    raise CheckpointError(
        f"{path} is a model of open_clip whose image tower is timm's, and its weights do not say which: put "
        "open_clip_config.json beside them (as on the hub) and open the folder."
    )


def open_clip_folder(folder: Path, _config: Mapping[str, object] | None, given: Given) -> Opened | None:
    """A folder that open_clip pushes to the hub: configuration, weights, tokenizer."""
    if (values := open_clip_config(folder)) is None:
        return None
    given.only("tokenizer", where=folder)
    described = values["model_cfg"]
    config = clip_config_from_open_clip(described)
    own = config.text.causal and not described.get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = tokenizer_read(folder, config, given, own=own)
    if not config.text.causal:  # padding is read like any token, and which one it is stands with the tokenizer alone
        config = replace(config, text=replace(config.text, pad_id=tokenizer.pad_id, eot_id=tokenizer.eos_id))
        if described.get("text_cfg", {}).get("tokenizer_kwargs") == CANONICAL:
            tokenizer = canonical(tokenizer, underscore=" ")
    net = Clip(config)
    ours = clip_from_open_clip(_open_clip_state(folder, given.account), config, given.account)
    load_into(net, ours, where=folder, account=given.account)
    picture = values.get("preprocess_cfg", {})
    base = ImageTransform.clip(config.vision.image_size)
    image = ImageTransform(
        size=config.vision.image_size,
        mode=_resizing(picture.get("resize_mode", "shortest"), folder),
        mean=per_channel(picture.get("mean", base.mean)),
        std=per_channel(picture.get("std", base.std)),
        resample=picture.get("interpolation", "bicubic"),
        crop="round",
        deep="clip",
    )
    return net, ContrastiveProcessor(tokenizer, image=image, context=config.text.context), ()


def _open_clip_state(folder: Path, account: Account) -> dict[str, Tensor]:
    """The weights under open_clip's own file names where there are such: transformers' may lie beside them."""
    for name in _OPEN_CLIP_FILES:
        if (folder / name).is_file():
            return tensors_of(unwrapped(read_archive(folder / name, account)), folder / name)
    return read_state(folder, account)


def _resizing(name: str, folder: Path) -> Mode:
    modes: dict[str, Mode] = {"shortest": "square", "squash": "squash"}
    if name not in modes:
        raise CheckpointError(f"{folder}: open_clip's resize_mode {name!r} is not one of {', '.join(modes)}.")
    return modes[name]
