"""Q-Former: BLIP-2's querying transformer (Li et al. 2023, 2301.12597, sec. 3.1, fig. 2), one class for three uses.

    image   queries (B, Q, D) ────────────────→ layers (cross-attention to (B, P, Dv)) → (B, Q, D)
    text               ids (B, T) → tables ───→ layers ────────────────────────────────→ (B, T, D)
    joint   queries and ids ──────────────────→ layers, queries in front ──────────────→ (B, Q + T, D)

    layer   self-attention over all rows → [every second layer: cross-attention of the query rows] → FFN of their own

Legend: B rows, Q queries, T text tokens, P vision tokens, D width, Dv width of the vision tokens, V vocabulary,
H heads. BERT-shaped: residual sums are normed after the addition (post-norm), queries have no positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.errors import ConfigError, DataError
from isthmus.nn.attention import Attention, attend, cast_once
from isthmus.nn.block import Mlp
from isthmus.nn.connectors.base import Connector, by_frame
from isthmus.nn.lengths import RowIndex, in_blocks
from isthmus.nn.precision import KeptFloat32

Past = tuple[Tensor, Tensor]
"""Keys and values (B, H, Q, D/H) of one layer's self-attention, as rows given later attend to them."""


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """BERT-base's shape by default. ``cross_every`` 2 puts cross-attention into layers 0, 2, 4, …

    ``vocab_size`` counts BERT's 30,522 tokens and [DEC]; ``dec_id`` is [DEC], the token a text to be written starts
    with. ``dropout`` acts on attention weights and on every sum before its norm.
    """

    vision_width: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    queries: int = 32
    cross_every: int = 2
    vocab_size: int = 30_523
    positions: int = 512
    dec_id: int = 30_522
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.cross_every < 1 or self.queries < 1 or self.layers < 1:
            raise ConfigError("a Q-Former has at least one layer and one query, and cross_every is at least 1.")
        if not 0 <= self.dec_id < self.vocab_size:
            raise ConfigError(f"dec_id {self.dec_id} lies outside the Q-Former's vocabulary of {self.vocab_size}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the Q-Former's dropout {self.dropout} must be a share in [0, 1).")


@dataclass(frozen=True, slots=True)
class QFormerOutput:
    """``hidden`` (B, rows given, D); ``past`` has one entry per layer, over all rows attended to so far."""

    hidden: Float[Tensor, "B rows D"]
    past: tuple[Past, ...]


class _Attention(Attention):
    """Attention with dropout on its weights, that hands out its keys and values and takes earlier ones."""

    def __init__(self, width: int, heads: int, dropout: float, context_width: int | None = None) -> None:
        super().__init__(width, heads, context_width=context_width)
        self.dropout = dropout

    def attend(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """(B, T, D) from ``x``, and the keys and values; those of ``past`` stand before the new ones."""
        x = cast_once(x)
        source = x if context is None else cast_once(context)
        k, v = self._split(self.k_proj(source)), self._split(self.v_proj(source))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        q = self._split(self.q_proj(x))
        y = attend(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, T, S): how much each row of ``x`` attends to each of ``context``, the mean over heads."""
        q, k = self._split(self.q_proj(x)), self._split(self.k_proj(context))
        return (q * self.head_width**-0.5 @ k.transpose(-1, -2)).softmax(-1).mean(1)


class _FeedForward(nn.Module):
    """LN(x + dropout(MLP(x))): the queries have one, the text another."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)
        self.ln = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x + self.dropout(self.mlp(x)))


class QFormerLayer(nn.Module):
    """One layer. See the drawing above; ``cross`` is none in layers without cross-attention."""

    def __init__(self, config: QFormerConfig, *, cross: bool, text: bool) -> None:
        super().__init__()
        self.attn = _Attention(config.width, config.heads, config.dropout)
        self.ln_attn = nn.LayerNorm(config.width, eps=config.eps)
        self.cross = _Attention(config.width, config.heads, config.dropout, config.vision_width) if cross else None
        self.ln_cross = nn.LayerNorm(config.width, eps=config.eps) if cross else None
        self.ffn_query = _FeedForward(config)
        self.ffn_text = _FeedForward(config) if text else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        queries: int,
        *,
        vision: Tensor | None,
        mask: Tensor | None,
        past: Past | None,
        read: int | None = None,
    ) -> tuple[Tensor, Past]:
        """(B, Q + T, D) -> the same, and this layer's keys and values. ``queries`` rows stand in front; with ``read``
        only so many rows from the front come out."""
        x, kept = self._attended(x, mask, past, read)
        # Not two slices: in the backward pass each would fill a tensor of x's size with zeros and add it.
        front = min(queries, x.shape[1])
        rows, text = x.split([front, x.shape[1] - front], dim=1)
        parts = []
        if queries:
            if self.cross is not None and self.ln_cross is not None:
                rows = self.ln_cross(rows + self.dropout(self.cross.attend(rows, vision)[0]))
            parts.append(self.ffn_query(rows))
        if text.shape[1]:
            assert self.ffn_text is not None  # the tables that made these rows come with it
            parts.append(self.ffn_text(text))
        return torch.cat(parts, dim=1), kept

    def patch_weights(self, x: Tensor, queries: int, *, vision: Tensor, mask: Tensor | None) -> Tensor:
        """(B, Q, P): how much the query rows attend to each vision token here."""
        assert self.cross is not None
        return self.cross.weights(self._attended(x, mask, None, queries)[0], vision)

    def _attended(self, x: Tensor, mask: Tensor | None, past: Past | None, read: int | None) -> tuple[Tensor, Past]:
        front = x[:, :read]
        mask = mask[:, :, :read] if mask is not None else None
        attended, kept = self.attn.attend(front, x, mask=mask, past=past)
        return self.ln_attn(front + self.dropout(attended)), kept


