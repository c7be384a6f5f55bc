"""Prompts that begin as an earlier one did are read from where they part: conversations that go on, several choices,
many questions about one picture. A prompt that was read before is not read again."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from isthmus.interleave import MediaContext
from isthmus.language import Attended, Decoding, LanguageModel, Prompt, Read, Seq2SeqLM, Window

SHORTEST = 8
"""Tokens in common from which on a beginning is taken over."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A prompt that was read: its embeddings ``row`` (T, D), the pictures its tokens saw beside them, what became of
    it, and the bytes of all that."""

    row: Tensor
    context: MediaContext | None
    read: Read
    nbytes: int


class Remembering:
    """A language model for a Decoder that keeps what became of prompts, at most ``size`` bytes of it.

    A beginning is the same when its embeddings are, number by number, pictures and all, and of a Flamingo the pictures
    that its tokens see; so nothing that was read otherwise is ever taken over. An encoder reads every token in the
    light of all others, so that of an encoder-decoder only complete prompts are taken over.
    """

    def __init__(self, language: LanguageModel | Seq2SeqLM, size: int) -> None:
        self.language, self.size, self.held = language, size, 0
        self.taken = 0  # tokens that were not read again
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._count = 0

    @property
    def writable(self) -> bool | str:
        return self.language.writable

    @property
    def width(self) -> int:
        return self.language.width

    def window(self) -> Window:
        return self.language.window()

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        return self.language.settled(decoding, prompt)

    def next(self, ids: Tensor, positions: Tensor, window: Window, attended: Attended | None) -> Tensor:
        return self.language.next(ids, positions, window, attended)

    def read(self, prompt: Prompt) -> Read:
        """As the language model reads it."""
        if len(prompt) != 1 or not (prompt.attended is None or isinstance(prompt.attended, MediaContext)):
            return self.language.read(prompt)  # what else is attended to, nobody here can compare
        row = prompt.embeds[0, : int(prompt.lengths[0])]
        context = prompt.attended
        number, common = self._nearest(row, context)
        known = None if number is None else self._kept[number]
        if number is not None and known is not None and common == len(row) == len(known.row):
            self._kept.move_to_end(number)
            self.taken += common
            return known.read
        common = min(common, len(row) - 1)  # the last token is read in any case, for what follows it
        if number is None or known is None or common < SHORTEST or not isinstance(self.language, LanguageModel):
            read = self.language.read(prompt)
        else:
            read = self.language.read_on([(k[:, :, :common], v[:, :, :common]) for k, v in known.read.layers], prompt)
            self.taken += common
            self._kept.move_to_end(number)
            if common >= len(known.row) - 1:  # the new one holds all of it
                self._drop(number)
        self._keep(row, context, read)
        return read

    def _nearest(self, row: Tensor, context: MediaContext | None) -> tuple[int | None, int]:
        """The kept prompt that has most tokens in common with the row's beginning, and how many."""
        best: tuple[int | None, int] = (None, 0)
        for number, kept in self._kept.items():
            width = min(len(row), len(kept.row))
            unlike = (row[:width] != kept.row[:width]).any(-1).nonzero()
            common = int(unlike[0]) if len(unlike) else width
            if context is not None and kept.context is not None:
                common = min(common, context.in_common(kept.context))
            if common > best[1]:
                best = number, common
        return best

    def _keep(self, row: Tensor, context: MediaContext | None, read: Read) -> None:
        size = row.nbytes + sum(keys.nbytes + values.nbytes for keys, values in read.layers)
        size += 0 if read.attended is None else read.attended.nbytes  # the pictures that were read are in it
        self._kept[self._count] = Kept(row.clone(), None if context is None else context.apart(), read, size)
        self.held += size
        self._count += 1
        while self.held > self.size and self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        self.held -= self._kept.pop(number).nbytes
