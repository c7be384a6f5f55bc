"""LLaVA in the layout of its original repository, read and written: full models, projector files, LoRA's side file.

Facts: spec of the files of haotian-liu/LLaVA v1 to v1.6.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict, TypeGuard, cast

import tokenizers
import torch
from torch import Tensor

from isthmus.data.images import ImageTransform
from isthmus.data.processor import SpliceProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, read_state, tensors_of
from isthmus.interop.entries import Entry, from_theirs, part_of, same, shapes_of
from isthmus.interop.export import Export, Source, common_dtype, must, shards
from isthmus.interop.given import Given, Opened, lacking, language_of
from isthmus.interop.hf_files import further_stops, image_processor, tokenizer_files
from isthmus.interop.hf_language import IMAGE, match_keys
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.hf_towers import vision_config_to_hf, vision_from_hf, vision_to_hf
from isthmus.interop.lora import base_named, merge_adapter
from isthmus.interop.openai import (
    published_transform,
)
from isthmus.interop.special_ids import must_agree
from isthmus.language import LanguageModel, known_fields, vocabulary_tables
from isthmus.load_report import Account
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.connectors import build_connector, named_mlp
from isthmus.nn.tiles import turned
from isthmus.nn.vit import VisionConfig
from isthmus.weights import load_into

_PROJECTOR_FILE, _TRAINED_FILE = "mm_projector.bin", "non_lora_trainables.bin"

TOWER = "vision_tower"
_OF_TRANSFORMERS = {IMAGE, "<pad>"}
"""What transformers' LLaVA adds after the language model's vocabulary."""

_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."
_NEWLINE = "model.image_newline"
AROUND = ("<im_start>", "<im_end>")
"""The trained tokens around a picture in v0 and the first v1 (``mm_use_im_start_end``)."""

TOWERS = {"clip-vit-large-patch14-336": VisionConfig.vit_l_14_336, "clip-vit-large-patch14": VisionConfig.vit_l_14}


class _Fields(TypedDict, total=False):
    """What is read of a config.json."""

    mm_vision_tower: object
    mm_projector_type: str
    mm_vision_select_layer: int
    mm_vision_select_feature: Literal["patch", "cls_patch"]
    mm_use_im_start_end: bool
    image_aspect_ratio: str | None


def is_original_llava(config: Mapping[str, object]) -> bool:
    """Whether a config.json is the original repository's; its ``model_type`` may be the one transformers uses."""
    return "mm_vision_tower" in config


def is_known_tower(config: Mapping[str, object]) -> bool:
    """Is the tower that a config.json names one whose sizes are known here: OpenAI's two ViT-L/14?"""
    return str(config.get("mm_vision_tower", "")).rstrip("/").rpartition("/")[2] in TOWERS


def template_of(config: Mapping[str, object]) -> str:
    """What the released models were trained with: v1 and 1.5 over Vicuna, 1.6 over Mistral."""
    if config.get("model_type") == "llava_mistral":
        return "mistral_instruct"
    return "vicuna_v1" if config.get("mm_projector_type", "linear") != "linear" else "llava_v1"


def llava_config_from_original(config: Mapping[str, object], vision: VisionConfig | None = None) -> LlavaConfig:
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
    values = cast(_Fields, config)
    return LlavaConfig(
        vision=vision or TOWERS[tower](),
        language=known_fields({**config, "model_type": base}),
        projector=values.get("mm_projector_type", "linear"),
        feature_layer=values.get("mm_vision_select_layer", -2),
        feature_select=values.get("mm_vision_select_feature", "patch"),
        pinpoints=_pinpoints(config),
    )


def _pinpoints(config: Mapping[str, object]) -> tuple[tuple[int, int], ...]:
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


def _projector(ours: Mapping[str, object]) -> list[Entry]:
    """One linear layer has no number; in an MLP the layers have even numbers, the GELUs the odd ones between."""
    depth = len(ours) // 2
    if depth == 1:
        return [Entry(leaf, (f"linear_1.{leaf}",)) for leaf in ("weight", "bias")]
    return [entry for n in range(depth) for entry in same(str(2 * n), f"linear_{n + 1}")]


def _without_wrappers(name: str) -> str:
    """``base_model.model.model.x``, ``model.x`` and ``x`` are the same tensor."""
    return name.removeprefix("base_model.model.").removeprefix("model.")