class QFormer(nn.Module):
    """The layers, and with ``text`` the word and position tables and the text FFNs. Starts as BERT does: N(0, 0.02).

    The learned queries are the caller's: they come in as any rows of width D.
    """

    def __init__(self, config: QFormerConfig, *, text: bool = True) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width) if text else None
        self.positions = nn.Embedding(config.positions, config.width) if text else None
        self.ln = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(config, cross=number % config.cross_every == 0, text=text) for number in range(config.layers)
        )
        self.apply(_init_as_bert)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"] | None = None,
        ids: Int[Tensor, "B T"] | None = None,
        *,
        vision: Float[Tensor, "B P Dv"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
        causal: bool = False,
        past: Sequence[Past] | None = None,
        read: int | None = None,
    ) -> QFormerOutput:
        """Run the rows given: ``queries`` (B, Q, D), text ``ids`` (B, T), or both, queries first.

        Args:
            vision: (B, P, Dv), what the queries attend to; needed with queries.
            text_mask: (B, T) bool, true on real text tokens; queries are never masked.
            causal: the mask for writing (ITG): text sees all queries and the text left of it, queries see no text.
                Else all rows see each other (ITM); text alone and queries alone are ITC's two sides.
            past: what an earlier call handed out, for text that follows those rows under the causal mask: the
                queries' keys and values, and those of text already written. Positions go on after that text.
            read: how many rows from the front are wanted; the last layer computes no others. Left out: all.

        Raises ConfigError for text without a text half, DataError for more text than positions.
        """
        x, count = self._embed(queries, ids, 0 if past is None else self._written(past))
        if count and vision is None:
            raise ConfigError("a Q-Former's queries attend to vision tokens; give `vision`.")
        mask = self._mask(x.shape[1], count, text_mask, causal or past is not None, past)
        kept: list[Past] = []
        for number, layer in enumerate(self.layers):
            earlier = past[number] if past is not None else None
            front = read if number == len(self.layers) - 1 else None
            x, pair = layer(x, count, vision=vision, mask=mask, past=earlier, read=front)
            kept.append(pair)
        return QFormerOutput(x, tuple(kept))

    def patch_weights(
        self,
        queries: Float[Tensor, "B Q D"],
        ids: Int[Tensor, "B T"] | None = None,
        *,
        vision: Float[Tensor, "B P Dv"],
        text_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B Q P"]:
        """(B, Q, P): how much each query attends to each vision token in the last layer with cross-attention."""
        x, count = self._embed(queries, ids, 0)
        mask = self._mask(x.shape[1], count, text_mask, False, None)
        last = (len(self.layers) - 1) // self.config.cross_every * self.config.cross_every
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, QFormerLayer)
            if number == last:
                return layer.patch_weights(x, count, vision=vision, mask=mask)
            x, _ = layer(x, count, vision=vision, mask=mask, past=None)
        raise AssertionError("a Q-Former has at least one layer")

    def _written(self, past: Sequence[Past]) -> int:
        """Text tokens among the rows of ``past``: all but the queries in front."""
        return past[0][0].shape[2] - self.config.queries

    def _embed(self, queries: Tensor | None, ids: Tensor | None, start: int) -> tuple[Tensor, int]:
        """(B, Q + T, D) normed rows, and Q."""
        parts = [] if queries is None else [queries]
        if ids is not None:
            if self.words is None or self.positions is None:
                raise ConfigError("this Q-Former has no text half (it was dropped), so it cannot read text.")
            if start + ids.shape[1] > self.config.positions:
                raise DataError(
                    f"a text of {start + ids.shape[1]} tokens passes the Q-Former's {self.config.positions} positions; "
                    "shorten it (the processor's max_text)."
                )
            places = torch.arange(start, start + ids.shape[1], device=ids.device)
            parts.append(self.words(ids) + self.positions(places))
        return self.dropout(self.ln(torch.cat(parts, dim=1))), 0 if queries is None else queries.shape[1]

    def _mask(
        self, rows: int, queries: int, text_mask: Tensor | None, causal: bool, past: Sequence[Past] | None
    ) -> Tensor | None:
        """(B or 1, 1, rows, columns) bool, true where a row may attend; none where it may attend everywhere."""
        if text_mask is None and not causal:
            return None
        earlier = 0 if past is None else past[0][0].shape[2]
        device = text_mask.device if text_mask is not None else self.ln.weight.device
        visible = torch.ones(1, rows, earlier + rows, dtype=torch.bool, device=device)
        if causal:
            # Rows are in order of time but for the queries, which see each other and nothing later.
            visible = visible.tril(earlier)
            visible[:, :queries, : earlier + queries] = True
        if text_mask is not None:
            front = text_mask.new_ones(len(text_mask), earlier + queries)
            visible = visible & torch.cat([front, text_mask], dim=1)[:, None]
        return visible[:, None]


