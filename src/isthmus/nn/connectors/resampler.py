"""Perceiver resampler: any number of patches and frames to a fixed number of visual tokens (2204.14198, sec. 3.1.1).

    features (N, F, P, D) + time_f ─ flatten ─→ f (N, F·P, D)
    latents (R, D) ─→ [ x + Attn(LN(x) ; LN(f) ‖ LN(x)) ─→ x + MLP(LN(x)) ] × layers ─→ [LN] ─→ (N, R, D)

Legend: N visuals, F frames, P patches, D width of the features, R latents, and so visual tokens per visual. The
features are never updated; every layer norms them anew. Only the vision encoder's features hold a patch's position.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.errors import ConfigError
from isthmus.nn.attention import CrossAttention
from isthmus.nn.block import Mlp
from isthmus.nn.connectors.base import Connector


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Sizes and variant. ``frames`` is the length of the table of time embeddings (0: none, so pictures only).

    ``align`` says how that table is stretched to longer clips: ``ends`` keeps first and last row where they are,
    ``cells`` keeps the rows' cells (the paper interpolates from 8 to 30 frames and leaves this open). The MLP is 4
    times as wide as the features.
    """

    layers: int = 6
    latents: int = 64
    heads: int = 8
    head_width: int = 64
    activation: str = "gelu"
    final_norm: bool = True
    qk_norm: bool = False
    frames: int = 0
    align: Literal["ends", "cells"] = "ends"

    def __post_init__(self) -> None:
        for name in ("layers", "latents", "heads", "head_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"resampler.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.frames < 0:
            raise ConfigError(f"resampler.frames is {self.frames}; give 0 (pictures only) or the frames of a clip.")

    @classmethod
    def paper(cls) -> "ResamplerConfig":
        """Table 5 and the pseudo-code of appendix A.1.1: 16 heads of 96, squared ReLU, 8 frames, no final norm."""
        return cls(heads=16, head_width=96, activation="squared_relu", final_norm=False, frames=8)

    @classmethod
    def open_flamingo(cls) -> "ResamplerConfig":
        """OpenFlamingo (2308.01390): 8 heads of 64, GELU, a final norm, no time embeddings."""
        return cls()

    @classmethod
    def idefics(cls, *, qk_norm: bool = False) -> "ResamplerConfig":
        """IDEFICS as in transformers: 16 heads of 96, ReLU, a final norm, queries and keys perhaps normed."""
        return cls(heads=16, head_width=96, activation="relu", qk_norm=qk_norm)


class ResamplerLayer(nn.Module):
    """Latents attend to features and to themselves, then an MLP: both pre-norm with a residual."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.media_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.attn = CrossAttention(
            width, width, config.heads, config.head_width, qk_norm=nn.LayerNorm if config.qk_norm else None
        )
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, config.activation, bias=False)

    def forward(self, x: Float[Tensor, "N R D"], features: Float[Tensor, "N S D"]) -> Float[Tensor, "N R D"]:
        """(N, R, D) from latents ``x`` and ``features`` (N, S, D)."""
        queries, context = self._inputs(x, features)
        x = x + self.attn(queries, *self.attn.keys_values(context))
        return x + self.mlp(self.mlp_norm(x))

    def weights(self, x: Float[Tensor, "N R D"], features: Float[Tensor, "N S D"]) -> Float[Tensor, "N R S"]:
        """(N, R, S): how much each latent attends to each feature, mean over heads, each row a distribution."""
        queries, context = self._inputs(x, features)
        keys, _ = self.attn.keys_values(context)
        weights = self.attn.weights(queries, keys).mean(1)[:, :, : features.shape[1]]
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)

    def _inputs(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.latent_norm(x)
        return queries, torch.cat([self.media_norm(features), queries], dim=1)


class Resampler(Connector):
    """The connector of Flamingo, whose tokens are as wide as the features.

    Latents start from N(0, 1), time embeddings from N(0, 1) as in OpenFlamingo's."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.times = nn.Parameter(torch.randn(config.frames, width)) if config.frames else None
        self.layers = nn.ModuleList(ResamplerLayer(width, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width) if config.final_norm else nn.Identity()

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D"]:
        """(N, F, P, D) -> (N, R, D). Frames are taken as equally spaced.

        Raises ConfigError for a clip of several frames without time embeddings, and for no frame at all.
        """
        x, features = self._start(features)
        for layer in self.layers:
            x = layer(x, features)
        return self.norm(x)

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        """(N, R, F, P): which patches each visual token was made of, by the last layer's attention."""
        frames, patches = features.shape[1:3]
        x, features = self._start(features)
        *first, last = self.layers
        for layer in first:
            x = layer(x, features)
        assert isinstance(last, ResamplerLayer)
        return last.weights(x, features).unflatten(-1, (frames, patches))

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """R, whatever the clip's length and the picture's size."""
        return self.config.latents

    def _start(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (N, R, D), features with their time (N, F·P, D)."""
        count, frames = features.shape[:2]
        if frames < 1:
            raise ConfigError("a clip of 0 frames has nothing to attend to; give at least one frame.")
        if self.times is not None:
            features = features + stretch(self.times, frames, self.config.align)[:, None].to(features.dtype)
        elif frames > 1:
            raise ConfigError(
                f"a clip of {frames} frames needs time embeddings, and this resampler has none: without them the order "
                "of frames is invisible. Set resampler.frames to the frames of a training clip."
            )
        return self.latents.expand(count, -1, -1), features.flatten(1, 2)


class ResamplerConnector(Connector):
    """A resampler whose tokens are projected to the language model's width, to be spliced (as Idefics2 does,
    2405.02246, sec. 3.2)."""

    def __init__(self, vision_width: int, out_width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.resampler = Resampler(vision_width, config)
        self.projection = nn.Linear(vision_width, out_width)

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) -> (N, R, D_out)."""
        return self.projection(self.resampler(features))

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        return self.resampler.num_tokens(frames, grid)

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        return self.resampler.patch_weights(features)


def stretch(
    table: Float[Tensor, "rows D"], frames: int, align: Literal["ends", "cells"]
) -> Float[Tensor, "{frames} D"]:
    """A table of time embeddings (rows, D) for ``frames`` frames, (frames, D).

    Up to ``rows`` frames each takes the row of its number (a picture is frame 0); a longer clip gets the table
    interpolated linearly over its length (2204.14198, appendix A.1.1).
    """
    rows = len(table)
    if frames <= rows:
        return table[:frames]
    if rows == 1:
        return table.expand(frames, -1)
    stretched = F.interpolate(table.T[None], size=frames, mode="linear", align_corners=align == "ends")
    return stretched[0].T
