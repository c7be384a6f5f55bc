"""One drawn folder asked end to end, here and in transformers: what differs, each with where."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PilImage

import isthmus
from isthmus.checkpoint import read_json
from isthmus.data.collate import collate
from isthmus.data.images import MadeImage
from isthmus.data.record import Record, Text
from isthmus.data.text import render
from isthmus.interop.convert import write_model
from isthmus.interop.hf_peer import load_peer, open_class
from isthmus.language import Decoding
from isthmus.testing import peer, probe

TEXTS = ("a red cube", "  two rings\n beside", "café 東京 🙂 what?", "x" * 40, "A Photo of; Question: 12.5%")


def pictures(dice: random.Random) -> Iterator[PilImage.Image]:
    """Odd sizes, shapes and modes."""
    noise = np.random.default_rng(dice.randrange(2**31))
    for width, height in ((dice.randint(1, 90), dice.randint(1, 90)), (33, 32), (32, 32), (dice.randint(200, 700), 3)):
        yield PilImage.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
    plain = PilImage.fromarray(noise.integers(0, 256, (40, 61, 3), dtype=np.uint8))
    for mode in dice.sample(("L", "1", "P", "RGBA", "LA", "CMYK"), 2):
        yield plain.convert(mode)
    yield PilImage.fromarray(noise.integers(0, 65536, (31, 45), dtype=np.uint16))


def differences(folder: Path, seed: int) -> list[str]:
    """Sentences; empty where nothing differs."""
    dice = random.Random(seed)
    model = isthmus.load(folder)
    found = [*_pixels(model, folder, dice), *_ids(model, folder), *_outputs(model, folder), *_beams(model, folder)]
    return found + _round_trip(model, folder)


def _pixels(model: Any, folder: Path, dice: random.Random) -> list[str]:
    image = getattr(model.processor, "image", None)
    if image is None:
        return []
    from transformers import AutoImageProcessor

    theirs, found = AutoImageProcessor.from_pretrained(folder), []
    for shown in pictures(dice):
        made = theirs(shown)
        made = made if isinstance(made, list | torch.Tensor | np.ndarray) else made["pixel_values"]  # IDEFICS's is bare
        pixels = torch.as_tensor(np.asarray(made[0]))
        ours = image(MadeImage(shown))
        if pixels.shape != ours.shape or not torch.allclose(pixels, ours, atol=1e-5 if model.kind == "flamingo" else 0):
            found.append(f"pixels of {shown.size} {shown.mode}")
    return found


def _ids(model: Any, folder: Path) -> list[str]:
    if model.kind not in ("lm", "clip", "llava"):
        return []
    theirs, found = load_peer(folder), []
    for text in TEXTS:
        if model.kind == "llava":
            asked = Record("t", (Text(text, role="user"),))
            told = str(render(asked, model.processor.template, prompt=True)).replace("</s>", theirs.tokenizer.eos_token)
            expected = theirs.tokenizer(told)["input_ids"]
            ours = list(model.processor.prompt(asked).streams["lm"].ids)
        elif model.kind == "clip":
            context = model.net.config.text.context
            expected = theirs.tokenizer(text, truncation=True, max_length=context)["input_ids"]
            ours = list(model.processor.text_example(text).streams["text"].ids)
        else:
            expected = theirs.tokenizer(text)["input_ids"]
            ours = list(model.processor.prompt(Record("t", (Text(text),))).streams["lm"].ids)
        if expected != ours:
            found.append(f"ids of {text!r}: {ours[:6]} for {expected[:6]}")
    return found


def _outputs(model: Any, folder: Path) -> list[str]:
    same = peer.compare(model, folder)
    found = [] if same.difference <= same.tolerance else [f"outputs by {same.difference:.2g}"]
    return found if same.tokens == same.of else [*found, f"greedy tokens: {same.tokens} of {same.of}"]


@torch.inference_mode()
def _beams(model: Any, folder: Path) -> list[str]:
    """Three beams, of all prompts in one batch here and one by one there."""
    if "generate" not in model.capabilities or probe.embeds(model) or model.kind == "flamingo":
        return []
    theirs, token = open_class(folder), read_json(folder / "config.json").get("image_token_index")
    asked = probe.prompts(model, probe.WORDS, (1, 2, 3))
    never = tuple(sorted({*probe.greedy(model).forbidden_ids, *((token,) if token is not None else ())}))
    never = tuple(i for i in never if i < model.net.language.vocab_size)
    ours = model.net.generate(collate(asked), Decoding(max_new_tokens=6, num_beams=3, forbidden_ids=never))
    found = []
    for number, (example, own) in enumerate(zip(asked, ours, strict=True)):
        inputs = model.system.peer_inputs(model, example, token)
        more = {"suppress_tokens": list(never) or None, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        written = theirs.generate(**inputs, max_new_tokens=6, num_beams=3, **more)[0].tolist()
        written = written[1:] if "encoder" in example.streams else written[-6:]
        if written != own:
            found.append(f"beams of prompt {number}: {own} for {written}")
    return found


def _round_trip(model: Any, folder: Path) -> list[str]:
    """Written for transformers again: values bit for bit, the same tensors stored, the same model there and here."""
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
    return found + [f"values here of {name}" for name in changed[:4]]
