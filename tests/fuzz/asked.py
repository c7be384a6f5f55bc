"""Questions as transformers' own processors put them, with odd words and pictures, and what both sides make of them."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.blip2 import clean_question
from isthmus.data.collate import collate
from isthmus.data.images import MadeImage
from isthmus.data.record import Example, Image, Part, Record, Role, Text
from isthmus.interop.hf_peer import AnsweringPeer, load_peer, open_class
from isthmus.language import Decoding
from isthmus.testing import probe
from tests.fuzz.pictures import pictures
from tests.narrow import must_be

TEXTS = ("a red cube", "  two rings\n beside", "café 東京 🙂 what?", "x" * 40, "A Photo of; Question: 12.5%")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NEW = 6
CLOSE = 1e-3
"""Two texts whose log-likelihoods differ by less are equally good: which comes first is a matter of rounding."""


@dataclass(frozen=True)
class Asked:
    """The same question for both sides: a record, and all that the folder's own processor gives its model."""

    record: Record
    inputs: Mapping[str, Any]


def unlike(model: Any, folder: Path, dice: random.Random) -> Iterator[str]:
    """Sentences on what the model is given and what it writes, greedy and with three beams; none where all is equal.

    Here all questions are read in one batch, there one by one.
    """
    make = _ASKED.get(read_json(folder / "config.json")["model_type"], _language)
    asked = list(make(model, folder, dice))
    examples = [model.processor.prompt(one.record) for one in asked]
    token = read_json(folder / "config.json").get("image_token_index")
    for number, (one, example) in enumerate(zip(asked, examples, strict=True)):
        yield from (f"question {number}: {what}" for what in _inputs(model, one, example, token))
    theirs, never, ends = open_class(folder), _never(model, token), _ends(model)
    for beams in (1, 3):
        decoding = Decoding(max_new_tokens=NEW, num_beams=beams, forbidden_ids=never)
        written = model.net.generate(collate(examples), decoding)
        for number, (one, example, own) in enumerate(zip(asked, examples, written, strict=True)):
            found = _generated(theirs, one.inputs, example, beams, never, ends)
            if found != own and not _alike(model, example, own, found, never):
                yield f"{beams} beams after question {number}: {own} for {found}"


def _ends(model: Any) -> tuple[int, ...]:
    """What ends an answer of the net by itself: an IDEFICS's own tokens, but for the picture's."""
    return tuple(i for i in getattr(model.net.language, "new_ids", ()) if i != model.net.config.image_id)


def _never(model: Any, token: int | None) -> tuple[int, ...]:
    """What neither side may write: ids that stand for pictures, and special ones."""
    held = set(model.system.never(model.net)) - set(_ends(model))
    known = {*probe.greedy(model).forbidden_ids, *held, *([] if token is None else [token])}
    (prompt,) = probe.prompts(model, probe.WORDS[:1], (1,))
    rows = probe.outputs(model, collate([probe.answered(model, prompt, [5, 6])]))[0].shape[-1]
    return tuple(sorted(i for i in known if i < rows))


def _inputs(model: Any, one: Asked, example: Example, token: int | None) -> Iterator[str]:
    """What differs of ids, masks, pixels and sizes."""
    theirs = {name: torch.as_tensor(value) for name, value in one.inputs.items()}
    if not example.pixels:  # without a picture IDEFICS's processor gives an empty one, which nothing looks at
        theirs = {name: value for name, value in theirs.items() if name in ("input_ids", "attention_mask")}
        name = "encoder" if "encoder" in example.streams else "lm"
        ours: dict[str, Tensor] = {"input_ids": torch.tensor([list(example.streams[name].ids)])}
        ours["attention_mask"] = torch.ones_like(ours["input_ids"])
    else:
        ours = model.system.peer_inputs(model, example, token)
    if theirs.keys() != ours.keys():
        yield f"given {sorted(ours)} for {sorted(theirs)}"
    for name in theirs.keys() & ours.keys():
        left, right = ours[name], theirs[name]
        # IDEFICS's pixels are normalised by another code there.
        near = left.shape == right.shape and torch.allclose(
            left.float(), right.float(), rtol=0, atol=1e-5 if model.kind == "flamingo" else 0
        )
        if not near:
            small = left.numel() < 200
            yield f"{name} {left.tolist()} for {right.tolist()}" if small else f"{name} {left.shape} for {right.shape}"


@torch.inference_mode()
def _generated(
    theirs: Any,
    inputs: Mapping[str, Any],
    example: Example,
    beams: int,
    never: Sequence[int],
    ends: Sequence[int],
) -> list[int]:
    """Up to what ends it; without an end all NEW tokens are written."""
    more = {"suppress_tokens": list(never) or None, "eos_token_id": list(ends) or None, "pad_token_id": 0}
    found = theirs.generate(**inputs, max_new_tokens=NEW, num_beams=beams, do_sample=False, **more)[0].tolist()
    if not ends:
        return found[1:] if "encoder" in example.streams else found[-NEW:]
    found = found[inputs["input_ids"].shape[1] :]
    return found[: next((place for place, token in enumerate(found) if token in ends), len(found))]


