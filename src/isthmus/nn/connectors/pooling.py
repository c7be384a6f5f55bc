"""Connectors that make fewer tokens of a map of patches: neighbours joined, averaged, or attended to.

    pixel_shuffle   blocks of f x f patches side by side on channels (N, F, P/f², f²·D) ─ [LN] ─ MLP ─→ (…, D_out)
    average_pool    blocks of f x f patches averaged               (N, F, P/f², D)    ─ MLP ─→ (…, D_out)
    attention_pool  learnt queries (Q, D) ─ cross-attention over one frame's normed patches ─ LN ─ linear ─→ (…, D_out)

Legend: N visuals, F frames, P patches, D width of the features, D_out width of the language model, f factor, Q queries.
Tokens stand frame after frame; those of the first two row by row, as the patches do.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.errors import ConfigError
from isthmus.nn.attention import CrossAttention
from isthmus.nn.connectors.base import Connector, by_frame, side_of
from isthmus.nn.connectors.projector import Projector


class _Blocks(Connector):
    """Blocks of ``factor`` x ``factor`` patches of a square map, each one token."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise ConfigError(f"factor is the side of a block in patches, at least 1, not {factor}.")
        self.factor = factor

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """A token per block of every frame. Raises ConfigError for a map that is not cut into full blocks."""
        rows, columns = grid
        if rows != columns:
            raise ConfigError(
                f"{type(self).__name__} takes a square map of patches, and this one has {rows} rows and {columns} "
                "columns (a class token among the features makes it one row); choose another picture size or "
                "feature_select."
            )
        return frames * (side_of(rows * columns, self.factor, type(self).__name__) // self.factor) ** 2

    def _blocks(self, features: Tensor) -> Tensor:
        """(N, F, P, D) -> (N, F, P/f², f², D), the patches of a block row by row."""
        f, side = self.factor, side_of(features.shape[2], self.factor, type(self).__name__)
        blocks = features.unflatten(2, (side // f, f, side // f, f)).transpose(3, 4)
        return blocks.flatten(4, 5).flatten(2, 3)

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        """(N, F·P/f², F, P): the patches of a token's block in equal shares."""
        count, frames, patches = features.shape[:3]
        marks = torch.eye(patches, device=features.device)[None, None]  # each patch marked by a channel of its own
        return by_frame(self._blocks(marks).mean(3).expand(count, frames, -1, -1))


class PixelShuffle(_Blocks):
    """Pixel shuffle as in InternVL 1.5 (2404.16821, sec. 3.1; LayerNorm, then an MLP) and Idefics3 (2408.12637, sec.
    3; ``norm`` off, ``depth`` 1): nothing of a block is averaged away."""

    def __init__(
        self, vision_width: int, out_width: int, *, factor: int = 2, depth: int = 2, norm: bool = True
    ) -> None:
        super().__init__(factor)
        width = vision_width * factor**2
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.mlp = Projector(width, out_width, depth=depth)

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) -> (N, F·P/f², D_out)."""
        return self.mlp(self.norm(self._blocks(features).flatten(3)))


class AveragePool(_Blocks):
    """Averages of blocks, then LLaVA's MLP, as DeCo has it (2405.20985, sec. 3.3)."""

    def __init__(self, vision_width: int, out_width: int, *, factor: int = 2, depth: int = 2) -> None:
        super().__init__(factor)
        self.mlp = Projector(vision_width, out_width, depth=depth)

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) -> (N, F·P/f², D_out)."""
        return self.mlp(self._blocks(features).mean(3))


class AttentionPool(Connector):
    """Learnt queries over all patches of a frame in one attention, as CoCa's attentional pooling (2205.01917, sec.
    3.2); a linear layer to the language model's width. Raises ConfigError for sizes below 1, and heads that do not
    divide the width."""

    def __init__(self, vision_width: int, out_width: int, *, queries: int = 64, heads: int = 8) -> None:
        super().__init__()
        if queries < 1 or heads < 1 or vision_width % heads:
            raise ConfigError(
                f"attention_pool: {queries} queries and {heads} heads; both are at least 1, and the heads share the "
                f"features' {vision_width} channels evenly."
            )
        self.queries = nn.Parameter(torch.randn(queries, vision_width) * 0.02)
        self.norm = nn.LayerNorm(vision_width)
        self.attn = CrossAttention(vision_width, vision_width, heads, vision_width // heads)
        self.out_norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, out_width)

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) -> (N, F·Q, D_out), each frame by itself."""
        frames = self.norm(features).flatten(0, 1)
        pooled = self.attn(self.queries.expand(len(frames), -1, -1), *self.attn.keys_values(frames))
        return self.projection(self.out_norm(pooled)).unflatten(0, features.shape[:2]).flatten(1, 2)

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """Q for every frame, whatever its size."""
        return frames * len(self.queries)

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        """(N, F·Q, F, P): the attention, mean over heads."""
        frames = self.norm(features).flatten(0, 1)
        keys, _ = self.attn.keys_values(frames)
        found = self.attn.weights(self.queries.expand(len(frames), -1, -1), keys).mean(1)
        return by_frame(found.unflatten(0, features.shape[:2]))
