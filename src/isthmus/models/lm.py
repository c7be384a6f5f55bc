"""BareLM: a language model on its own, as the founding systems expect to find it.

    ids (B, T) -> embed (B, T, D) -> decoder of transformers -> next-token loss on labelled targets

Legend: B rows, T tokens, D width, V vocabulary. The parts are called as in every system of the library, so a run
folder of this model is what LLaVA, Flamingo and BLIP-2 take as their ``language``.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from isthmus.batch import Batch, Term
from isthmus.language import Decoding, LanguageModel, LibraryConfig, Prompt, Read
from isthmus.models.published import tiny_llama
from isthmus.net import Net

STREAM = "lm"


@dataclass(frozen=True, kw_only=True)
class LmConfig:
    """``language`` is the configuration of a causal LM of transformers, ``{"model_type": "llama", ...}``."""

    language: LibraryConfig

    @classmethod
    def tiny(cls, vocab_size: int = 2048) -> "LmConfig":
        """A Llama that two CPU cores train in minutes: 192 wide, 5 layers."""
        return cls(language=tiny_llama(vocab_size))


class BareLM(Net):
    """A decoder-only language model; its only part is ``language``."""

    KIND = "lm"
    CONFIG = LmConfig
    config: LmConfig
    language: LanguageModel

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.config = config
        self.language = LanguageModel.build(config.language)

    def embed_prompt(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The ``lm`` stream embedded, (B, T, D)."""
        return self.language.embed(batch.text[STREAM].ids)

    def logits(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits; values on padding mean nothing."""
        return self.language.logits(self.embed_prompt(batch))

    def loss(self, batch: Batch) -> dict[str, Term]:
        """``{"lm": next-token cross-entropy}`` over the labelled tokens of the ``lm`` stream."""
        total, count = self.language.loss(self.embed_prompt(batch), batch.text[STREAM])
        return {STREAM: Term(total, count)}

    def score(self, batch: Batch) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of the labelled tokens."""
        return self.language.score(self.embed_prompt(batch), batch.text[STREAM])

    def prompt(self, batch: Batch, past: Read | None = None) -> Prompt:
        """What a decoder continues, after ``past`` where rows begin with what was read already."""
        return Prompt(self.embed_prompt(batch), batch.text[STREAM].lengths, past=past)

    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """Continues every row; new tokens only, without the stop token."""
        return self.language.continued(self.prompt(batch), decoding)
