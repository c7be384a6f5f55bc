"""What a model attended to while it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from isthmus.data.record import Example, Span


@dataclass(frozen=True, slots=True)
class Attention:
    """An answer's ``text``, its ``tokens``, and one map per visual: (layers, tokens, F, rows, columns) of patches.

    A map of a token sums to 1 over the patches of the visual it saw, and is zero on every other visual.
    """

    text: str
    tokens: tuple[str, ...]
    maps: tuple[Tensor, ...]

    def words(self) -> list[tuple[str, tuple[int, ...]]]:
        """The text's words in order, each with the numbers of its tokens. Tokens that leave no trace in the text (a
        space alone, part of a character) belong to the word before them."""
        found: list[tuple[str, tuple[int, ...]]] = []
        at = 0
        for number, token in enumerate(self.tokens):
            bare = token.strip()
            start = self.text.find(bare, at) if bare else -1
            if start < 0:
                found[-1:] = [(word, (*numbers, number)) for word, numbers in found[-1:]]
                continue
            before, at = self.text[at:start], start + len(bare)
            if not found or any(c.isspace() for c in before):
                found.append((bare, (number,)))
            else:
                word, numbers = found[-1]
                found[-1] = (word + before + bare, (*numbers, number))
        return found

    def heat(self, visual: int) -> list[Tensor]:
        """For each of :meth:`words` a map (F, rows, columns) of a visual, the mean over layers and its tokens."""
        return [self.maps[visual][:, list(numbers)].mean((0, 1)) for _, numbers in self.words()]


def with_answer(prompt: Example, answer: Sequence[int]) -> Example:
    """A prompt of stream ``lm`` with the tokens of an answer after it, which see what its last token sees."""
    span = prompt.streams["lm"]
    media_index = None if span.media_index is None else [*span.media_index, *span.media_index[-1:] * len(answer)]
    return replace(prompt, streams={**prompt.streams, "lm": Span([*span.ids, *answer], None, media_index)})