def original_llava_export(model: Source[Llava, SpliceProcessor], *, shard_bytes: int) -> Export:
    """A folder of haotian-liu/LLaVA: the full model with its tower, and the tower alone in a folder of its own."""
    config, image, who = model.net.config, model.processor.image, "the original LLaVA"
    bases = {"llama": "llava_llama", "mistral": "llava_mistral"}
    model_type = str(config.language["model_type"])
    must(model_type in bases, "language.model_type", model_type, who, " or ".join(bases))
    must(isinstance(config.feature_layer, int), "feature_layer", config.feature_layer, who, "one number")
    must(named_mlp(config.projector) is not None, "projector", config.projector, who, "linear or mlpNx_gelu")
    modes = ("square", "pad", "anyres")
    must(image.mode in modes, "processor.image.mode", image.mode, who, "square, pad or anyres")
    around = model.processor.around
    must(around in ((), AROUND), "processor.around", around, who, f"nothing or {AROUND}")
    tower = vision_config_to_hf(config.vision)
    must(tower["model_type"] == "clip_vision_model", "vision", tower["model_type"], who, "a tower of CLIP")
    state, config, tokenizer, losses = _without_image_token(model)
    weights = llava_to_original(state, config)
    if config.language.get("tie_word_embeddings"):
        weights.pop("lm_head.weight")
    tower_weights = vision_to_hf(part_of(state, "vision."), config.vision, prefix="vision_model.")
    described = _original_config(model, config, bases[model_type])
    template, stops = template_of(described), [tokenizer.eos_id, *model.processor.stop_ids]
    if model.processor.template != template:
        losses += (f"processor.template {model.processor.template!r}: such a model gets {template!r}",)
    own = ImageTransform.clip(config.vision.image_size)
    if described["mm_vision_tower"] == TOWER:  # whose image processor their code reads
        own = replace(own, mean=image.mean, std=image.std, resample=image.resample)
    files = {
        "config.json": {**described, "torch_dtype": common_dtype(list(weights.values()))},
        "generation_config.json": {"eos_token_id": stops if stops[1:] else stops[0], "do_sample": False},
        **shards(weights, shard_bytes),
        **tokenizer_files(tokenizer, begin=True, end=False, context=model.net.language.context, side="right"),
        f"{TOWER}/config.json": {**tower, "architectures": ["CLIPVisionModel"]},
        f"{TOWER}/preprocessor_config.json": image_processor(own),
        f"{TOWER}/model.safetensors": tower_weights,
    }
    return Export(
        files=files,
        losses=(*losses, *published_transform(image, replace(own, mode=image.mode, pinpoints=image.pinpoints))),
        opens="llava.model.builder.load_pretrained_model('FOLDER', None, 'llava-own')",
    )


def _without_image_token(
    model: Source[Llava, SpliceProcessor],
) -> tuple[dict[str, Tensor], LlavaConfig, Tokenizer, tuple[str, ...]]:
    """State, configuration and tokenizer without transformers' token for the place of a picture and all rows after it,
    which their code could write and never reads; and the loss where a token after it is in use."""
    net, tokenizer = model.net, model.processor.tokenizer
    state, config = net.state_dict(), net.config
    if not model.forbidden:
        return state, config, tokenizer, ()
    first = min(model.forbidden)
    tree = json.loads(tokenizer.backend.to_str())
    above = {name for name, number in tokenizer.backend.get_vocab().items() if number >= first}
    if not above <= _OF_TRANSFORMERS & {token["content"] for token in tree["added_tokens"]}:
        return state, config, tokenizer, (f"forbidden {list(model.forbidden)}: their code may write these tokens",)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in above]
    kept = {name.removesuffix("_token"): None if t in above else t for name, t in tokenizer.specials.items()}
    for name in vocabulary_tables(net.language):
        state[f"language.{name}"] = state[f"language.{name}"][:first]
    config = replace(config, language={**config.language, "vocab_size": min(first, net.language.vocab_size)})
    return state, config, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)), **kept), ()  # type: ignore[arg-type]


def _original_config(model: Source[Llava, SpliceProcessor], config: LlavaConfig, model_type: str) -> dict[str, object]:
    known = {f"openai/{name}": tower() for name, tower in TOWERS.items()}
    return {
        **config.language,
        "architectures": ["LlavaLlamaForCausalLM" if model_type == "llava_llama" else "LlavaMistralForCausalLM"],
        "model_type": model_type,
        "mm_vision_tower": next((name for name, tower in known.items() if tower == config.vision), TOWER),
        # Their code then reads the tower out of these weights instead of keeping the named one's.
        "unfreeze_mm_vision_tower": True,
        "mm_hidden_size": config.feature_width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_select_feature": config.feature_select,
        "mm_patch_merge_type": "spatial_unpad" if config.pinpoints else "flat",
        **({"image_grid_pinpoints": [list(c) for c in turned(config.pinpoints)]} if config.pinpoints else {}),
        "mm_use_im_start_end": bool(model.processor.around),
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": model.processor.image.mode,
        "tokenizer_model_max_length": model.processor.max_length,
        "tokenizer_padding_side": "right",
    }


