"""LLaVA and LLaVA-NeXT in the layout of transformers: configuration, weights, folders. The library is not imported.

Four layouts of keys are in circulation (files up to 4.51, 4.52 in memory, 5.x in memory, files fresh from 5.x); all
four are read, the first, which every version reads, is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import read_json
from isthmus.data.chat import ChatForm, form_of
from isthmus.data.processor import SpliceProcessor
from isthmus.data.tokenizer import CHAT_TEMPLATE
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_state
from isthmus.interop.entries import Entry, from_theirs, part_of, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, must, shards
from isthmus.interop.hf_files import generation_config, image_processor, tokenizer_files, with_dtype
from isthmus.interop.hf_language import IMAGE, match_keys, with_image_token
from isthmus.interop.hf_towers import (
    vision_config_from_hf,
    vision_config_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from isthmus.interop.written_template import chat_template, own_chat_template
from isthmus.language import LanguageModel, known_fields, library_config
from isthmus.load_report import Account
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.connectors import build_connector
from isthmus.nn.tiles import PINPOINTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""What transformers means by a LLaVA configuration without ``vision_config``."""


_NEWLINE = "image_newline"

_HEAD_BIAS = "lm_head.bias"
_BARE = {
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
}
"""What language models do to their logits, and the value that leaves them alone: the class of transformers puts a bare
head of its own on the language model's body, whatever that model's own class does."""


# Configurations.


class _Fields(TypedDict, total=False):
    """What is read of a config.json."""

    model_type: str
    vision_config: Mapping[str, object] | None
    text_config: Mapping[str, object] | None
    vision_feature_layer: int | Sequence[int]
    vision_feature_select_strategy: str
    image_grid_pinpoints: Sequence[tuple[int, int]] | None
    tie_word_embeddings: bool
    image_token_index: int
    image_token_id: int


def llava_config_from_hf(config: Mapping[str, object], account: Account | None = None) -> LlavaConfig:
    """From the config.json of a ``LlavaForConditionalGeneration`` or ``LlavaNextForConditionalGeneration``.

    Raises CheckpointError for what has no place.
    """
    if config.get("model_type") not in ("llava", "llava_next") or "mm_vision_tower" in config:
        raise CheckpointError(
            f"config.json: model_type {config.get('model_type')!r} is not transformers' LLaVA"
            + ("; mm_vision_tower marks the original repository's." if "mm_vision_tower" in config else ".")
        )
    for name, expected in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if config.get(name, expected) != expected:
            raise CheckpointError(f"config.json: {name} {config[name]!r} is not supported, only {expected!r}.")
    values = cast(_Fields, config)
    vision = vision_config_from_hf({"model_type": "clip_vision_model", **(values.get("vision_config") or _CLIP_L_336)})
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy == "default" and not vision.class_token:
        raise CheckpointError(
            "config.json: vision_feature_select_strategy 'default' drops the first token, but this "
            "vision encoder has no class token to drop."
        )
    pinpoints: tuple[tuple[int, int], ...] = ()
    if config["model_type"] == "llava_next":
        if strategy != "default" and vision.class_token:
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy {strategy!r} of a LLaVA-NeXT keeps the class token, "
                "which has no place among its tiles; with this vision encoder only 'default' is supported."
            )
        pinpoints = tuple((int(h), int(w)) for h, w in values.get("image_grid_pinpoints") or PINPOINTS)
    layer = values.get("vision_feature_layer", -2)
    text = known_fields({"model_type": "llama", **(values.get("text_config") or {})})
    # transformers' LLaVA ties where either says so, the text's class by default among them (Gemma).
    tied = bool(values.get("tie_word_embeddings") or getattr(library_config(text), "tie_word_embeddings", False))
    return LlavaConfig(
        vision=vision,
        language=_bare({**text, "tie_word_embeddings": tied}, account),
        feature_layer=layer if isinstance(layer, int) else tuple(layer),
        feature_select="cls_patch" if strategy == "full" and vision.class_token else "patch",
        pinpoints=pinpoints,
    )


def _bare(language: dict[str, object], account: Account | None) -> dict[str, object]:
    """The language model with its logits as the head gives them, with a note where its own class does otherwise."""
    values = library_config(language)
    own = {name: getattr(values, name, None) for name in _BARE}
    changed = {name: _BARE[name] for name, value in own.items() if value not in (None, _BARE[name])}
    for name, value in changed.items():
        load_report.noted(
            account,
            f"text_config.{name} {own[name]:g} is not applied: transformers' LLaVA has a bare head; here it is {value}",
        )
    return {**language, **changed}


