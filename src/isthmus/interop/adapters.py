"""Folders that hold a PEFT adapter alone, opened through the model it was trained on."""

import warnings
from dataclasses import replace
from pathlib import Path

from isthmus import mapped
from isthmus.checkpoint import read_json
from isthmus.errors import CheckpointError, IsthmusWarning
from isthmus.interop.folders import TOKENIZER_FILES, blip2_of, llava_of, load_foreign
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_peer import open_class
from isthmus.interop.lora import CONFIG, FILES, adapter_file, base_named, merge_adapter
from isthmus.models.lm import BareLM

_WHOLE = {**dict.fromkeys(("llava", "llava_next"), llava_of), **dict.fromkeys(("blip-2", "instructblip"), blip2_of)}
"""Models of several parts whose adapters may be on any of them: by model_type, what reads their merged weights."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def is_adapter(folder: Path) -> bool:
    """Does the folder hold an adapter and no other weights?"""
    return folder.is_dir() and (folder / CONFIG).is_file() and not _own_weights(folder)


def _own_weights(folder: Path) -> list[str]:
    """Files of weights of a model's own: neither an adapter's nor what trainers leave beside one."""
    aside = ("training_args.bin", "optimizer.pt", "scheduler.pt", "non_lora_trainables.bin", "mm_projector.bin", *FILES)
    return [f.name for end in _WEIGHTS for f in folder.glob(end) if f.name not in aside]


def warn_of_leftover(folder: Path) -> None:
    """Says so where an adapter lies beside a complete model: it is not merged into it."""
    if folder.is_dir() and (file := adapter_file(folder)) is not None and _own_weights(folder):
        warnings.warn(
            f"{folder} holds a complete model and an adapter, {file.name}: the model is opened as it is, the adapter "
            "is not merged. Move the adapter to a folder of its own and open that with language=…, or delete it.",
            IsthmusWarning,
            stacklevel=2,
        )


def open_adapter(folder: Path, given: Given) -> Opened:
    """A LoRA of a causal LM, or of transformers' LLaVA or BLIP-2, merged into its base.

    The base is ``language``, or the folder that the adapter names. Raises CheckpointError without one.
    """
    given.only("language", "tokenizer", where=folder)
    if adapter_file(folder) is None:
        raise CheckpointError(f"{folder} has {CONFIG} and no weights of an adapter ({' or '.join(FILES)}).")
    base = _base(folder, given)
    own = folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
    words = given.tokenizer or own
    file = base / "config.json"
    described = read_json(file) if file.is_file() else {}
    if (read := _WHOLE.get(str(described.get("model_type")))) is not None:
        with mapped.solid():  # the library fills its class itself
            peer = open_class(base)
        merge_adapter(peer, folder, given.account)
        return read(base, Path(words or base), dict(peer.state_dict()), given.account)
    if "model_type" in described and "format" not in described and "mm_vision_tower" not in described:
        beside = Given(open=given.open, account=given.account, tokenizer=words)
        net, processor, forbidden = load_foreign(base, described, beside)
    else:
        model = given.open(base)
        net, processor, forbidden = model.net, model.processor, model.forbidden
    if not isinstance(net, BareLM):
        raise CheckpointError(
            f"{folder}: adapters are merged into causal language models and transformers' LLaVA and BLIP-2; {base} "
            f"is a {net.KIND} model."
        )
    lm = net.language.lm
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    merge_adapter(lm, folder, given.account)
    if tied and lm.get_input_embeddings().weight is not lm.get_output_embeddings().weight:
        lm.config.tie_word_embeddings = False
        net.config = replace(net.config, language={**net.config.language, "tie_word_embeddings": False})
    return net, processor, forbidden


def _base(folder: Path, given: Given) -> Path:
    if given.language is None and (found := base_named(folder)) is not None:
        return found
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    return Path(given.need("language", folder, f"is an adapter of {named!r}, which is no folder here"))
