"""The text towers of CLIP (causal, read at the end-of-text token) and SigLIP (bidirectional, read at the last place).

    ids (B, T) → embedding + positions → blocks → LayerNorm → one place per row (B, D)

Legend: B rows, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.errors import ConfigError, DataError
from isthmus.nn.block import Block, init_block
from isthmus.nn.lengths import in_blocks


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes and variant of a text tower; ``context`` is the length of the position table in tokens.

    ``pool`` is the place a row is read at. ``eot``: the first ``eot_id``. ``argmax``: the largest id, OpenAI's rule,
    right while end-of-text is the largest id in use. ``last``: place context - 1 (SigLIP); such a tower
    attends in both directions and every row is padded to the full context with ``pad_id``.
    """

    context: int = 77
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    pool: Literal["eot", "argmax", "last"] = "eot"
    eot_id: int
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name, value in (("eot_id", self.eot_id), ("pad_id", self.pad_id)):
            if not 0 <= value < self.vocab_size:
                raise ConfigError(f"{name} {value} lies outside the vocabulary of {self.vocab_size}.")

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is left of it: all but the towers read at their last place."""
        return self.pool != "last"

    @classmethod
    def clip(cls, width: int, layers: int, heads: int) -> "TextConfig":
        """CLIP's tower with its published vocabulary (49,408) and context (77)."""
        return cls(vocab_size=49408, width=width, layers=layers, heads=heads, mlp_width=4 * width, eot_id=49407)

    @classmethod
    def siglip(cls, width: int, layers: int, heads: int, mlp_width: int) -> "TextConfig":
        """SigLIP's tower with its published vocabulary (32,000), context (64) and tanh-GELU."""
        return cls(
            context=64,
            vocab_size=32000,
            width=width,
            layers=layers,
            heads=heads,
            mlp_width=mlp_width,
            activation="gelu_tanh",
            eps=1e-6,
            pool="last",
            eot_id=1,
            pad_id=1,
        )


class TextTower(nn.Module):
    """Radford et al. 2021, sec. 2.4, or the text side of Zhai et al. 2023. Hands out the pooled row, unprojected."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, config.activation, config.eps)
            for _ in range(config.layers)
        )
        self.ln_final = nn.LayerNorm(config.width, eps=config.eps)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            assert isinstance(block, Block)
            init_block(block, self.config.layers)

    def forward(self, ids: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """(B, D) from right-padded ``ids`` (B, T) with ``lengths`` (B,) real tokens; padding never matters.

        Nothing right of the furthest pooled place is computed (in a causal tower it could not reach any), and of the
        last block that place alone. Raises DataError for a row that is too long or has no end-of-text.
        """
        self._check_length(lengths)
        real = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        if self.config.causal:
            place = self._end_of_text(ids, real)
        else:
            ids = self._fill(ids, real)
            place = torch.full_like(lengths, self.config.context - 1)
        return self.ln_final(in_blocks(place + 1, lambda rows: self._read(ids[rows], place[rows])))

    def _read(self, ids: Tensor, place: Tensor) -> Tensor:
        """(B, D), not normed, at ``place`` (B,)."""
        ids = ids[:, : int(place.max()) + 1]
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        *before, last = self.blocks
        for block in before:
            x = block(x, causal=self.config.causal)
        return last(x, causal=self.config.causal, read=place)[:, 0]

    def _check_length(self, lengths: Tensor) -> None:
        longest = int(lengths.max())
        if longest > self.config.context:
            raise DataError(
                f"row {int(lengths.argmax())} has {longest} tokens; the text tower reads at most "
                f"{self.config.context}. Truncate when tokenizing."
            )

    def _end_of_text(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B,) the place each row is read at."""
        ends = (ids == self.config.eot_id) & real
        absent = ~ends.any(dim=1)
        if bool(absent.any()):
            raise DataError(
                f"row {int(absent.int().argmax())} has no end-of-text (id {self.config.eot_id}), the token "
                "it is read at; was the text made by another tokenizer?"
            )
        return (ids.masked_fill(~real, -1) if self.config.pool == "argmax" else ends.int()).argmax(dim=1)

    def _fill(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B, context): whatever stands in the padding, or is missing, becomes ``pad_id``."""
        context, pad = self.config.context, self.config.pad_id
        ids = ids.masked_fill(~real, pad)[:, :context]
        return torch.nn.functional.pad(ids, (0, context - ids.shape[1]), value=pad)