def _alike(model: Any, example: Example, one: Sequence[int], other: Sequence[int], never: Sequence[int]) -> bool:
    """Whether both texts are as likely, up to rounding."""
    told = []
    for text in (one, other):
        if len(text) != NEW:
            return False
        (logits,) = probe.outputs(model, collate([probe.answered(model, example, text)]))
        said = logits[-NEW - 1 : -1].index_fill(1, torch.tensor(list(never), dtype=torch.long), -torch.inf)
        told.append(float(said.log_softmax(-1).gather(1, torch.tensor(list(text))[:, None]).sum()))
    return abs(told[0] - told[1]) < CLOSE


def _shown(dice: random.Random, count: int) -> list[PilImage.Image]:
    found = list(pictures(dice))
    return dice.sample(found, count)


def _record(shown: Sequence[PilImage.Image], *texts: Text) -> Record:
    parts: list[Part] = [Image(MadeImage(picture)) for picture in shown]
    return Record("asked", (*parts, *texts))


def _language(model: Any, folder: Path, dice: random.Random) -> Iterator[Asked]:
    """A text to go on with, or questions and an answer in the folder's chat template."""
    words = load_peer(folder).tokenizer
    for text, further in zip(dice.sample(TEXTS, 3), dice.sample(TEXTS, 3), strict=True):
        if words.chat_template is None:
            yield Asked(_record((), Text(text)), words(text, return_tensors="pt", return_token_type_ids=False))
            continue
        whole: tuple[tuple[Role, str], ...] = (("user", text), ("assistant", "a ball"), ("user", further))
        turns = whole[: dice.choice((1, 3))]
        messages = [{"role": role, "content": said} for role, said in turns]
        told = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = {name: told[name] for name in ("input_ids", "attention_mask")}
        yield Asked(_record((), *(Text(said, role=role) for role, said in turns)), inputs)


def _llava(model: Any, folder: Path, dice: random.Random) -> Iterator[Asked]:
    """No picture, one and two, in the folder's chat template or Vicuna's words.

    A question about a picture is stripped here, as the released code does, and not by the folder's template: both get
    it without space around.
    """
    processor = must_be(AnsweringPeer, load_peer(folder)).processor
    for count, text in zip((1, 0, 2), dice.sample(TEXTS, 3), strict=True):
        shown, text = _shown(dice, count), text.strip() if count else text
        record = _record(shown, Text(text, role="user"))
        if processor.chat_template is None:
            told = f"{SYSTEM} USER: " + "<image>\n" * count + f"{text} ASSISTANT:"
        else:
            content = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
            told = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        yield Asked(record, processor(text=told, images=shown or None, return_tensors="pt"))


def _blip2(model: Any, folder: Path, dice: random.Random) -> Iterator[Asked]:
    """A caption to be written, and questions; InstructBLIP's stand by themselves."""
    from transformers import AutoProcessor

    config = read_json(folder / "config.json")
    if model.net.config.phase != "generate":
        return
    processor = AutoProcessor.from_pretrained(folder)
    processor.num_query_tokens = config["num_query_tokens"]  # old folders leave it to whoever reads them
    instruct, seq2seq = model.net.config.instruct, config["text_config"]["model_type"] == "t5"
    frame = "{}" if instruct else "Question: {} Short answer:" if seq2seq else "Question: {} Answer:"
    for text in dice.sample(TEXTS, 2):
        shown = _shown(dice, 1)
        told = frame.format(text.strip() if instruct else clean_question(text))
        record = _record(shown, Text(text, role="user"))
        yield Asked(record, processor(images=shown[0], text=told, return_tensors="pt"))
    if not instruct:
        shown = _shown(dice, 1)
        yield Asked(_record(shown), processor(images=shown[0], text="a photo of", return_tensors="pt"))


def _idefics(model: Any, folder: Path, dice: random.Random) -> Iterator[Asked]:
    """A question and a shot before it: in the paper's words, or of instruct models in those of their documentation."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    turns = model.net.config.turn_id is not None
    first, second = (text.strip(" ") for text in dice.sample(TEXTS, 2))  # their processor takes spaces off each piece
    one, two = _shown(dice, 2)
    end = "<end_of_utterance>"
    if turns:
        shot = ["User:", one, f"{first}{end}", f"\nAssistant: a ball{end}"]
        told = [[*shot[:3], "\nAssistant:"], [*shot, "\nUser:", two, f"{second}{end}", "\nAssistant:"]]
    else:
        shot = f"Question: {first} Answer:"
        told = [[one, shot], [one, f"{shot} a ball", two, f"Question: {second} Answer:"]]
    asked = [Image(MadeImage(one)), Text(first, role="user")]
    further = [Text("a ball", role="assistant"), Image(MadeImage(two)), Text(second, role="user")]
    for parts, pieces in zip((asked, [*asked, *further]), told, strict=True):
        inputs = processor(text=[pieces], add_end_of_utterance_token=False, return_tensors="pt")
        yield Asked(Record("asked", tuple(parts)), inputs)


_ASKED: Mapping[str, Callable[[Any, Path, random.Random], Iterator[Asked]]] = {
    **dict.fromkeys(("llava", "llava_next"), _llava),
    **dict.fromkeys(("blip-2", "instructblip"), _blip2),
    "idefics": _idefics,
}
