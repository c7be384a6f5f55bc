"""One drawn folder asked end to end, here and in transformers: what differs, each with where."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import isthmus
from isthmus.data.blip2 import clean_caption
from isthmus.data.images import MadeImage
from isthmus.data.record import Record, Text
from isthmus.data.text import render
from isthmus.interop.convert import write_model
from isthmus.interop.hf_peer import load_peer, open_class
from isthmus.systems import peers
from isthmus.testing import peer
from tests.fuzz.asked import TEXTS, unlike
from tests.fuzz.pictures import pictures, turned


def differences(folder: Path, seed: int) -> list[str]:
    """Sentences; empty where nothing differs."""
    dice = random.Random(seed)
    model = isthmus.load(folder)
    found = [*_pixels(model, folder, dice), *_ids(model, folder), *_outputs(model, folder)]
    found += _embedded(model, folder, dice)
    if "generate" in model.capabilities and "embed_images" not in model.capabilities:
        found += unlike(model, folder, dice)
    return [*found, *_round_trip(model, folder)]


def _seen(theirs: Any, picture: Any) -> Tensor:
    """(3, H, W), or tiles (F, 3, H, W), by the folder's own image processor."""
    made = theirs(picture)
    made = made if isinstance(made, list | torch.Tensor | np.ndarray) else made["pixel_values"]  # IDEFICS's is bare
    return torch.as_tensor(np.asarray(made[0]))


def _pixels(model: Any, folder: Path, dice: random.Random) -> Iterator[str]:
    image = getattr(model.processor, "image", None)
    if image is None:
        return
    from transformers import AutoImageProcessor
    from transformers.image_utils import load_image

    theirs = AutoImageProcessor.from_pretrained(folder)
    photograph = turned(dice, folder.parent)  # which only who opens the file knows to turn
    shown = [*((p, MadeImage(p), f"{p.size} {p.mode}") for p in pictures(dice))]
    for given, own, what in (*shown, (load_image(str(photograph)), photograph, "a turned photograph")):
        pixels, ours = _seen(theirs, given), image(own)
        if pixels.shape != ours.shape or not torch.allclose(pixels, ours, atol=1e-5 if model.kind == "flamingo" else 0):
            yield f"pixels of {what}"


def _ids(model: Any, folder: Path) -> Iterator[str]:
    for text in TEXTS:
        expected, ours = _ids_of(model, folder, text)
        if expected != ours:
            yield f"ids of {text!r}: {ours[:6]} for {expected[:6]}"


def _ids_of(model: Any, folder: Path, text: str) -> tuple[list[int], list[int]]:
    """Theirs and ours, of a text without pictures; prompts are compared when they are asked."""
    if model.kind in ("clip", "text_encoder"):
        tower = model.net.config.text
        # What is read at its last place is always padded to its whole context.
        padding = "max_length" if tower.pool == "last" else False
        how = {"padding": padding, "truncation": True, "max_length": tower.context}
        ours = list(model.processor.text_example(text).streams["text"].ids)
        ours += [tower.pad_id] * (tower.context - len(ours) if padding else 0)
        return _words(folder)(text, **how)["input_ids"], ours
    if model.kind == "blip2" and model.net.config.phase == "represent":
        longest = model.processor.max_text
        ours = list(model.processor.text_example(text).streams["qformer"].ids)
        return _words(folder)(clean_caption(text), truncation=True, max_length=longest)["input_ids"], ours
    if model.kind == "llava":
        theirs, asked = load_peer(folder), Record("t", (Text(text, role="user"),))
        told = str(render(asked, model.processor.template, prompt=True)).replace("</s>", theirs.tokenizer.eos_token)
        return theirs.tokenizer(told)["input_ids"], list(model.processor.prompt(asked).streams["lm"].ids)
    return [], []


