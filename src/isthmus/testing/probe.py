"""What the contracts run a model on: a few records of its own kind, and its raw outputs for them.

Legend: B rows, T tokens, V vocabulary, E embedding width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, cast

import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus.batch import CAUSAL, IGNORE, Batch
from isthmus.data.attention import with_answer
from isthmus.data.collate import collate
from isthmus.data.images import MadeImage
from isthmus.data.processor import ImagesProcessor
from isthmus.data.record import Example, Image, Part, Record, Span, Text
from isthmus.language import Decoding
from isthmus.model import Model

NEW = 8
"""Tokens that a contract lets a model write."""
WORDS = ("red", "a large blue cube", "two rings and a small green ball beside")


class _Starts(Protocol):
    """A processor for an encoder-decoder."""

    start_id: int


def embeds(model: Model) -> bool:
    """Whether its outputs are vectors of pictures or texts, not logits of tokens."""
    return "embed_images" in model.capabilities or "generate" not in model.capabilities


def sees(model: Model) -> bool:
    return model.processor.image is not None


def reads(model: Model) -> bool:
    return not isinstance(model.processor, ImagesProcessor)


def picture(number: int) -> Image:
    """A coloured noise, another one (and of another shape) for every number; the same in every call. 0 is blank."""
    size = ((56, 44), (56, 44), (40, 92), (132, 36))[number % 4]
    if number == 0:
        return Image(MadeImage(PilImage.new("RGB", size, (124, 116, 104)), "blank"))
    noise = torch.rand(size[1] // 4, size[0] // 4, 3, generator=torch.Generator().manual_seed(number))
    made = PilImage.fromarray((noise * 255).to(torch.uint8).numpy()).resize(size, PilImage.Resampling.NEAREST)
    return Image(MadeImage(made, f"picture {number}"))


def records(model: Model, texts: Sequence[str], pictures: Sequence[int]) -> list[Record]:
    """One record per text: a pair for a model that embeds, running text or a question with an answer for others."""
    found = []
    for number, (text, shown) in enumerate(zip(texts, pictures, strict=True)):
        parts: list[Part] = [picture(shown)] if sees(model) else []
        if embeds(model):
            parts += [Text(text, learn=True)] if reads(model) else []
        elif model.processor.template == "document":
            parts += [Text(f"{text} is", learn=False), Text(f" {text}", learn=True)]
        else:
            parts = [replace(p, role="user") for p in parts]
            parts += [Text(f"{text}?", role="user"), Text(text, role="assistant", learn=True)]
        found.append(Record(id=f"probe {number}", parts=tuple(parts)))
    return found


def prompts(model: Model, texts: Sequence[str], pictures: Sequence[int]) -> list[Example]:
    """The same as prompts of the model; of a model that embeds, complete pairs."""
    if embeds(model):
        return [model.processor.example(r, 0) for r in records(model, texts, pictures)]
    return [model.processor.prompt(r) for r in records(model, texts, pictures)]


def lessons(model: Model, texts: Sequence[str], pictures: Sequence[int]) -> Batch:
    """The same as a batch to learn from."""
    return collate(taught(model, texts, pictures))


def taught(model: Model, texts: Sequence[str], pictures: Sequence[int]) -> list[Example]:
    """The same as samples to learn from."""
    return [model.processor.example(r, 0) for r in records(model, texts, pictures)]


def written_stream(example: Example) -> str:
    """The stream whose next tokens the outputs predict."""
    return "decoder" if "decoder" in example.streams else CAUSAL


def learnt_places(example: Example) -> list[int]:
    """The positions of the tokens that are learnt; the first of a row is predicted by nothing."""
    labels = example.streams[written_stream(example)].labels or ()
    return [place for place, label in enumerate(labels) if place and label != IGNORE]


def log_likelihood(logits: Tensor, example: Example) -> float:
    """Of the tokens that are learnt, by logits (T, V) of which each row predicts the next token."""
    labels = cast("list[int]", example.streams[written_stream(example)].labels)
    places = torch.tensor(learnt_places(example))
    targets = torch.tensor(labels)[places].to(logits.device)
    return float(logits[places - 1].log_softmax(-1).gather(1, targets[:, None]).sum())


def changed_from(model: Model, example: Example, place: int) -> Example:
    """The same with other text from ``place`` on."""
    name = written_stream(example)
    span = example.streams[name]
    words = model.processor.tokenizer.encode(WORDS[-1])
    ids = [i if n < place else next(w for w in words if w != i) for n, i in enumerate(span.ids)]
    labels = [label if n < place or label == IGNORE else ids[n] for n, label in enumerate(span.labels or ())]
    return replace(example, streams={**example.streams, name: replace(span, ids=ids, labels=labels)})


def answered(model: Model, prompt: Example, answer: Sequence[int]) -> Example:
    """A prompt and the tokens after it, as the net reads both at once."""
    if "encoder" in prompt.streams:
        start = cast(_Starts, model.processor).start_id
        return replace(prompt, streams={**prompt.streams, "decoder": Span([start, *answer])})
    beside = {name: span for name, span in prompt.streams.items() if name != CAUSAL}
    example = with_answer(prompt, answer)
    return replace(example, streams={**example.streams, **beside})


def turned(example: Example, by: int) -> Example:
    """Text without pictures whose tokens after the first go round: other text of the same length."""
    ((name, span),) = example.streams.items()
    first, *rest, last = span.ids
    return replace(example, streams={name: Span([first, *rest[by:], *rest[:by], last])})


@torch.inference_mode()
def outputs(model: Model, batch: Batch) -> list[Tensor]:
    """Per row what the net makes of it without any cache: logits (T, V) at its real tokens, or for a model that
    embeds one vector of its picture's and its text's embedding (and the matching logits) in a row."""
    return model.system.outputs(model.net.eval(), batch.to(model.device))


@torch.inference_mode()
def written(model: Model, prompts: Sequence[Example], *, forbidden: Sequence[int] = ()) -> list[list[int]]:
    """The NEW greedy tokens after each prompt, all prompts in one batch, by the net's own (cached) generation.

    Nothing ends an answer, so that every position is tried; what the model must never say stays forbidden,
    and so are the ids ``forbidden``.
    """
    return model.net.eval().generate(collate(prompts).to(model.device), greedy(model, forbidden))


def greedy(model: Model, forbidden: Sequence[int] = ()) -> Decoding:
    """NEW tokens, the likeliest each time, but none that the model must never say nor one of ``forbidden``."""
    never = {*model.ended(Decoding()).forbidden_ids, *forbidden}
    return Decoding(max_new_tokens=NEW, forbidden_ids=tuple(sorted(never)))


def regret(model: Model, prompt: Example, answer: Sequence[int]) -> float:
    """How much more an uncached pass over prompt and answer likes another token, at the worst place (logits).

    0 when the answer is exactly the greedy one; a hair above where two tokens are nearly alike.
    """
    if not answer:
        return 0.0
    (logits,) = outputs(model, collate([answered(model, prompt, answer)]))
    said = logits[-len(answer) - 1 : -1].clone()
    never = [*greedy(model).forbidden_ids, *model.system.never(model.net)]
    allowed = said.index_fill(1, torch.tensor(never, dtype=torch.long, device=said.device), -torch.inf)
    # A token that may not be said at all is infinitely regretted.
    chosen = allowed.gather(1, torch.tensor(list(answer), device=said.device)[:, None])[:, 0]
    return float((allowed.amax(1) - chosen).max())
