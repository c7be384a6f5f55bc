"""The files beside the weights of a transformers folder: image processor, tokenizer, decoding; chat templates
are written by :mod:`isthmus.interop.written_template`.

Each says what our processor does, so that a prompt made by transformers has the ids, and a picture the pixels, that the
model was trained on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import processors
from torch import Tensor

from isthmus.checkpoint import Content, read_json
from isthmus.data.clip_tokenizer import ClipTokenizer
from isthmus.data.images import ImageTransform
from isthmus.data.tokenizer import BEGINS, CHAT_TEMPLATE, WHOLE, Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.export import AnySource, common_dtype, must
from isthmus.interop.special_ids import class_ids
from isthmus.language import Decoding

_PROCESSORS = {
    "square": "CLIPImageProcessor",
    "pad": "LlavaImageProcessor",
    "squash": "BlipImageProcessor",
    "anyres": "LlavaNextImageProcessor",
}
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""


def image_processor(transform: ImageTransform | None) -> dict[str, object]:
    """A preprocessor_config.json. Raises CheckpointError for a mode that no processor of transformers has."""
    must(transform is not None, "processor.image", None, "transformers", "an image transform")
    assert transform is not None
    must(transform.mode in _PROCESSORS, "processor.image.mode", transform.mode, "transformers", ", ".join(_PROCESSORS))
    side = {"height": transform.size, "width": transform.size}
    crops = transform.mode != "squash"
    return {
        "image_processor_type": _PROCESSORS[transform.mode],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": transform.size} if crops else side,
        "resample": RESAMPLE[transform.resample],
        **({"do_center_crop": True, "crop_size": side} if crops else {}),
        **({"do_pad": True} if transform.mode in ("pad", "anyres") else {}),
        **({"image_grid_pinpoints": [list(c) for c in transform.pinpoints]} if transform.pinpoints else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean or deviation of red, green and blue in a file; ImageTransform refuses another number of them."""
    return cast("tuple[float, float, float]", tuple(values))


def tokenizer_files(
    tokenizer: Tokenizer, *, begin: bool, end: bool, context: int | None, side: str = "right", **more: str
) -> dict[str, Content]:
    """tokenizer.json and its configuration; beginning- and end-of-sequence come by themselves where that is wanted.

    ``side`` is where batches are padded. CLIP's own tokenizer has its two files, and both ends anyway.
    """
    files = tokenizer.files()
    config = json.loads(files["tokenizer_config.json"])
    if not isinstance(tokenizer, ClipTokenizer):
        files["tokenizer.json"] = _framed(tokenizer, begin=begin, end=end).to_str()
    for own in (BEGINS, WHOLE):  # the frame says the one there, and the other is so there anyway
        config.pop(own, None)
    files.pop(CHAT_TEMPLATE, None)  # the model's own writer adds its template
    config |= {"padding_side": side, "model_max_length": context or int(1e30), **more}
    return {**files, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _framed(tokenizer: Tokenizer, *, begin: bool, end: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    first = list(tokenizer.begins) if begin else []
    last = [str(backend.id_to_token(tokenizer.eos_id))] if end else []
    frame = [*first, "$A", *last]
    specials = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
    backend.post_processor = processors.TemplateProcessing(single=frame, pair=[*frame, "$B"], special_tokens=specials)  # type: ignore[assignment]
    return backend


def swapped(tokenizer: Tokenizer, one: int, other: int) -> Tokenizer:
    """The tokenizer with two ids exchanged. Raises CheckpointError for a vocabulary without a table of names."""
    tree = json.loads(tokenizer.backend.to_str())
    vocab = tree["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise CheckpointError("the ids of this tokenizer cannot be exchanged: its vocabulary is not a table of names.")
    new = {one: other, other: one}
    tree["model"]["vocab"] = {token: new.get(number, number) for token, number in vocab.items()}
    for token in tree["added_tokens"]:
        token["id"] = new.get(token["id"], token["id"])
    tree["added_tokens"].sort(key=lambda token: token["id"])
    tree["post_processor"] = None  # it holds ids too; a new one is written with the folder
    return tokenizer.over(tokenizers.Tokenizer.from_str(json.dumps(tree)))


def generation_config(model: AnySource, *, forbidden: Sequence[int] = (), **more: object) -> dict[str, object]:
    """Greedy decoding that stops where our model stops and never says what it never says."""
    decoding = model.ended(Decoding())
    tokenizer = model.processor.tokenizer
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(decoding.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": sorted({*decoding.forbidden_ids, *forbidden}),
        "do_sample": False,
        "max_new_tokens": decoding.max_new_tokens,
        **more,
    }


def further_stops(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer besides end-of-sequence, by generation_config.json: a chat model's end of turn, say. Without
    that file the library takes what config.json says. Raises CheckpointError for what is no id."""
    file, unset = folder / "generation_config.json", list[int]()
    if file.is_file():
        eos: object = read_json(file).get("eos_token_id")
    else:
        file = folder / "config.json"
        eos, unset = _configured_end(folder)
    ids: set[int] = set()
    for number in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CheckpointError(f"{file}: eos_token_id holds {number!r}, which is not a token id.")
        ids.add(number)
    return tuple(sorted(ids - {tokenizer.eos_id, *unset}))


def _configured_end(folder: Path) -> tuple[object, list[int]]:
    """What config.json says of the end, and what its class says by default: nobody ever set that."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    own = text.get("eos_token_id") if isinstance(text, Mapping) else None
    return config.get("eos_token_id", own), class_ids(folder)["eos"] if config else []


def with_dtype(described: Mapping[str, object], weights: Mapping[str, Tensor]) -> dict[str, object]:
    """With the dtype under the name that every version reads."""
    return {**described, "torch_dtype": common_dtype(list(weights.values()))}
