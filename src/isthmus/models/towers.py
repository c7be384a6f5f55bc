"""One tower of a CLIP or SigLIP alone (2103.00020, 2303.15343), as transformers publishes them.

    pixels (n, 3, H, W) → vision → (n, Dv) ─ projection ─→ (n, E)
    ids    (B, T)       → text   → (B, Dt) ─ projection ─→ (B, E)

Legend: n pictures, B texts, T tokens, Dv and Dt widths of the towers, E width of the space both were trained for.

A file without a projection gives the vectors before it. SigLIP's image tower has none and needs none: what its head
pools lies in the common space.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.net import Net
from isthmus.nn.losses import Similarity
from isthmus.nn.text_tower import TextConfig, TextTower
from isthmus.nn.vit import Interpolation, VisionConfig, build_vision


@dataclass(frozen=True, kw_only=True)
class _TowerConfig:
    """``embed_dim`` is the width of the projection, where there is one."""

    embed_dim: int | None = None

    @property
    def similarity(self) -> Similarity:
        """How embeddings are compared: by the cosine."""
        return "cosine"


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(_TowerConfig):
    """A vision tower and its projection."""

    vision: VisionConfig


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(_TowerConfig):
    """A text tower and its projection; ``projection_bias`` is SigLIP's."""

    text: TextConfig
    projection_bias: bool = False


class ImageEncoder(Net):
    """A vision tower alone."""

    KIND = "image_encoder"
    CONFIG = ImageEncoderConfig
    config: ImageEncoderConfig

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.projection = _projection(config.vision.width, config.embed_dim, bias=False)

    def embed_images(
        self, pixels: Float[Tensor, "n 3 height width"], *, interpolate: Interpolation | None = None
    ) -> Float[Tensor, "n E"]:
        """(n, E), not normalised, from normalised ``pixels`` (n, 3, H, W)."""
        return self.projection(self.vision(pixels, interpolate=interpolate).pooled)


class TextEncoder(Net):
    """A text tower alone."""

    KIND = "text_encoder"
    CONFIG = TextEncoderConfig
    config: TextEncoderConfig

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(config.text)
        self.projection = _projection(config.text.width, config.embed_dim, bias=config.projection_bias)

    def embed_texts(self, tokens: Tokens) -> Float[Tensor, "B E"]:
        """(B, E), not normalised. Raises DataError for a row without end-of-text or longer than the context."""
        return self.projection(self.text(tokens.ids, tokens.lengths))


def _projection(width: int, space: int | None, *, bias: bool) -> nn.Module:
    return nn.Identity() if space is None else nn.Linear(width, space, bias=bias)
