"""Speakers: what writes texts for one model, a token at a time and several texts together.

A speaker takes rows in while others are being written, and every row's text is the one it would be alone.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.language import Decoding, LanguageModel
from isthmus.model import Model


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a row. ``logprob`` is its natural log-probability by the model alone, before any temperature or cut;
    ``top`` the likeliest ids with theirs; none where the speaker cannot tell. ``ended``: nothing follows it."""

    row: Hashable
    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ended: str = ""


class Speaker(Protocol):
    """What the scheduler asks of a model that writes."""

    tells_logprobs: bool

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
        """Stop writing a row; unknown ones are left alone."""
        ...


class WholeAnswers:
    """One text at a time by the model's own ``generate``, handed out when it is finished: for what has no decoder that
    rows can join, such as an encoder-decoder or a Q-Former that writes by itself."""

    tells_logprobs = False

    def __init__(self, model: Model) -> None:
        self.model = model
        self._waiting: list[tuple[Hashable, Example, Decoding]] = []

    @property
    def context(self) -> int | None:
        language = self.model.net.language
        return language.context if isinstance(language, LanguageModel) else None

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


def speaker_of(model: Model, rows: int) -> Speaker:
    """The best speaker that this model can have."""
    return WholeAnswers(model)
