"""Single towers in transformers' layout: ``CLIPVisionModel``, ``CLIPTextModel``, both ``…WithProjection``,
``SiglipVisionModel`` and ``SiglipTextModel``, whose head is its projection.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.processor import ImagesProcessor, TextsProcessor
from isthmus.interop.archives import read_state
from isthmus.interop.entries import part_of
from isthmus.interop.export import Export, Source, must, shards
from isthmus.interop.hf_clip import last_eot
from isthmus.interop.hf_files import (
    image_processor,
    tokenizer_files,
    with_dtype,
)
from isthmus.interop.hf_towers import (
    LEGACY_EOT,
    text_config_from_hf,
    text_config_to_hf,
    text_from_hf,
    text_to_hf,
    vision_config_from_hf,
    vision_config_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from isthmus.load_report import Account
from isthmus.models.towers import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig

_SIGLIP_HEADS = ("head.", "text_model.head.")
_WHO = "transformers"


def read_image_encoder_folder(
    folder: Path, account: Account | None = None
) -> tuple[ImageEncoderConfig, dict[str, Tensor]]:
    """Configuration and our state dict. Raises CheckpointError on any misfit."""
    state = read_state(folder, account)
    vision = vision_config_from_hf(read_json(folder / "config.json"))
    projection = state.pop("visual_projection.weight", None)
    found = {f"vision.{name}": tensor for name, tensor in vision_from_hf(state, vision, account).items()}
    if projection is None:
        return ImageEncoderConfig(vision=vision), found
    return ImageEncoderConfig(vision=vision, embed_dim=len(projection)), {**found, "projection.weight": projection}


def read_text_encoder_folder(
    folder: Path, account: Account | None = None
) -> tuple[TextEncoderConfig, dict[str, Tensor]]:
    """The same of a text tower."""
    state = read_state(folder, account)
    text = text_config_from_hf(read_json(folder / "config.json"))
    names = ("text_projection.", *(() if text.causal else _SIGLIP_HEADS))
    head = {n.rpartition(".")[2]: state.pop(n) for n in list(state) if n.startswith(names)}
    found = {f"text.{name}": tensor for name, tensor in text_from_hf(state, text, account).items()}
    if not head:
        return TextEncoderConfig(text=text), found
    config = TextEncoderConfig(text=text, embed_dim=len(head["weight"]), projection_bias="bias" in head)
    return config, found | {f"projection.{leaf}": tensor for leaf, tensor in head.items()}


def image_encoder_to_hf(
    state: Mapping[str, Tensor], config: ImageEncoderConfig
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A config.json and their state dict, in the layout that every version reads. Raises CheckpointError, naming the
    field, for a tower they have no class for."""
    described = vision_config_to_hf(config.vision)
    clip = described["model_type"] == "clip_vision_model"
    must(clip or config.embed_dim is None, "embed_dim", config.embed_dim, _WHO, "none for SigLIP's image tower")
    weights = vision_to_hf(part_of(state, "vision."), config.vision, prefix="vision_model.")
    if config.embed_dim is not None:
        weights["visual_projection.weight"] = state["projection.weight"]
        described["projection_dim"] = config.embed_dim
    return {"architectures": [_image_class(config)], **described}, weights


def _image_class(config: ImageEncoderConfig) -> str:
    layout = "CLIP" if config.vision.class_token else "Siglip"
    return f"{layout}VisionModel{'' if config.embed_dim is None else 'WithProjection'}"


def text_encoder_to_hf(
    state: Mapping[str, Tensor], config: TextEncoderConfig
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The same of a text tower."""
    clip, described = config.text.causal, text_config_to_hf(config.text)
    must(config.projection_bias != clip, "projection_bias", config.projection_bias, _WHO, f"{not clip} for this tower")
    weights = text_to_hf(part_of(state, "text."), config.text, prefix="text_model.")
    head = "text_projection." if clip else "text_model.head."
    weights |= {f"{head}{leaf}": tensor for leaf, tensor in part_of(state, "projection.").items()}
    described["projection_dim" if clip else "projection_size"] = config.embed_dim or config.text.width
    return {"architectures": [_text_class(config)], **described}, weights


def _text_class(config: TextEncoderConfig) -> str:
    clip = config.text.causal
    return f"{'CLIP' if clip else 'Siglip'}TextModel{'WithProjection' if clip and config.embed_dim else ''}"


def image_encoder_export(model: Source[ImageEncoder, ImagesProcessor], *, shard_bytes: int) -> Export:
    described, weights = image_encoder_to_hf(model.net.state_dict(), model.net.config)
    files = {
        "config.json": with_dtype(described, weights),
        **shards(weights, shard_bytes),
        "preprocessor_config.json": image_processor(model.processor.image),
    }
    return Export(files=files, opens=f"transformers.{_image_class(model.net.config)}.from_pretrained(FOLDER)")


def text_encoder_export(model: Source[TextEncoder, TextsProcessor], *, shard_bytes: int) -> Export:
    config, state, tokenizer = model.net.config, model.net.state_dict(), model.processor.tokenizer
    if config.text.causal and config.text.pool == "eot" and config.text.eot_id == LEGACY_EOT:
        state, config, tokenizer = last_eot(state, config, tokenizer)
    described, weights = text_encoder_to_hf(state, config)
    described["bos_token_id"] = tokenizer.bos_id
    pad = tokenizer.backend.id_to_token(tokenizer.pad_id if config.text.causal else config.text.pad_id)
    files = {
        "config.json": with_dtype(described, weights),
        **shards(weights, shard_bytes),
        **tokenizer_files(tokenizer, begin=True, end=True, context=config.text.context, pad_token=str(pad)),
    }
    return Export(files=files, opens=f"transformers.{_text_class(config)}.from_pretrained(FOLDER)")
