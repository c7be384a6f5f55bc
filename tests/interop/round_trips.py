"""Every format, there and back: what docs/checkpoints.md tells and test_convert.py proves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import isthmus
from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.interop.convert import write_model
from isthmus.model import Model
from isthmus.testing import probe
from isthmus.testing.peer import compare
from tests.interop import tiny_models
from tests.models.tiny_blip2 import T5

Loader = Callable[[Path, Model], Model]
"""(folder, the model it was written from) -> the model that came back."""


@dataclass(frozen=True)
class Case:
    """A model written in a format. ``lost`` are the tensors the format has no place for; ``peer``: transformers has a
    class for it; ``lossy`` as in `isthmus convert`."""

    model: str
    to: str
    holds: str
    make: Callable[[], Model]
    back: Loader
    peer: bool = False
    lossy: bool = False
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``equal`` of ``tensors`` are equal to the bit; the largest difference of outputs here and in transformers."""

    tensors: int
    equal: int
    ours: float
    theirs: float | None
    tokens: tuple[int, int]


def opened(folder: Path, model: Model) -> Model:
    return isthmus.load(folder)


def openai(folder: Path, model: Model) -> Model:
    return isthmus.load(folder / "model.pt")


def flamingo(folder: Path, model: Model) -> Model:
    return isthmus.load(folder / "checkpoint.pt", vision=folder / "vision_encoder", language=folder / "lang_encoder")


def lavis(folder: Path, model: Model) -> Model:
    """The file tells its own sizes; those of the language model come with a folder of it."""
    if model.net.language is None:
        return isthmus.load(folder / "model.pth")
    return isthmus.load(folder / "model.pth", language=tiny_models.save_language(model, folder / "language"))


WITHOUT_WRITING = ("heads.temperature", "heads.lm_")
CASES = [
    Case("CLIP", "isthmus", "Clip", tiny_models.clip, opened),
    Case("LLaVA", "isthmus", "Llava", tiny_models.llava, opened),
    Case("LLaVA-NeXT", "isthmus", "Llava", tiny_models.llava_next, opened),
    Case("Flamingo", "isthmus", "Flamingo", tiny_models.flamingo, opened),
    Case("BLIP-2, first stage", "isthmus", "Blip2", lambda: tiny_models.blip2(None), opened),
    Case("CLIP", "hf", "CLIPModel", tiny_models.openai_clip, opened, peer=True),
    Case("SigLIP", "hf", "SiglipModel", tiny_models.siglip, opened, peer=True),
    Case("Image encoder", "isthmus", "ImageEncoder", tiny_models.image_encoder, opened),
    Case("Text encoder", "isthmus", "TextEncoder", tiny_models.text_encoder, opened),
    Case("Image encoder", "hf", "CLIPVisionModelWithProjection", tiny_models.image_encoder, opened, peer=True),
    Case(
        "Image encoder, no projection",
        "hf",
        "CLIPVisionModel",
        lambda: tiny_models.image_encoder(projected=False),
        opened,
        peer=True,
    ),
    Case(
        "Image encoder, SigLIP",
        "hf",
        "SiglipVisionModel",
        lambda: tiny_models.image_encoder(tiny_models.siglip()),
        opened,
        peer=True,
    ),
    Case("Text encoder", "hf", "CLIPTextModelWithProjection", tiny_models.text_encoder, opened, peer=True),
    Case(
        "Text encoder, no projection",
        "hf",
        "CLIPTextModel",
        lambda: tiny_models.text_encoder(projected=False),
        opened,
        peer=True,
    ),
    Case(
        "Text encoder, SigLIP",
        "hf",
        "SiglipTextModel",
        lambda: tiny_models.text_encoder(tiny_models.siglip()),
        opened,
        peer=True,
    ),
    Case("LM, Llama", "hf", "LlamaForCausalLM", tiny_models.lm, opened, peer=True),
    Case("LM, OPT", "hf", "OPTForCausalLM", lambda: tiny_models.lm(tiny_models.OPT, "document"), opened, peer=True),
    Case(
        "LM, GPT-NeoX",
        "hf",
        "GPTNeoXForCausalLM",
        lambda: tiny_models.lm(tiny_models.NEOX, "document"),
        opened,
        peer=True,
    ),
    Case("LLaVA", "hf", "LlavaForConditionalGeneration", tiny_models.llava, opened, peer=True),
    Case(
        "LLaVA, tied, padded pictures",
        "hf",
        "LlavaForConditionalGeneration",
        lambda: tiny_models.llava(language={**tiny_models.LLAMA, "tie_word_embeddings": True}, mode="pad"),
        opened,
        peer=True,
    ),
    Case(
        "LLaVA, every row in use",
        "hf",
        "LlavaForConditionalGeneration",
        lambda: tiny_models.llava(language={**tiny_models.LLAMA, "vocab_size": tiny_models.tokenizer().vocab_size}),
        opened,
        peer=True,
    ),
    Case("LLaVA-NeXT", "hf", "LlavaNextForConditionalGeneration", tiny_models.llava_next, opened, peer=True),
    Case("Flamingo as IDEFICS", "hf", "IdeficsForVisionText2Text", tiny_models.idefics, opened, peer=True),
    Case(
        "Flamingo as IDEFICS-instruct",
        "hf",
        "IdeficsForVisionText2Text",
        lambda: tiny_models.idefics(instruct=True),
        opened,
        peer=True,
    ),
    Case(
        "Flamingo as IDEFICS, a gate per channel",
        "hf",
        "IdeficsForVisionText2Text",
        lambda: tiny_models.idefics(gate="vector"),
        opened,
        peer=True,
    ),
    Case("BLIP-2, OPT", "hf", "Blip2ForConditionalGeneration", tiny_models.blip2, opened, peer=True),
    Case(
        "BLIP-2, T5",
        "hf",
        "Blip2ForConditionalGeneration",
        lambda: tiny_models.blip2({**T5, "vocab_size": tiny_models.ROWS}),
        opened,
        peer=True,
    ),
    Case(
        "InstructBLIP",
        "hf",
        "InstructBlipForConditionalGeneration",
        lambda: tiny_models.blip2(tiny_models.LLAMA, instruct=True),
        opened,
        peer=True,
    ),
    Case(
        "BLIP-2, first stage",
        "hf",
        "Blip2ForImageTextRetrieval",
        lambda: tiny_models.blip2(None),
        opened,
        peer=True,
        lossy=True,
        lost=WITHOUT_WRITING,
    ),
    Case("CLIP", "openai", "CLIP", tiny_models.published_clip, openai),
    Case("CLIP", "open_clip", "CLIP", tiny_models.clip, opened),
    Case("LLaVA", "original", "LlavaLlamaForCausalLM", tiny_models.llava, opened),
    Case(
        "LLaVA, one linear layer",
        "original",
        "LlavaLlamaForCausalLM",
        lambda: tiny_models.llava(projector="linear", template="llava_v1"),
        opened,
    ),
    Case("LLaVA-NeXT", "original", "LlavaLlamaForCausalLM", tiny_models.llava_next, opened),
    Case("BLIP-2, first stage", "lavis", "blip2", lambda: tiny_models.lavis(None), lavis),
    Case("BLIP-2, OPT", "lavis", "blip2_opt", tiny_models.lavis, lavis),
    Case("BLIP-2, T5", "lavis", "blip2_t5", lambda: tiny_models.lavis({**T5, "vocab_size": tiny_models.ROWS}), lavis),
    Case("Flamingo", "open_flamingo", "Flamingo", tiny_models.flamingo, flamingo),
]


