"""Speakers: what writes texts for one model, a token at a time and several texts together.

A speaker takes rows in while others are being written, and every row's text is the one it would be alone.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from isthmus.data.collate import collate
from isthmus.data.record import Example, Features
from isthmus.errors import CapabilityError
from isthmus.language import Decoder, Decoding, LanguageModel, Seq2SeqLM
from isthmus.model import Model
from isthmus.serving.limits import Limits
from isthmus.serving.prefix import Remembering


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a row. ``logprob`` is its natural log-probability by the model alone, before any temperature or cut;
    ``top`` the likeliest ids with theirs; none where the speaker has none. ``ended``: why nothing follows it, of a
    row that has ended; its last token may be none."""

    row: Hashable
    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ended: str = ""


class Speaker(Protocol):
    """What the scheduler needs of a model that writes."""

    has_logprobs: bool

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together, where there is a limit."""
        ...

    def room(self) -> int:
        """How many more rows fit now."""
        ...

    def begin(self, row: Hashable, example: Example, decoding: Decoding, top: int | None) -> None:
        """Take a row in. ``top``: how many of the likeliest tokens to name; none for no log-probabilities at all."""
        ...

    def step(self) -> list[Token]:
        """One more token of every row."""
        ...

    def drop(self, row: Hashable) -> None:
        """Stop writing a row; one that has ended or is unknown is left alone."""
        ...


class Together:
    """Rows that are decoded together and come and go, over the decoder's static cache.

    What the vision encoder made of a picture is kept, and serves whoever shows the same picture again; so are keys and
    values of prompts, for those that begin alike. Raises CapabilityError for a model whose texts no decoder can write.
    """

    has_logprobs = True

    def __init__(self, model: Model, limits: Limits) -> None:
        if not model.net.continues_prompts:
            raise CapabilityError("a model whose net gives no prompt, or no language model, has nothing for a decoder")
        language = model.net.language
        self.model, self.limits = model, limits
        if isinstance(language, LanguageModel | Seq2SeqLM):
            language = Remembering(language, limits.prefixes)
        self.decoder = Decoder(language)
        self.pictures = PictureFeatures(model, limits.features)
        self._numbers: dict[Hashable, int] = {}
        self._rows: dict[int, Hashable] = {}

    @property
    def context(self) -> int | None:
        return _context(self.model)

    def room(self) -> int:
        return self.limits.rows - len(self._rows)

    def begin(self, row: Hashable, example: Example, decoding: Decoding, top: int | None) -> None:
        with torch.inference_mode():
            batch = collate([self.pictures.encoded(example)]).to(self.model.device)
            prompt = self.model.net.prompt(batch)
            (number,) = self.decoder.add(prompt, self.model.ended(decoding), logprobs=top)
        self._numbers[row], self._rows[number] = number, row

    def step(self) -> list[Token]:
        found = []
        for new in self.decoder.step():
            row, last = self._rows[new.row], len(new.ids) - 1
            for n, token in enumerate(new.ids):
                logprob = new.logprobs[n] if new.logprobs else None
                end = new.finish or "" if n == last else ""
                known = () if logprob is None else logprob.top
                found.append(Token(row, token, None if logprob is None else logprob.logprob, known, end))
            if new.finish and not new.ids:
                found.append(Token(row, None, ended=new.finish))
            if new.finish:
                del self._numbers[row], self._rows[new.row]
        return found

    def drop(self, row: Hashable) -> None:
        number = self._numbers.pop(row, None)
        if number is not None:
            del self._rows[number]
            self.decoder.remove(number)


class PictureFeatures:
    """What the vision encoder makes of each picture, by its content, at most ``size`` bytes of it."""

    def __init__(self, model: Model, size: int) -> None:
        self.model, self.size, self.held = model, size, 0
        self.kept: OrderedDict[str, Tensor] = OrderedDict()

    def encoded(self, example: Example) -> Example:
        """The example with features in place of pixels, where the net reads such."""
        if not example.visuals or self.model.net.tap is None:
            return example
        found = []
        for image, pixels in zip(example.visuals, example.pixels, strict=True):
            key = image.content_key()
            features = self.kept.pop(key, None)
            if features is None:
                made = pixels(image)
                features = made.values if isinstance(made, Features) else self._encode(made)
                self.held += features.nbytes
            self.kept[key] = features
            found.append(Features(features))
        while self.held > self.size and self.kept:
            self.held -= self.kept.popitem(last=False)[1].nbytes
        return replace(example, pixels=tuple(lambda image, kept=kept: kept for kept in found))

    def _encode(self, pixels: Tensor) -> Tensor:
        """(F, P, D) of a picture (3, H, W) or of frames."""
        frames = pixels[None] if pixels.ndim == 3 else pixels
        return self.model.net.visual_features(frames[None].to(self.model.device))[0]


class WholeAnswers:
    """One text at a time by the model's own ``generate``, handed out when it is finished: for what has no decoder that
    rows can join, such as a Q-Former that writes by itself."""

    has_logprobs = False

    def __init__(self, model: Model) -> None:
        self.model = model
        self._waiting: list[tuple[Hashable, Example, Decoding]] = []

    @property
    def context(self) -> int | None:
        return _context(self.model)

    def room(self) -> int:
        return 1 - len(self._waiting)

    def begin(self, row: Hashable, example: Example, decoding: Decoding, top: int | None) -> None:
        self._waiting.append((row, example, decoding))

    def step(self) -> list[Token]:
        row, example, decoding = self._waiting.pop(0)
        with torch.inference_mode():
            batch = collate([example]).to(self.model.device)
            (ids,) = self.model.net.generate(batch, self.model.ended(decoding))
        full = len(ids) >= decoding.max_new_tokens
        return [*(Token(row, i) for i in ids), Token(row, None, ended="length" if full else "stop")]

    def drop(self, row: Hashable) -> None:
        self._waiting = [w for w in self._waiting if w[0] != row]


def _context(model: Model) -> int | None:
    language = model.net.part("language")
    return language.context if isinstance(language, LanguageModel) else None


def speaker_of(model: Model, limits: Limits) -> Speaker:
    """The best speaker that this model can have; its parameters no longer need gradients."""
    model.net.requires_grad_(False)
    try:
        return Together(model, limits)
    except CapabilityError:
        return WholeAnswers(model)
