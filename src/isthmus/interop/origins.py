"""Checkpoints of the original code bases: what is in a file or folder, recognised by its content, as a net and a
processor.

What such a checkpoint leaves out (a tokenizer, the frozen LM of OpenFlamingo, the base of a LoRA) is named by the user
through :class:`Given`; an error says which argument is due, and one that nothing needs is an error too.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import load_into, read_json
from isthmus.config import plain
from isthmus.data.clip_tokenizer import ClipTokenizer, canonical, clip_tokenizer
from isthmus.data.images import ImageTransform, Mode
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor
from isthmus.data.processor import ContrastiveProcessor, SpliceProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, read_state, tensors_of, unwrapped
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_files import further_stops
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.lora import base_named, merge_adapter
from isthmus.interop.open_clip import CANONICAL, clip_config_from_open_clip, clip_from_open_clip
from isthmus.interop.open_flamingo import config_from_open_flamingo, trained_from_open_flamingo
from isthmus.interop.open_lavis import open_lavis
from isthmus.interop.openai import HEAD_WIDTH, SCALARS, clip_config_from_openai, clip_from_openai
from isthmus.interop.original_llava import (
    AROUND,
    is_known_tower,
    llava_config_from_original,
    llava_from_original,
    projector_from_original,
    template_of,
    without_newline,
)
from isthmus.interop.special_ids import must_agree
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.flamingo import Flamingo
from isthmus.models.llava import Llava

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PROJECTOR, _TRAINED = "mm_projector.bin", "non_lora_trainables.bin"


def open_file(path: Path, given: Given) -> Opened:
    """A single file: CLIP of OpenAI or open_clip, a BLIP-2 of LAVIS, or what an OpenFlamingo run trained.

    Raises CheckpointError: another kind of file, or something that must be given.
    """
    state = unwrapped(read_archive(path, given.account))
    if "visual.conv1.weight" in state:
        if "text.token_embedding.weight" in state:  # CustomTextCLIP: the same with its text tower under a name
            state = {name.removeprefix("text."): value for name, value in state.items()}
        return _openai(path, tensors_of(state, path), given)
    if any(name.startswith("perceiver.") for name in state):
        return _open_flamingo(path, tensors_of(state, path), given)
    if any(name.startswith("Qformer.") for name in state):
        return open_lavis(path, tensors_of(state, path), given)
    if any(name.startswith("visual.trunk.") for name in state):
        raise CheckpointError(
            f"{path} is a model of open_clip whose image tower is timm's, and its weights do not say which: put "
            "open_clip_config.json beside them (as on the hub) and open the folder."
        )
    near = ", ".join(list(state)[:3])
    raise CheckpointError(f"{path} holds weights of no known layout (it begins with {near}).")


def open_clip_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of an open_clip folder, whichever of its JSON files holds one."""
    for file in sorted(folder.glob("*.json")):
        read = read_json if file.name == _OPEN_CLIP_CONFIG else _object
        values = read(file) if file.stat().st_size < 2**20 else {}
        inner = values.get("model_cfg", values)
        if isinstance(inner, Mapping) and "vision_cfg" in inner and "embed_dim" in inner:
            return {**values, "model_cfg": dict(inner)}
    return None


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty for anything else: names of classes, lines of JSON, somebody's notes."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def open_clip_folder(folder: Path, values: Mapping[str, Any], given: Given) -> Opened:
    """A folder that open_clip pushes to the hub: configuration, weights, tokenizer."""
    given.only("tokenizer", where=folder)
    described = values["model_cfg"]
    config = clip_config_from_open_clip(described)
    own = config.text.causal and not described.get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = _clip_tokenizer(folder, config, given, own=own)
    if not config.text.causal:  # padding is read like any token, and which one it is stands with the tokenizer alone
        config = replace(config, text=replace(config.text, pad_id=tokenizer.pad_id, eot_id=tokenizer.eos_id))
        if described["text_cfg"].get("tokenizer_kwargs") == CANONICAL:
            tokenizer = canonical(tokenizer, underscore=" ")
    net = Clip(config)
    ours = clip_from_open_clip(_open_clip_state(folder, given.account), config, given.account)
    load_into(net, ours, where=folder, account=given.account)
    picture = values.get("preprocess_cfg", {})
    base = ImageTransform.clip(config.vision.image_size)
    image = ImageTransform(
        size=config.vision.image_size,
        mode=_resizing(picture.get("resize_mode", "shortest"), folder),
        mean=tuple(picture.get("mean", base.mean)),
        std=tuple(picture.get("std", base.std)),
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


def _openai(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    """OpenAI's own archives carry three sizes among the weights, and their code knows one activation."""
    given.only("tokenizer", "activation", "head_width", where=path)
    own = any(name in state for name in SCALARS)
    activation = given.activation or ("quick_gelu" if own else None)
    if activation is None:
        activation = given.need("activation", path, "does not say its activation, quick_gelu or gelu")
    weights = {name: value for name, value in state.items() if name not in SCALARS}
    load_report.ignored(given.account, set(state) - set(weights), "sizes, which the weights have too")
    width = given.head_width or (HEAD_WIDTH if own else None)
    try:
        config = clip_config_from_openai(weights, activation=activation, head_width=width)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    net = Clip(config)
    load_into(net, clip_from_openai(weights, config, given.account), where=path, account=given.account)
    image = replace(ImageTransform.clip(config.vision.image_size), crop="round", deep="clip")
    tokenizer = _clip_tokenizer(path, config, given, own=True)
    return net, ContrastiveProcessor(tokenizer, image=image, context=config.text.context), ()


def _clip_tokenizer(where: Path, config: ClipConfig, given: Given, *, own: bool) -> Tokenizer:
    """The tokenizer named, or else beside the weights. ``own``: their code read text by the tokenizer it comes with,
    CLIP's, whatever form of it transformers was given; a vocabulary that is not CLIP's is taken as it is."""
    folder = where if where.is_dir() else where.parent
    named = given.tokenizer
    if named is None and not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        given.need("tokenizer", where, "comes without a tokenizer (a folder, or bpe_simple_vocab_16e6.txt.gz)")
    found = Path(named) if named is not None else folder
    if not found.is_dir():
        tokenizer: Tokenizer = ClipTokenizer.load(found)
    else:
        tokenizer = (clip_tokenizer(found) if own else None) or open_tokenizer(found)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"{found} has {tokenizer.vocab_size:,} tokens and {where} rows for {config.text.vocab_size:,}: another "
            "model's tokenizer."
        )
    return tokenizer


def _open_flamingo(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    given.only("vision", "language", "tokenizer", where=path)
    encoder = given.encoder(given.need("vision", path, "holds no vision encoder"))
    language = given.open(given.need("language", path, "holds no language model"))
    own = language.processor.tokenizer if given.tokenizer is None else open_tokenizer(given.tokenizer)
    tokenizer = own.with_tokens(*NEW_TOKENS)
    ids = {name: tokenizer.id_of(token) for name, token in zip(("end_id", "image_id"), NEW_TOKENS, strict=True)}
    config = config_from_open_flamingo(
        state, vision=encoder.config, language=plain(language.net.config)["language"], **ids
    )
    net = Flamingo(config)
    tensors = {f"vision.{n}": t for n, t in encoder.state.items()}
    tensors |= {f"language.lm.{n}": t for n, t in language.net.language.lm.state_dict().items()}
    tensors |= trained_from_open_flamingo(state, net, given.account)
    head = language.net.language.lm.get_output_embeddings().weight
    if net.language.new_rows.output is not None:
        # Their runs train the input table only, so files know no such rows; a new row is the mean, as there.
        mean = head.detach().float().mean(0).to(head.dtype)
        if "language.new_rows.output" not in tensors:
            why = "their runs train the input rows only; this is the mean row"
            load_report.absent(given.account, ["language.new_rows.output"], why)
            tensors["language.new_rows.output"] = mean.repeat(len(NEW_TOKENS), 1)
    load_into(net, tensors, where=path, account=given.account)
    # Whatever form the encoder has here, their code reads pictures by open_clip's transform.
    image = replace(encoder.image, crop="round", deep="clip")
    processor = InterleaveProcessor(tokenizer, image, template="open_flamingo", max_length=net.language.context or 2048)
    return net, processor, ()


def _inside(folder: Path, name: Any) -> bool:
    """Whether a model's configuration names a folder that lies within its own."""
    return isinstance(name, str) and Path(name).name == name and (folder / name / "config.json").is_file()


# The original LLaVA.


def open_original_llava(folder: Path, values: Mapping[str, Any], given: Given) -> Opened:
    """A folder of haotian-liu/LLaVA: the full model, a projector alone, or a LoRA with its side file."""
    given.only("vision", "language", "tokenizer", where=folder)
    partial = (folder / _PROJECTOR).is_file() or (folder / _TRAINED).is_file()
    language = (given.language or base_named(folder)) if partial else None
    state, tower = (_base(folder, language, given) if partial else read_state(folder, given.account)), None
    place = given.vision or _tower_here(folder, values["mm_vision_tower"])
    if place is not None:
        encoder = given.encoder(place)
        config, tower = llava_config_from_original(values, encoder.config), encoder.state
    elif is_known_tower(values):
        config = llava_config_from_original(values)
    else:
        config = given.need("vision", folder, f"was trained with the vision tower {values['mm_vision_tower']!r}")
    if partial:
        ours = _completed(folder, config, state, tower, given)
    else:
        ours = llava_from_original(state, config, vision=tower, account=given.account)
    net = Llava(config)
    load_into(net, ours, where=folder, account=given.account)
    base = ImageTransform.clip(
        config.vision.image_size, "pad" if values.get("image_aspect_ratio") == "pad" else "square"
    )
    tiled: dict[str, Any] = {"mode": "anyres", "pinpoints": config.pinpoints} if config.pinpoints else {}
    image = replace(base, deep="clip", **tiled)
    found = Path(given.tokenizer or language or folder)
    tokenizer = open_tokenizer(found)
    must_agree(folder, found, tokenizer, net.language.vocab_size)
    processor = SpliceProcessor(
        tokenizer,
        image=image,
        template=template_of(values),
        max_length=net.language.context or 2048,
        num_tokens=net.num_tokens(image.size, image.size),
        around=AROUND if values.get("mm_use_im_start_end") else (),
        stop_ids=further_stops(found, tokenizer),
    )
    image_token = tokenizer.backend.token_to_id("<image>")  # transformers' token, where their tokenizer came along
    sayable = image_token is not None and image_token < net.language.vocab_size
    return net, processor, (tokenizer.id_of("<image>"),) if sayable else ()


def _tower_here(folder: Path, name: Any) -> Path | None:
    """The vision tower that a configuration names, where it is a folder here: within the model's, as it says, or beside
    it."""
    if _inside(folder, name):
        return folder / name
    places = (Path(name), folder.parent / name) if isinstance(name, str) else ()
    return next((place for place in places if (place / "config.json").is_file()), None)


def _base(folder: Path, base: str | Path | None, given: Given) -> dict[str, Tensor]:
    """The language model that a projector or a LoRA belongs to, LoRA merged in, under transformers' names."""
    if base is None:
        base = given.need("language", folder, "holds no language model, only what was trained beside it")
    lm = given.open(str(base)).net.language.lm
    merge_adapter(lm, folder, given.account)
    return lm.state_dict()


def _completed(
    folder: Path, config: Any, language: Mapping[str, Tensor], tower: Any, given: Given
) -> dict[str, Tensor]:
    if tower is None:
        given.need("vision", folder, "holds no vision tower")
    side = folder / (_TRAINED if (folder / _TRAINED).is_file() else _PROJECTOR)
    trained, newline = without_newline(tensors_of(read_archive(side, given.account), side), config)
    connector = projector_from_original(trained, config, account=given.account)
    parts = {"vision": tower, "connector": connector, "language.lm": language}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | newline