def run(case: Case, folder: Path) -> Outcome:
    """Write, read, compare."""
    model = case.make()
    write_model(model, folder, case.to, lossy=case.lossy)
    again = case.back(folder, model)
    ours, back = model.net.state_dict(), again.net.state_dict()
    kept = [name for name in ours if not name.startswith(case.lost or ("-",))]
    equal = sum(name in back and _begins_with(back[name], ours[name]) for name in kept)
    worst, same, of = 0.0, 0, 0
    asked = (probe.prompts(m, probe.WORDS, (1, 2, 3)) for m in (model, again))  # each in its own processor's words
    for pair in zip(*asked, strict=True):
        a, b = (_outputs(m, example) for m, example in zip((model, again), pair, strict=True))
        worst = max(worst, float((a - b[..., : a.shape[-1]]).abs().max()))
        if "generate" in model.capabilities and not probe.embeds(model):
            (first,), (second,) = (probe.written(m, [e]) for m, e in zip((model, again), pair, strict=True))
            same, of = same + sum(x == y for x, y in zip(first, second, strict=True)), of + len(first)
    theirs = None
    if case.peer:
        found = compare(model, folder)
        theirs, same, of = found.difference, same + found.tokens, of + found.of
    return Outcome(len(kept), equal, worst, theirs, (same, of))


def _outputs(model: Model, example: Example) -> torch.Tensor:
    whole = probe.answered(model, example, [5, 6]) if "encoder" in example.streams else example
    (found,) = probe.outputs(model, collate([whole]))
    return found


def _begins_with(grown: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Equal to the bit; a vocabulary may have got one row more, for the place of a picture."""
    return torch.equal(grown[: len(tensor)] if tensor.ndim else grown, tensor) and len(grown.shape) == len(tensor.shape)


HEADER = (
    "| model | format | there it is | tensors equal to the bit | largest difference, opened here | in transformers | "
    "greedy tokens |"
)


def key_columns(case: Case) -> str:
    """What a row of the page says of a case before its figures."""
    return f"| {case.model} | `{case.to}` | `{case.holds}` |"


def row(case: Case, outcome: Outcome) -> str:
    theirs = "" if outcome.theirs is None else f"{outcome.theirs:.1g}"
    tokens = f"{outcome.tokens[0]} of {outcome.tokens[1]}" if outcome.tokens[1] else ""
    lost = f" (without {', '.join(f'`{name}*`' for name in case.lost)})" if case.lost else ""
    equal = f"{outcome.equal} of {outcome.tensors}{lost}"
    return f"{key_columns(case)} {equal} | {outcome.ours:.1g} | {theirs} | {tokens} |"
