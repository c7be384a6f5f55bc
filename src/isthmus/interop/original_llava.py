"""LLaVA in the layout of its original repository, as pure maps: full models, projector files, LoRA's side file.

Facts: spec of the files of haotian-liu/LLaVA v1 to v1.6. Reading a pickled ``.bin`` is the caller's business.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import CheckpointError
from isthmus.interop.entries import Entry, from_theirs, part_of, same, shapes_of
from isthmus.interop.hf_clip import vision_from_hf, vision_to_hf
from isthmus.interop.hf_language import match_keys
from isthmus.language import LanguageModel, known_fields
from isthmus.load_report import Account
from isthmus.models.llava import LlavaConfig
from isthmus.nn.connectors import build_connector
from isthmus.nn.tiles import turned
from isthmus.nn.vit import VisionConfig

_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."
_NEWLINE = "model.image_newline"
AROUND = ("<im_start>", "<im_end>")
"""The trained tokens around a picture in v0 and the first v1 (``mm_use_im_start_end``)."""

TOWERS = {"clip-vit-large-patch14-336": VisionConfig.vit_l_14_336, "clip-vit-large-patch14": VisionConfig.vit_l_14}


def is_original_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original repository's; its ``model_type`` may be the one transformers uses."""
    return "mm_vision_tower" in config


def is_known_tower(config: Mapping[str, Any]) -> bool:
    """Is the tower that a config.json names one whose sizes are known here: OpenAI's two ViT-L/14?"""
    return str(config.get("mm_vision_tower", "")).rstrip("/").rpartition("/")[2] in TOWERS


def template_of(config: Mapping[str, Any]) -> str:
    """What the released models were trained with: v1 and 1.5 over Vicuna, 1.6 over Mistral."""
    if config.get("model_type") == "llava_mistral":
        return "mistral_instruct"
    return "vicuna_v1" if config.get("mm_projector_type", "linear") != "linear" else "llava_v1"


def llava_config_from_original(config: Mapping[str, Any], vision: VisionConfig | None = None) -> LlavaConfig:
    """From their config.json. ``vision`` is needed for a tower other than OpenAI's two ViT-L/14.

    Raises CheckpointError for a tower that is not known, and tiles that are put together in another way than 1.6's.
    """
    tower = str(config.get("mm_vision_tower", "")).rstrip("/").rpartition("/")[2]
    if vision is None and tower not in TOWERS:
        raise CheckpointError(
            f"config.json: the vision tower {config.get('mm_vision_tower')!r} is not known here; "
            "give its configuration."
        )
    model_type = str(config.get("model_type", "llava"))
    base = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}.get(model_type)
    if base is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported, only llava, llava_llama and llava_mistral."
        )
    return LlavaConfig(
        vision=vision or TOWERS[tower](),
        language=known_fields({**config, "model_type": base}),
        projector=config.get("mm_projector_type", "linear"),
        feature_layer=config.get("mm_vision_select_layer", -2),
        feature_select=config.get("mm_vision_select_feature", "patch"),
        pinpoints=_pinpoints(config),
    )


