"""CLIP and SigLIP in transformers' layout: full models, and folders with config.json; their towers are in hf_towers.

Facts about that layout come from transformers 5.23. The library is not imported here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_state
from isthmus.interop.entries import Entry, from_theirs, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, must, shards
from isthmus.interop.hf_files import (
    image_processor,
    swapped,
    tokenizer_files,
    with_dtype,
)
from isthmus.interop.hf_towers import (
    LEGACY_EOT,
    TOLERATED,
    overridden,
    text_config_from_hf,
    text_config_to_hf,
    text_entries,
    text_fields,
    vision_config_from_hf,
    vision_config_to_hf,
    vision_entries,
    vision_layout,
)
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.towers import TextEncoderConfig

_Reads = TypeVar("_Reads", ClipConfig, TextEncoderConfig)
_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}


# Configurations.


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
    vision = vision_config_from_hf(overridden(f"{layout}_vision_model", values.get("vision_config"), override[0]))
    described = overridden(f"{layout}_text_model", values.get("text_config"), override[1])
    text = text_config_from_hf(described)
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
        embed_dim=text_fields(described).get("projection_size") or text.width,
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


def _layout(config: ClipConfig) -> str:
    """``clip`` or ``siglip``. The loss is a matter of training, but a bias has a place only in SigLIP."""
    layout = vision_layout(config.vision)
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


def _clip(config: ClipConfig) -> list[Entry]:
    siglip = _layout(config) == "siglip"
    rows = [Entry("logit_scale", ("heads.logit_scale",), boxed=siglip)]
    rows += vision_entries(config.vision, "vision_model.", "vision.") + text_entries(
        config.text, "text_model.", "text."
    )
    if siglip:
        rows.append(Entry("logit_bias", ("heads.logit_bias",), boxed=True))
        return rows + same("text_model.head", "heads.text_projection")
    return [
        *rows,
        *same("visual_projection", "heads.vision_projection", "weight"),
        *same("text_projection", "heads.text_projection", "weight"),
    ]


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