def llava_config_to_hf(config: LlavaConfig, *, image_token_id: int) -> dict[str, object]:
    """A config.json that transformers opens, for a vocabulary that holds ``image_token_id``.

    Raises CheckpointError for a connector other than ``mlp2x_gelu``: this layout cannot say which one it is.
    """
    if config.projector != "mlp2x_gelu":
        raise CheckpointError(
            f"transformers' LLaVA has the two-layer projector only; this model has "
            f"{config.projector!r}. Convert it to `original` or keep it in our own format."
        )
    layer = config.feature_layer
    patches = config.vision.grid**2 + (config.feature_select == "cls_patch")
    tiled = {"image_grid_pinpoints": [list(canvas) for canvas in config.pinpoints]} if config.pinpoints else {}
    return {
        "architectures": [_class_of(config)],
        "model_type": "llava_next" if tiled else "llava",
        **tiled,
        "vision_config": vision_config_to_hf(config.vision),
        "text_config": dict(config.language),
        "image_token_index": image_token_id,
        "image_seq_length": patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": _strategy(config),
        "tie_word_embeddings": bool(config.language.get("tie_word_embeddings", False)),
    }


def _class_of(config: LlavaConfig) -> str:
    return "LlavaNextForConditionalGeneration" if config.pinpoints else "LlavaForConditionalGeneration"


def _strategy(config: LlavaConfig) -> str:
    """Which features stay, in their words; an encoder without a class token has none to drop."""
    return "full" if config.feature_select == "cls_patch" or not config.vision.class_token else "default"


# Weights.