def _pinpoints(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The canvases of AnyRes as (height, width); the original code writes them the other way round."""
    aspect, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type", "flat")
    if aspect not in ("anyres", "pad", "square", None):
        raise CheckpointError(f"config.json: image_aspect_ratio {aspect!r} is not supported, only square, pad, anyres.")
    if (aspect == "anyres") != (merge == "spatial_unpad"):
        raise CheckpointError(
            f"config.json: image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} is not supported; tiles "
            "(anyres) are put together by spatial_unpad."
        )
    given = config.get("image_grid_pinpoints") if aspect == "anyres" else ()
    if not isinstance(given, list | tuple):
        raise CheckpointError(f"config.json: image_grid_pinpoints must be a list of canvases, not {given!r}.")
    return turned([(int(first), int(second)) for first, second in given])


def llava_from_original(
    state: Mapping[str, Tensor],
    config: LlavaConfig,
    *,
    vision: Mapping[str, Tensor] | None = None,
    account: Account | None = None,
) -> dict[str, Tensor]:
    """Our state dict from a full model; dtypes stay.

    ``vision`` is our own state dict of the tower, needed where the file omits it (released v1.5 files do); a tower
    in the file wins, as it may have been tuned. Raises CheckpointError on any misfit or without a tower.
    """
    tower = part_of(state, _TOWER)
    if tower:
        vision = vision_from_hf(tower, config.vision, account)
    if vision is None:
        raise CheckpointError(
            "this LLaVA file holds no vision tower (released v1.5 files do not); name the CLIP "
            "checkpoint it was trained with as its source."
        )
    state, newline = without_newline(state, config)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith((_TOWER, _PROJECTOR))}
    with torch.device("meta"):
        language = LanguageModel.build(config.language)
    ours = {
        "vision": dict(vision),
        "connector": projector_from_original(part_of(state, "model."), config, only=False, account=account),
        "language.lm": match_keys(language.lm, rest, where="the language model", account=account),
    }
    return {f"{part}.{name}": tensor for part, tensors in ours.items() for name, tensor in tensors.items()} | newline


def without_newline(state: Mapping[str, Tensor], config: LlavaConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other tensors of a file, and AnyRes's newline under our name where the model has one."""
    name = next((n for n in state if config.pinpoints and _without_wrappers(n) == "image_newline"), None)
    return {n: t for n, t in state.items() if n != name}, {} if name is None else {"image_newline": state[name]}


def projector_from_original(
    state: Mapping[str, Tensor], config: LlavaConfig, *, only: bool = True, account: Account | None = None
) -> dict[str, Tensor]:
    """The connector's state dict from ``mm_projector.bin`` or ``non_lora_trainables.bin``.

    With ``only`` nothing else may be in the file. Raises CheckpointError on any misfit.
    """
    bare = {_without_wrappers(name): tensor for name, tensor in state.items()}
    other = [name for name in bare if not name.startswith("mm_projector.")]
    if only and other:
        raise CheckpointError(
            f"this projector file also holds {', '.join(sorted(other)[:3])}, which has no place here "
            "(trained start and end tokens are not supported)."
        )
    with torch.device("meta"):
        width = LanguageModel.build(config.language).width
        shapes = shapes_of(build_connector(config.projector, config.feature_width, width))
    stored, what = part_of(bare, "mm_projector."), f"a {config.projector} projector"
    return from_theirs(_projector(shapes), stored, shapes, what, account=account)


def llava_to_original(state: Mapping[str, Tensor], config: LlavaConfig, *, vision: bool = True) -> dict[str, Tensor]:
    """Their full model, with the tower or (as released v1.5 files) without."""
    connector = part_of(state, "connector.")
    names = {entry.ours[0]: entry.theirs for entry in _projector(connector)}
    theirs = part_of(state, "language.lm.") | {f"{_PROJECTOR}{names[k]}": tensor for k, tensor in connector.items()}
    if vision:
        tower = vision_to_hf(part_of(state, "vision."), config.vision, prefix="vision_model.")
        theirs |= {f"{_TOWER}{name}": tensor for name, tensor in tower.items()}
    if config.pinpoints:
        theirs[_NEWLINE] = state["image_newline"]
    return theirs


def _projector(ours: Mapping[str, Any]) -> list[Entry]:
    """One linear layer has no number; in an MLP the layers have even numbers, the GELUs the odd ones between."""
    depth = len(ours) // 2
    if depth == 1:
        return [Entry(leaf, (f"linear_1.{leaf}",)) for leaf in ("weight", "bias")]
    return [entry for n in range(depth) for entry in same(str(2 * n), f"linear_{n + 1}")]


def _without_wrappers(name: str) -> str:
    """``base_model.model.model.x``, ``model.x`` and ``x`` are the same tensor."""
    return name.removeprefix("base_model.model.").removeprefix("model.")
