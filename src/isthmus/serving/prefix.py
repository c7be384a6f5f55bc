"""Prompts that begin as an earlier one did are read from where they part: conversations that go on, several choices,
many questions about one picture."""

from collections import OrderedDict
from typing import Any

from torch import Tensor

from isthmus.language import Decoding, LanguageModel, Prompt, Read, Window

SHORTEST = 8
"""Tokens in common from which on a beginning is taken over."""


class Remembering:
    """A language model for a Decoder that keeps keys and values of prompts, at most ``size`` bytes of them.

    A beginning is the same when its embeddings are, number by number, pictures and all; so nothing that was read
    otherwise is ever taken over. Rows that look at pictures beside their text (Flamingo's) are always read in full.
    """

    def __init__(self, language: LanguageModel, size: int) -> None:
        self.language, self.size, self.held = language, size, 0
        self.taken = 0  # tokens that were not read again
        self._kept: OrderedDict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = OrderedDict()
        self._count = 0

    @property
    def writable(self) -> bool | str:
        return self.language.writable

    def window(self) -> Window:
        return self.language.window()

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        return self.language.settled(decoding, prompt)

    def next(self, ids: Tensor, positions: Tensor, window: Window, beside: Any) -> Tensor:
        return self.language.next(ids, positions, window, beside)

    def read(self, prompt: Prompt) -> Read:
        """As the language model reads it."""
        if len(prompt) != 1 or prompt.look is not None:
            return self.language.read(prompt)
        row = prompt.embeds[0, : int(prompt.lengths[0])]
        number, common = self._nearest(row)
        common = min(common, len(row) - 1)  # the last token is read in any case, for what follows it
        if number is None or common < SHORTEST:
            read = self.language.read(prompt)
        else:
            layers = self._kept[number][1]
            read = self.language.read_on([(k[:, :, :common], v[:, :, :common]) for k, v in layers], prompt)
            self.taken += common
            self._kept.move_to_end(number)
            if common >= len(self._kept[number][0]) - 1:  # the new one holds all of it
                self._drop(number)
        self._keep(row, [(keys, values) for keys, values in read.layers])
        return read

    def _nearest(self, row: Tensor) -> tuple[int | None, int]:
        """The kept prompt that has most tokens in common with the row's beginning, and how many."""
        best: tuple[int | None, int] = (None, 0)
        for number, (kept, _) in self._kept.items():
            width = min(len(row), len(kept))
            unlike = (row[:width] != kept[:width]).any(-1).nonzero()
            common = int(unlike[0]) if len(unlike) else width
            if common > best[1]:
                best = number, common
        return best

    def _keep(self, row: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        self._kept[self._count] = (row.clone(), layers)
        self.held += _bytes(self._kept[self._count])
        self._count += 1
        while self.held > self.size and self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        self.held -= _bytes(self._kept.pop(number))


def _bytes(entry: tuple[Tensor, list[tuple[Tensor, Tensor]]]) -> int:
    return entry[0].nbytes + sum(keys.nbytes + values.nbytes for keys, values in entry[1])
