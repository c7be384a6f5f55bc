"""SigLIP's image tower as timm names and sizes it: what open_clip's SigLIP models hold under ``visual.trunk.``.

A model's configuration names the tower only, such as ``vit_base_patch16_siglip_224``; the name stands for sizes and
activation. Facts from timm 1.0.31. The library is not imported here.
"""

import re

from isthmus.errors import CheckpointError
from isthmus.interop.entries import Entry, same
from isthmus.nn.vit import VisionConfig

SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
"""Width, layers, heads and width of the MLP by the name's second word."""

_TANH = re.compile(r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_.*|vit_large_patch16_siglip_512")
"""Towers with tanh-GELU; all others have the exact one, also where transformers' file of the same weights says tanh."""


def trunk_config(name: str) -> VisionConfig:
    """The tower of that name. Raises CheckpointError for one that is not SigLIP's with its attention head."""
    found = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)
    if found is None or found[1] not in SIZES:
        raise CheckpointError(
            f"vision_cfg: timm_model_name {name!r} is no tower that isthmus has; known are "
            f"vit_SIZE_patchP_siglip_PIXELS of the sizes {', '.join(SIZES)}."
        )
    width, layers, heads, mlp_width = SIZES[found[1]]
    return VisionConfig.siglip(
        image_size=int(found[3]),
        patch_size=int(found[2]),
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=mlp_width,
        activation="gelu_tanh" if _TANH.fullmatch(name) else "gelu",
    )


def trunk_name(config: VisionConfig) -> str:
    """The inverse of :func:`trunk_config`. Raises CheckpointError for a tower that no name stands for."""
    for size in SIZES:
        name = f"vit_{size}_patch{config.patch_size}_siglip_{config.image_size}"
        if trunk_config(name) == config:
            return name
    raise CheckpointError(
        f"open_clip takes SigLIP's towers from timm by name, and no name stands for this one (vision.width is "
        f"{config.width}, vision.activation {config.activation!r}). Choose another format (`--to hf`)."
    )


def trunk_entries(config: VisionConfig, theirs: str = "visual.trunk.", ours: str = "vision.") -> list[Entry]:
    """timm's layout: q, k and v in one matrix, the head's k and v in another, positions with a first axis of one."""
    rows = [
        *same(f"{theirs}patch_embed.proj", f"{ours}patch_embed"),
        Entry(f"{theirs}pos_embed", (f"{ours}positions",), boxed=True),
        *same(f"{theirs}norm", f"{ours}ln_post"),
        Entry(f"{theirs}attn_pool.latent", (f"{ours}pool.probe",)),
        *same(f"{theirs}attn_pool.q", f"{ours}pool.attn.q_proj"),
        *_stacked(f"{theirs}attn_pool.kv", f"{ours}pool.attn", "kv"),
        *same(f"{theirs}attn_pool.proj", f"{ours}pool.attn.out_proj"),
        *same(f"{theirs}attn_pool.norm", f"{ours}pool.ln"),
        *_mlp(f"{theirs}attn_pool", f"{ours}pool"),
    ]
    for i in range(config.layers):
        a, b = f"{theirs}blocks.{i}", f"{ours}blocks.{i}"
        rows += _stacked(f"{a}.attn.qkv", f"{b}.attn", "qkv")
        rows += same(f"{a}.attn.proj", f"{b}.attn.out_proj")
        rows += same(f"{a}.norm1", f"{b}.ln_1") + same(f"{a}.norm2", f"{b}.ln_2") + _mlp(a, b)
    return rows


def _stacked(theirs: str, ours: str, parts: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.{leaf}", tuple(f"{ours}.{part}_proj.{leaf}" for part in parts)) for leaf in ("weight", "bias")
    ]


def _mlp(theirs: str, ours: str) -> list[Entry]:
    return same(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1") + same(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