def open_original_llava(folder: Path, described: Mapping[str, object] | None, given: Given) -> Opened | None:
    """A folder of haotian-liu/LLaVA: the full model, a projector alone, or a LoRA with its side file;
    ``described`` is its config.json."""
    if described is None or not is_original_llava(described):
        return None
    values = cast(_Fields, described)
    given.only("vision", "language", "tokenizer", where=folder)
    partial = (folder / _PROJECTOR_FILE).is_file() or (folder / _TRAINED_FILE).is_file()
    language = (given.language or base_named(folder)) if partial else None
    state, tower = (_base(folder, language, given) if partial else read_state(folder, given.account)), None
    pictures: ImageTransform | None = None
    named = values.get("mm_vision_tower")
    place = given.vision or _tower_here(folder, named)
    if place is not None:
        encoder = given.encoder(place)
        config, tower, pictures = llava_config_from_original(described, encoder.config), encoder.state, encoder.image
    elif is_known_tower(described):
        config = llava_config_from_original(described)
    else:
        raise lacking("vision", folder, f"was trained with the vision tower {named!r}")
    if partial:
        ours = _completed(folder, config, state, tower, given)
    else:
        ours = llava_from_original(state, config, vision=tower, account=given.account)
    net = Llava(config)
    load_into(net, ours, where=folder, account=given.account)
    image = _pictures(pictures or ImageTransform.clip(config.vision.image_size), values, config)
    found = Path(given.tokenizer or language or folder)
    tokenizer = open_tokenizer(found)
    must_agree(folder, found, tokenizer, net.language.vocab_size)
    processor = SpliceProcessor(
        tokenizer,
        image=image,
        template=template_of(described),
        max_length=net.language.context or 2048,
        num_tokens=net.num_tokens(image.size, image.size),
        around=AROUND if values.get("mm_use_im_start_end") else (),
        stop_ids=further_stops(found, tokenizer),
    )
    image_token = tokenizer.backend.token_to_id("<image>")  # transformers' token, where their tokenizer came along
    sayable = image_token is not None and image_token < net.language.vocab_size
    return net, processor, (tokenizer.id_of("<image>"),) if sayable else ()


def _pictures(own: ImageTransform, values: _Fields, config: LlavaConfig) -> ImageTransform:
    """Their code makes pixels by the image processor of the tower, after tiles or a canvas."""
    mode = own.mode if own.mode == "squash" else "square"
    if config.pinpoints or values.get("image_aspect_ratio") == "pad":
        mode = "anyres" if config.pinpoints else "pad"
    return replace(own, mode=mode, pinpoints=config.pinpoints, crop="floor", deep="clip")


def _tower_here(folder: Path, name: object) -> Path | None:
    """The vision tower that a configuration names, where it is a folder here: within the model's, as it says, or beside
    it."""
    if _inside(name, folder):
        return folder / name
    places = (Path(name), folder.parent / name) if isinstance(name, str) else ()
    return next((place for place in places if (place / "config.json").is_file()), None)


def _inside(name: object, folder: Path) -> TypeGuard[str]:
    """Whether a model's configuration names a folder that lies within its own."""
    return isinstance(name, str) and Path(name).name == name and (folder / name / "config.json").is_file()


def _base(folder: Path, base: str | Path | None, given: Given) -> dict[str, Tensor]:
    """The language model that a projector or a LoRA belongs to, LoRA merged in, under transformers' names."""
    if base is None:
        base = given.need("language", folder, "holds no language model, only what was trained beside it")
    lm = language_of(given.open(str(base))).lm
    merge_adapter(lm, folder, given.account)
    return lm.state_dict()


def _completed(
    folder: Path,
    config: LlavaConfig,
    language: Mapping[str, Tensor],
    tower: Mapping[str, Tensor] | None,
    given: Given,
) -> dict[str, Tensor]:
    if tower is None:
        raise lacking("vision", folder, "holds no vision tower")
    side = folder / (_TRAINED_FILE if (folder / _TRAINED_FILE).is_file() else _PROJECTOR_FILE)
    trained, newline = without_newline(tensors_of(read_archive(side, given.account), side), config)
    connector = projector_from_original(trained, config, account=given.account)
    parts = {"vision": tower, "connector": connector, "language.lm": language}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | newline