def llava_from_hf(
    state: Mapping[str, Tensor], config: LlavaConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """Our state dict from any of the four layouts; dtypes stay. Raises CheckpointError on any misfit."""
    parts: dict[str, dict[str, Tensor]] = {"vision_tower": {}, "multi_modal_projector": {}, "language_model": {}}
    newline: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = name if name.startswith("language_model.") else name.removeprefix("model.")
        if bare == "lm_head.weight":
            bare = "language_model.lm_head.weight"
        if bare == _NEWLINE and config.pinpoints:
            newline[_NEWLINE] = tensor
            continue
        part, _, rest = bare.partition(".")
        if part not in parts:
            hint = " It belongs to LLaVA-NeXT (AnyRes)." if bare == _NEWLINE else ""
            raise CheckpointError(f"the weights do not fit LlavaForConditionalGeneration: unexpected {name}.{hint}")
        parts[part][rest] = tensor
    with torch.device("meta"):
        language = LanguageModel.build(config.language)
        connector = build_connector(config.projector, config.feature_width, language.width)
    ours = {
        "vision": vision_from_hf(parts["vision_tower"], config.vision, account),
        "connector": from_theirs(
            _projector(),
            parts["multi_modal_projector"],
            shapes_of(connector),
            "the two-layer projector",
            account=account,
        ),
        "language.lm": match_keys(
            language.lm,
            _language(parts["language_model"], language.lm, account),
            where="language_model",
            account=account,
        ),
    }
    named = {f"{part}.{name}": tensor for part, tensors in ours.items() for name, tensor in tensors.items()}
    return named | newline


def llava_to_hf(state: Mapping[str, Tensor], config: LlavaConfig) -> dict[str, Tensor]:
    """Their state dict in the oldest layout. A tied head is left out, as their files do."""
    tied = bool(config.language.get("tie_word_embeddings", False))
    theirs = {
        f"vision_tower.{name}": tensor
        for name, tensor in vision_to_hf(part_of(state, "vision."), config.vision, prefix="vision_model.").items()
    }
    projector = to_theirs(_projector(), part_of(state, "connector."))
    theirs |= {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    theirs |= {name: tensor for name, tensor in state.items() if name == _NEWLINE}
    with torch.device("meta"):
        body = f"{LanguageModel.build(config.language).lm.base_model_prefix}."
    return theirs | {
        f"language_model.{'model.' * name.startswith(body)}{name.removeprefix(body)}": tensor
        for name, tensor in part_of(state, "language.lm.").items()
        if not (tied and name == "lm_head.weight") and name != _HEAD_BIAS
    }


def _language(stored: dict[str, Tensor], lm: "PreTrainedModel", account: Account | None) -> dict[str, Tensor]:
    """Under names that :func:`match_keys` knows: the body is ``model.`` in these files, whatever its own calls it, and
    the head has no bias."""
    body = lm.base_model_prefix
    named = {
        f"{body}.{name.removeprefix('model.')}" if name.startswith("model.") else name: t for name, t in stored.items()
    }
    bias = dict(lm.named_parameters()).get(_HEAD_BIAS)
    if bias is not None and _HEAD_BIAS not in named:
        why = "transformers' LLaVA has a head without bias: zeros"
        load_report.absent(account, [f"language.lm.{_HEAD_BIAS}"], why)
        named[_HEAD_BIAS] = torch.zeros(bias.shape)
    return named


def _as_written(stored: Mapping[str, Tensor]) -> bool:
    """Whether the names are those that :func:`llava_to_hf` writes."""
    head = ("language_model.", "vision_tower.vision_model.", "multi_modal_projector.", _NEWLINE)
    return all(name.startswith(head) for name in stored)


def _projector() -> list[Entry]:
    return same("linear_1", "linear_1") + same("linear_2", "linear_2")


# Folders.


def read_llava_folder(path: str | Path, account: Account | None = None) -> tuple[LlavaConfig, dict[str, Tensor], int]:
    """Configuration, our state dict and the id of the image token, which decoding must forbid.

    Raises CheckpointError when something is missing or does not fit.
    """
    return llava_from_folder(path, read_state(path, account), account)


def llava_from_folder(
    path: str | Path, stored: Mapping[str, Tensor], account: Account | None = None
) -> tuple[LlavaConfig, dict[str, Tensor], int]:
    """The same with the weights given, in any of the four layouts. A head that is stored beside another table of
    embeddings is not tied, whatever config.json says, as in transformers."""
    described = read_json(Path(path) / "config.json")
    config = llava_config_from_hf(described, account)
    if not _as_written(stored):
        load_report.noted(
            account,
            "its tensors have names of transformers 4.52 or later; a folder written from it has those of older files "
            "(language_model.model.…, vision_tower.vision_model.…), which all versions and other engines read",
        )
    if config.language["tie_word_embeddings"] and _head_of_its_own(stored):
        config = replace(config, language={**config.language, "tie_word_embeddings": False})
    token: int = described.get("image_token_index", described.get("image_token_id", 32000))
    return config, llava_from_hf(stored, config, account), token


def _head_of_its_own(stored: Mapping[str, Tensor]) -> bool:
    ends = ("lm_head.weight", "language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
    found = [tensor for name, tensor in stored.items() if name.endswith(ends)]
    return len(found) == 2 and not torch.equal(*found)


def llava_export(model: Source[Llava, SpliceProcessor], *, shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    lm, model_type = net.language.lm, net.config.language["model_type"]
    bias = getattr(lm.get_output_embeddings(), "bias", None)
    must(
        bias is None or not bias.any(),
        "language.lm.lm_head.bias",
        "not zero",
        "transformers' LLaVA",
        "a head without bias",
    )
    plain = net.language.plain_head()
    must(plain, "language.model_type", model_type, "transformers' LLaVA", "an LM with a plain output head")
    must(not processor.around, "processor.around", processor.around, "transformers' LLaVA", "nothing")
    state, language, tokenizer, token = with_image_token(net, net.language, net.config.language, processor.tokenizer)
    config = replace(net.config, language=language)
    described = llava_config_to_hf(config, image_token_id=token)
    weights = llava_to_hf(state, config)
    form = form_of(processor.template, processor.tokenizer)
    template = chat_template(processor.template)
    if isinstance(form, ChatForm):
        template = form.template if form.marks_pictures else own_chat_template(form)
    owner = "LlavaNextProcessor" if config.pinpoints else "LlavaProcessor"
    files = {
        "config.json": with_dtype(described, weights),
        "generation_config.json": generation_config(model, forbidden=[token]),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            tokenizer,
            begin=not isinstance(form, ChatForm),  # which writes its beginning itself
            end=False,
            context=net.language.context,
            side="left",
            processor_class=owner,
        ),
        "preprocessor_config.json": image_processor(processor.image),
        "processor_config.json": {
            "processor_class": owner,
            "image_token": IMAGE,
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": _strategy(config),
            "num_additional_image_tokens": int(config.vision.class_token),
        },
        **({CHAT_TEMPLATE: template} if template else {}),
    }
    notes = ("a message that shows a picture and says nothing is a turn there; here the picture stands alone",)
    lost = f"processor.template {processor.template!r}, which is no conversation: such a model gets 'vicuna_v1'"
    return Export(
        files=files,
        losses=() if template else (lost,),
        notes=notes if template and processor.template != "plain" else (),
        opens=f"transformers.{_class_of(config)}.from_pretrained(FOLDER)",
    )
