"""Gated cross-attention: how pictures enter a frozen language model (2204.14198, sec. 3.1.2 and fig. 4).

    y ─→ y + tanh(a)·Attn(LN(y) ; media of the image that the token may see) ─→ y + tanh(b)·MLP(LN(y)) ─→ frozen block

Legend: B rows, T text tokens, N visual inputs per row, R visual tokens each, D width of the LM, d of the media. The
gates a and b start at 0, so the language model is at first exactly the one that was frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.errors import ConfigError, DataError
from isthmus.nn.attention import CrossAttention
from isthmus.nn.block import GatedMlp, Mlp

Media = Literal["previous", "next", "all"]


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """Sizes and variant of a gated block.

    ``mlp_width`` defaults to 4 D; ``mlp`` is ``plain`` (two layers) or ``gated`` (SwiGLU, IDEFICS). ``gate`` is one
    number or one per channel (``vector``). ``qk_norm`` norms queries and keys per head.
    """

    heads: int = 8
    head_width: int = 64
    activation: str = "gelu"
    mlp: Literal["plain", "gated"] = "plain"
    mlp_width: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    qk_norm: bool = False
    gate: Literal["scalar", "vector"] = "scalar"

    def __post_init__(self) -> None:
        for name in ("heads", "head_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"xattn.{name} is {getattr(self, name)}; it must be at least 1.")

    @classmethod
    def paper(cls, heads: int) -> "GatedConfig":
        """Heads of 128 and the squared ReLU (table 5 of 2204.14198)."""
        return cls(heads=heads, head_width=128, activation="squared_relu")

    @classmethod
    def open_flamingo(cls) -> "GatedConfig":
        """Always 8 heads of 64, GELU, whatever the language model's width."""
        return cls()

    @classmethod
    def idefics(
        cls,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float = 1e-6,
        qk_norm: bool = True,
        gate: Literal["scalar", "vector"] = "scalar",
        activation: str = "silu",
    ) -> "GatedConfig":
        """The language model's own heads, MLP width and activation (SwiGLU's, unless another is named), RMSNorm."""
        return cls(
            heads=heads,
            head_width=width // heads,
            activation=activation,
            mlp="gated",
            mlp_width=mlp_width,
            norm="rms",
            eps=eps,
            qk_norm=qk_norm,
            gate=gate,
        )


class GatedBlock(nn.Module):
    """One gated cross-attention and MLP, put before a frozen block. ``width`` is D, ``media_width`` d."""

    def __init__(self, width: int, media_width: int, config: GatedConfig) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm if config.norm == "layer" else nn.RMSNorm, eps=config.eps)
        hidden = config.mlp_width or 4 * width
        gate = (width,) if config.gate == "vector" else (1,)
        self.attn_norm = norm(width)
        self.attn = CrossAttention(
            width, media_width, config.heads, config.head_width, qk_norm=norm if config.qk_norm else None
        )
        self.attn_gate = nn.Parameter(torch.zeros(gate))
        self.mlp_norm = norm(width)
        self.mlp = (
            GatedMlp(width, hidden, config.activation)
            if config.mlp == "gated"
            else Mlp(width, hidden, config.activation, bias=False)
        )
        self.mlp_gate = nn.Parameter(torch.zeros(gate))

    def keys_values(
        self, media: Float[Tensor, "B N R d"]
    ) -> tuple[Float[Tensor, "B H N*R Dh"], Float[Tensor, "B H N*R Dh"]]:
        """Keys and values (B, H, N·R, head_width) of ``media`` (B, N, R, d); they serve all steps of a generation."""
        return self.attn.keys_values(media.flatten(1, 2))

    def forward(
        self,
        y: Float[Tensor, "B T D"],
        keys: Float[Tensor, "B H S Dh"],
        values: Float[Tensor, "B H S Dh"],
        mask: Bool[Tensor, "B T S"],
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D) -> (B, T, D). ``mask`` (B, T, N·R) is true where a token may attend.

        A token without a visual token to attend to gets exactly nothing from the attention; its MLP branch still runs.
        """
        somewhere = mask.any(-1, keepdim=True)
        # Kernels disagree about a row without any key, gradients too: it attends to every key instead and is
        # overwritten.
        attended = self.attn(self.attn_norm(y), keys, values, mask=(mask | ~somewhere)[:, None])
        attended = torch.where(somewhere, attended, 0.0)
        y = y + self.attn_gate.tanh() * attended
        return y + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(y))

    def weights(
        self, y: Float[Tensor, "B T D"], keys: Float[Tensor, "B H S Dh"], mask: Bool[Tensor, "B T S"]
    ) -> Float[Tensor, "B T S"]:
        """(B, T, N·R) attention to the visual tokens, mean over heads."""
        return self.attn.weights(self.attn_norm(y), keys, mask=mask[:, None]).mean(1)


def media_index(
    tags: Bool[Tensor, "B T"],
    *,
    mode: Media = "previous",
    counts: Sequence[int] | Tensor | None = None,
    base: Int[Tensor, " B"] | None = None,
    names: Sequence[str] = (),
) -> Int[Tensor, "B T"]:
    """(B, T) number from 1 of the visual input that each token may see, 0 for none (2204.14198, sec. 3.1.3).

    ``previous``: the last one at or before the token. ``next``: at a tag its own, elsewhere the one to come, if any.
    ``all``: like ``previous``, but the number stands for all images up to it.

    Args:
        tags: (B, T) bool, true on ``<image>`` tokens.
        counts: visual inputs of each row, those of ``base`` included; without it the tags are trusted.
        base: (B,) tags before this chunk, so that a row cut into chunks gets the same numbers as in one piece.
        names: the rows' sample ids, for messages.

    Raises DataError when a row has other than as many tags as visual inputs.
    """
    index = tags.long().cumsum(1)
    if base is not None:
        index = index + base[:, None].to(index)
    last = index[:, -1] if tags.shape[1] else (base if base is not None else index.new_zeros(len(tags)))
    if counts is not None:
        for row, (found, given) in enumerate(zip(last.tolist(), torch.as_tensor(counts).tolist(), strict=True)):
            if found != given:
                where = f"sample {names[row]!r}" if row < len(names) else f"row {row}"
                raise DataError(
                    f"{where}: the text has {found} <image> and the sample {given} visual inputs; give each image its "
                    "tag, and each tag its image"
                )
    if mode == "next":
        ahead = index + (~tags).long()
        return torch.where(ahead > last[:, None], 0, ahead)
    return index


def media_mask(
    index: Int[Tensor, "B T"], images: int, tokens: int, mode: Media = "previous"
) -> Bool[Tensor, "B T {images}*{tokens}"]:
    """(B, T, N·R) bool from ``index`` (B, T): true on the visual tokens that each text token may attend to."""
    numbers = torch.arange(1, images + 1, device=index.device)
    own = index[..., None] >= numbers if mode == "all" else index[..., None] == numbers
    return own.repeat_interleave(tokens, dim=-1)
