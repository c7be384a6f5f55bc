"""CLIP and SigLIP as open_clip stores them: its ``CLIP`` and ``CustomTextCLIP`` classes, its JSON model configurations
and its trainer's checkpoints. A SigLIP is a ``CustomTextCLIP`` whose image tower is timm's.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from isthmus.errors import CheckpointError
from isthmus.interop.entries import Entry, from_theirs, to_theirs
from isthmus.interop.openai import clip_shapes, entries, text_entries
from isthmus.interop.timm_siglip import trunk_config, trunk_entries
from isthmus.load_report import Account
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


def clip_config_from_open_clip(config: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from a JSON model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, ...).

    ``quick_gelu`` left out means exact GELU, as there. Fields that change the architecture beyond CLIP's raise
    CheckpointError unless they are switched off.
    """
    _only_known(config, _TOP_READ, _TOP_FIXED, "the open_clip configuration")
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vision = config.get("vision_cfg", {})
    siglip = bool(vision.get("timm_model_name"))
    tower = _timm(vision) if siglip else _vision(vision, activation)
    if siglip and tower.width != config["embed_dim"]:
        raise CheckpointError(
            f"embed_dim {config['embed_dim']} is not the tower's width {tower.width} (timm_proj none)."
        )
    text = config.get("text_cfg", {})
    return ClipConfig(
        vision=tower,
        text=_text(text, activation),
        embed_dim=config["embed_dim"],
        loss="softmax" if config.get("init_logit_bias") is None else "sigmoid",
        vision_projection=not siglip,
        text_projection_bias=text.get("proj_bias", False),
        init_scale=_number(config.get("init_logit_scale")),
        init_bias=_number(config.get("init_logit_bias")),  # a whole number in the published files
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _vision(values: Mapping[str, Any], activation: str) -> VisionConfig:
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


def _timm(values: Mapping[str, Any]) -> VisionConfig:
    config = trunk_config(values["timm_model_name"])
    _only_known(values, _TIMM_READ, _TIMM_FIXED, "vision_cfg")
    if values.get("image_size", 224) != config.image_size:
        raise CheckpointError(
            f"vision_cfg: image_size {values.get('image_size', 224)} is not that of {values['timm_model_name']}."
        )
    return config


def _text(values: Mapping[str, Any], activation: str) -> TextConfig:
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
    state: Mapping[str, Any], config: ClipConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """Our state dict from ``CLIP``'s, ``CustomTextCLIP``'s (distinguished by where the text projection stands) or a
    trainer checkpoint that holds either. Raises CheckpointError unless all fits.
    """
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    bare = "text_projection" in state or "text_projection.weight" in state
    what = f"open_clip's {'CLIP' if bare else 'CustomTextCLIP'}"
    return from_theirs(_layout(config, custom_text=not bare), state, clip_shapes(config), what, account=account)


def clip_to_open_clip(
    state: Mapping[str, Tensor], config: ClipConfig, *, custom_text: bool = False
) -> dict[str, Tensor]:
    """Their state dict, of ``CustomTextCLIP`` on request; a SigLIP has no other form there."""
    return to_theirs(_layout(config, custom_text=custom_text), state)


def _layout(config: ClipConfig, *, custom_text: bool) -> list[Entry]:
    if not config.vision.class_token:
        return [*trunk_entries(config.vision), *text_entries(config, "text.")]
    return entries(config, text="text." if custom_text else "")


def _eps(tower: Mapping[str, Any]) -> float:
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def _only_known(values: Mapping[str, Any], read: set[str], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuse what would be ignored: a field that is neither read nor switched off nor at a value equal to ours."""
    for name, value in values.items():
        if name in read or value in fixed.get(name, (None, False)):
            continue
        raise CheckpointError(f"{where}: {name} = {value!r} is a variant of CLIP that isthmus does not have.")