def _words(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _outputs(model: Any, folder: Path) -> Iterator[str]:
    same = peer.compare(model, folder)
    if same.difference > same.tolerance:
        yield f"outputs by {same.difference:.2g}"
    if same.tokens != same.of:
        yield f"greedy tokens: {same.tokens} of {same.of}"


@torch.inference_mode()
def _embedded(model: Any, folder: Path, dice: random.Random) -> Iterator[str]:
    """Unit vectors of odd texts and pictures; here all texts in one batch."""
    if model.kind in ("clip", "text_encoder"):
        words, theirs, tower = _words(folder), open_class(folder), model.net.config.text
        padding = "max_length" if tower.pool == "last" else False
        ours = normalize(model.embed_texts(TEXTS), dim=-1)
        read = getattr(theirs, "get_text_features", theirs)
        for text, own in zip(TEXTS, ours, strict=True):
            given = words(text, padding=padding, truncation=True, max_length=tower.context, return_tensors="pt")
            given = {"input_ids": given["input_ids"]}
            if not torch.allclose(own, normalize(peers.vector(read(**given)), dim=-1), atol=1e-4):
                yield f"embedding of {text!r}"
    if "embed_images" in model.capabilities and model.kind in ("clip", "image_encoder"):
        from transformers import AutoImageProcessor

        theirs, images = open_class(folder), AutoImageProcessor.from_pretrained(folder)
        read = getattr(theirs, "get_image_features", theirs)
        for picture in dice.sample(list(pictures(dice)), 3):
            own = normalize(model.embed_images([picture])[0], dim=-1)
            their = peers.vector(read(pixel_values=_seen(images, picture)[None]))
            if not torch.allclose(own, normalize(their, dim=-1), atol=1e-4):
                yield f"embedding of {picture.size} {picture.mode}"


def _round_trip(model: Any, folder: Path) -> Iterable[str]:
    """Written for transformers again: values bit for bit, the same tensors stored, the same model there and here, and
    the same ids and pixels by the processors there."""
    out = folder.parent / f"{folder.name}-again"
    done = write_model(model, out, "hf")
    found = [f"convert needs leave: {loss}" for loss in done.losses]
    before, after = open_class(folder).state_dict(), open_class(out).state_dict()
    if before.keys() != after.keys():
        found.append(f"tensors there: {sorted(before.keys() ^ after.keys())[:4]}")
    grown = [
        n
        for n in before
        if n in after and not torch.equal(before[n], after[n][: len(before[n])] if before[n].ndim else after[n])
    ]
    found += [f"values of {name}" for name in grown[:4]]
    again = isthmus.load(out).net.state_dict()
    changed = [
        n
        for n, t in model.net.state_dict().items()
        if n not in again or not torch.equal(t, again[n][: len(t)] if t.ndim else again[n])
    ]
    found += [f"values here of {name}" for name in changed[:4]]
    return [*found, *(f"written again: {what}" for what in _read_again(model, folder, out))]


def _read_again(model: Any, folder: Path, out: Path) -> Iterator[str]:
    """What transformers' tokenizer and image processor make otherwise of the folder written than of the first one."""
    from transformers import AutoImageProcessor

    if model.kind != "image_encoder":
        one, other = _words(folder), _words(out)
        for text in TEXTS:
            text = clean_caption(text) if model.kind == "blip2" else text
            # IDEFICS's processor begins a text itself and has the tokenizer add nothing.
            before, after = (t(text, add_special_tokens=model.kind != "flamingo")["input_ids"] for t in (one, other))
            if before != after:
                yield f"ids of {text!r}: {after[:6]} for {before[:6]}"
    if getattr(model.processor, "image", None) is not None:
        first, second = AutoImageProcessor.from_pretrained(folder), AutoImageProcessor.from_pretrained(out)
        for picture in list(pictures(random.Random(0)))[:4]:
            if not torch.equal(_seen(first, picture), _seen(second, picture)):
                yield f"pixels of {picture.size}"