def _init_as_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class QFormerConnector(KeptFloat32, Connector):
    """What stands between the encoder and the LM in BLIP-2: ``ln_vision``, the queries, the Q-Former, a projection.

    ``norm`` is one LayerNorm over all vision tokens, class token included; it trains with the rest. Without
    ``out_width`` there is no projection (stage 1). With ``text`` the Q-Former can read a text beside its queries.
    Everything here is kept in float32.
    """

    def __init__(self, config: QFormerConfig, out_width: int | None, *, text: bool, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.vision_width, eps=norm_eps)
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.qformer = QFormer(config, text=text)
        self.projection = None if out_width is None else nn.Linear(config.width, out_width)
        nn.init.normal_(self.queries, std=0.02)

    def vision_tokens(self, features: Float[Tensor, "*rows P Dv"]) -> Float[Tensor, "*rows P Dv"]:
        """(…, P, Dv) features of any precision -> normed, computed in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.norm(features.to(self.norm.weight.dtype))

    def encode_image(self, vision: Float[Tensor, "B P Dv"]) -> QFormerOutput:
        """The queries alone before normed ``vision`` (B, P, Dv): the image use."""
        return self.qformer(self.queries.expand(len(vision), -1, -1), vision=vision)

    def encode_pair(self, vision: Float[Tensor, "B P Dv"], text: Tokens) -> Float[Tensor, "B Q D"]:
        """The query rows (B, Q, D) when queries and ``text`` (B rows) see each other: the joint use."""

        def joint(rows: RowIndex) -> Tensor:
            own, count = text.rows(rows), self.config.queries
            queries = self.queries.expand(len(own.ids), -1, -1)
            return self.qformer(queries, own.ids, vision=vision[rows], text_mask=own.mask, read=count).hidden

        return in_blocks(text.lengths, joint)

    def encode_text(self, text: Tokens) -> Float[Tensor, "B D"]:
        """(B, D): ``text`` alone, read at its first token [CLS]."""

        def alone(rows: RowIndex) -> Tensor:
            own = text.rows(rows)
            return self.qformer(None, own.ids, text_mask=own.mask, read=1).hidden[:, 0]

        return in_blocks(text.lengths, alone)

    def forward(self, features: Float[Tensor, "N F P Dv"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, Dv) -> (N, F·Q, D_out): each frame by itself, its query outputs one after the other.

        ``text`` holds one row per visual (InstructBLIP's instruction).
        """
        visuals, frames = features.shape[:2]
        vision = self.vision_tokens(features).flatten(0, 1)
        if text is None:
            rows = self.encode_image(vision).hidden
        else:
            rows = self.encode_pair(
                vision, text.rows(torch.arange(visuals, device=vision.device).repeat_interleave(frames))
            )
        out = rows if self.projection is None else self.projection(rows)
        return out.unflatten(0, (visuals, frames)).flatten(1, 2)

    def patch_weights(
        self, features: Float[Tensor, "N F P Dv"], text: Tokens | None = None
    ) -> Float[Tensor, "N R F P"]:
        """(N, R, F, P): which vision tokens each visual token was made of, by the last cross-attention. A token is made
        of its own frame alone."""
        visuals, frames = features.shape[:2]
        vision = self.vision_tokens(features).flatten(0, 1)
        queries = self.queries.expand(len(vision), -1, -1)
        if text is None:
            weights = self.qformer.patch_weights(queries, vision=vision)
        else:
            rows = text.rows(torch.arange(visuals, device=vision.device).repeat_interleave(frames))
            weights = self.qformer.patch_weights(queries, rows.ids, vision=vision, text_mask=rows.mask)
        return by_frame(weights.unflatten(0, (visuals, frames)))

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """Q for every frame, whatever its size."""
        return frames * self.config.queries
