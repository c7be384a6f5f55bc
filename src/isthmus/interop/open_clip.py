"""CLIP as open_clip stores it: its ``CLIP`` and ``CustomTextCLIP`` classes, its JSON model configurations and its
trainer's checkpoints.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from isthmus.errors import CheckpointError
from isthmus.interop.entries import from_theirs, to_theirs
from isthmus.interop.openai import clip_shapes, entries
from isthmus.models.clip import ClipConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig

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
}
_TEXT_FIXED = {"proj_type": ("linear",)}
_TOP_READ = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
_TOP_FIXED = {"custom_text": (False, True)}
_POOLS: dict[str, Literal["argmax", "eot"]] = {"argmax": "argmax", "eos": "eot"}


def clip_config_from_open_clip(config: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from a JSON model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, ...).

    ``quick_gelu`` left out means exact GELU, as there. Fields that change the architecture beyond CLIP's raise
    CheckpointError unless they are switched off.
    """
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    _only_known(config, _TOP_READ, _TOP_FIXED, "the open_clip configuration")
    _only_known(vision, _VISION_READ, _VISION_FIXED, "vision_cfg")
    _only_known(text, _TEXT_READ, _TEXT_FIXED, "text_cfg")
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    width, text_width, vocab_size = vision.get("width", 768), text.get("width", 512), text.get("vocab_size", 49408)
    pool = text.get("pool_type", "argmax")
    if pool not in _POOLS:
        raise CheckpointError(f"text_cfg: pool_type {pool!r} is not CLIP's; known: {', '.join(_POOLS)}.")
    return ClipConfig(
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            width=width,
            layers=vision.get("layers", 12),
            heads=width // vision.get("head_width", 64),
            mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
            activation=activation,
            eps=_eps(vision),
            pre_norm=not vision.get("no_ln_pre", False),
        ),
        text=TextConfig(
            context=text.get("context_length", 77),
            vocab_size=vocab_size,
            width=text_width,
            layers=text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_width=int(text_width * text.get("mlp_ratio", 4.0)),
            activation=activation,
            eps=_eps(text),
            pool=_POOLS[pool],
            eot_id=vocab_size - 1 if pool == "argmax" else text.get("eos_id", 2),
            pad_id=text.get("pad_id", 0),
        ),
        embed_dim=config["embed_dim"],
        loss="softmax" if config.get("init_logit_bias") is None else "sigmoid",
        text_projection_bias=text.get("proj_bias", False),
        init_scale=config.get("init_logit_scale"),
        init_bias=config.get("init_logit_bias"),
    )


def clip_from_open_clip(state: Mapping[str, Any], config: ClipConfig) -> dict[str, Tensor]:
    """Our state dict from ``CLIP``'s, ``CustomTextCLIP``'s (told apart by where the text projection stands) or a
    trainer checkpoint that holds either. Raises CheckpointError unless all fits.
    """
    state = _unwrap(state)
    bare = "text_projection" in state or "text_projection.weight" in state
    layout = entries(config, text="" if bare else "text.")
    what = f"open_clip's {'CLIP' if bare else 'CustomTextCLIP'}"
    return from_theirs(layout, state, clip_shapes(config), what)


def clip_to_open_clip(
    state: Mapping[str, Tensor], config: ClipConfig, *, custom_text: bool = False
) -> dict[str, Tensor]:
    """Their state dict, of ``CustomTextCLIP`` if asked for."""
    return to_theirs(entries(config, text="text." if custom_text else ""), state)


def _unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A trainer checkpoint's weights, without the prefix that a wrapper for several devices left."""
    weights = state.get("state_dict", state)
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _eps(tower: Mapping[str, Any]) -> float:
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def _only_known(values: Mapping[str, Any], read: set[str], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuse what would be ignored: a field that is neither read nor switched off nor at a value equal to ours."""
    for name, value in values.items():
        if name in read or value in fixed.get(name, (None, False)):
            continue
        raise CheckpointError(f"{where}: {name} = {value!r} is a variant of CLIP that isthmus does not have.")
