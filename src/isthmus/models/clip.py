"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al. 2021, 2103.00020),
and the sigmoid variant SigLIP (Zhai et al. 2023, 2303.15343).

    pixels (B, 3, H, W) → vision → (B, Dv) ─ vision_projection ─→ (B, E) ┐
                                                                          ├ scale · similarity (+ bias) → (B, B) → loss
    ids    (B, T)       → text   → (B, Dt) ─ text_projection ───→ (B, E) ┘

Legend: B pairs, T tokens, Dv and Dt widths of the towers, E width of the common space.

Differs from the paper: the image tower starts from the scheme that the paper's code uses for the text tower; two
rows that show the same picture are not each other's negatives; other similarities than the cosine are offered.
Differs from the SigLIP code: negatives of other processes are gathered instead of passed round a ring (equal value).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Batch, Term, Tokens
from isthmus.errors import ConfigError, DataError
from isthmus.net import Net
from isthmus.nn.losses import Similarity, info_nce, sigmoid_loss, similarity
from isthmus.nn.text_tower import TextConfig, TextTower
from isthmus.nn.vit import Interpolation, VisionConfig, build_vision
from isthmus.processes import sizes

WHAT = "contrastive training"


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Two towers, the common space of ``embed_dim``, and the loss.

    ``init_scale`` (a logarithm) and ``init_bias`` start the logits; left out, they are the published starts: ln(1/0.07)
    for softmax, ln 10 and -10 for sigmoid; for the unbounded similarities the scale starts at embed_dim^-½, which
    gives logits of the order of one. ``max_scale`` bounds the scale after each step, for the softmax loss only.
    """

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    loss: Literal["softmax", "sigmoid"] = "softmax"
    similarity: Similarity = "cosine"
    vision_projection: bool = True
    text_projection_bias: bool = False
    init_scale: float | None = None
    init_bias: float | None = None
    max_scale: float = 100.0

    def __post_init__(self) -> None:
        if self.vision.pool == "none":
            raise ConfigError("CLIP needs a pooled picture: take vision pool 'class' or 'attention'.")
        if not self.vision_projection and self.vision.width != self.embed_dim:
            raise ConfigError(
                f"without a vision projection embed_dim must be the tower's width {self.vision.width}, "
                f"not {self.embed_dim}."
            )
        if self.loss == "softmax" and self.init_bias is not None:
            raise ConfigError("init_bias belongs to the sigmoid loss; a softmax does not feel a bias.")
        if self.init_scale is None:
            published = math.log(1 / 0.07) if self.loss == "softmax" else math.log(10)
            start = published if self.similarity == "cosine" else -0.5 * math.log(self.embed_dim)
            object.__setattr__(self, "init_scale", start)
        if self.loss == "sigmoid" and self.init_bias is None:
            object.__setattr__(self, "init_bias", -10.0)

    @classmethod
    def vit_b_32(cls) -> "ClipConfig":
        return cls(vision=VisionConfig.vit_b_32(), text=TextConfig.clip(512, 12, 8), embed_dim=512)

    @classmethod
    def vit_b_16(cls) -> "ClipConfig":
        return cls(vision=VisionConfig.vit_b_16(), text=TextConfig.clip(512, 12, 8), embed_dim=512)

    @classmethod
    def vit_l_14(cls) -> "ClipConfig":
        return cls(vision=VisionConfig.vit_l_14(), text=TextConfig.clip(768, 12, 12), embed_dim=768)

    @classmethod
    def vit_l_14_336(cls) -> "ClipConfig":
        return cls(vision=VisionConfig.vit_l_14_336(), text=TextConfig.clip(768, 12, 12), embed_dim=768)

    @classmethod
    def siglip_b_16(cls, image_size: int = 224) -> "ClipConfig":
        return cls._siglip(VisionConfig.siglip_b_16(image_size), TextConfig.siglip(768, 12, 12, 3072))

    @classmethod
    def siglip_so400m_14(cls, image_size: int = 384) -> "ClipConfig":
        return cls._siglip(VisionConfig.siglip_so400m_14(image_size), TextConfig.siglip(1152, 27, 16, 4304))

    @classmethod
    def _siglip(cls, vision: VisionConfig, text: TextConfig) -> "ClipConfig":
        return cls(
            vision=vision,
            text=text,
            embed_dim=vision.width,
            loss="sigmoid",
            vision_projection=False,
            text_projection_bias=True,
        )

    @classmethod
    def tiny(cls, *, vocab_size: int = 2048, eot_id: int = 2, context: int = 64, image_size: int = 64) -> "ClipConfig":
        """Towers that learn the scenes on two CPU cores within minutes. A recipe's tokenizer brings its vocabulary."""
        vision = VisionConfig(image_size=image_size, patch_size=16, width=160, layers=5, heads=5, mlp_width=640)
        text = TextConfig(
            context=context, vocab_size=vocab_size, width=160, layers=3, heads=5, mlp_width=640, eot_id=eot_id
        )
        return cls(vision=vision, text=text, embed_dim=160)


class Heads(nn.Module):
    """What joins the towers: the projections into the common space, and the temperature (and bias) of the logits."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        vision, text, space = config.vision.width, config.text.width, config.embed_dim
        self.vision_projection = nn.Linear(vision, space, bias=False) if config.vision_projection else nn.Identity()
        self.text_projection = nn.Linear(text, space, bias=config.text_projection_bias)
        assert config.init_scale is not None
        self.logit_scale = nn.Parameter(torch.tensor(config.init_scale))
        self.logit_bias = None if config.init_bias is None else nn.Parameter(torch.tensor(config.init_bias))
        for layer in (self.vision_projection, self.text_projection):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


class Clip(Net):
    """Two towers and a loss that pulls a picture to its text. See the drawing above."""

    KIND = "clip"
    contrasts = True
    gradient_cache = True
    CONFIG = ClipConfig
    config: ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.text = TextTower(config.text)
        self.heads = Heads(config)

    def embed_images(
        self, pixels: Float[Tensor, "n 3 height width"], *, interpolate: Interpolation | None = None
    ) -> Float[Tensor, "n E"]:
        """(n, E), not normalised, from normalised ``pixels`` (n, 3, H, W); other sizes as the tower allows them."""
        return self.heads.vision_projection(self.vision(pixels, interpolate=interpolate).pooled)

    def embed_texts(self, tokens: Tokens) -> Float[Tensor, "B E"]:
        """(B, E), not normalised. Raises DataError for a row without end-of-text or longer than the context."""
        return self.heads.text_projection(self.text(tokens.ids, tokens.lengths))

    def logits(self, images: Float[Tensor, "n E"], texts: Float[Tensor, "B E"]) -> Float[Tensor, "n B"]:
        """(n, B) logits per image from embeddings (n, E) and (B, E)."""
        logits = self.heads.logit_scale.exp() * similarity(images, texts, self.config.similarity)
        return logits if self.heads.logit_bias is None else logits + self.heads.logit_bias

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The contrastive term of a batch with one picture per row, in which all other rows are negatives.

        Under several processes the rows of all of them are; the mean over processes is then the step's loss.
        """
        return self._terms(*self._embed(batch), _keys(batch))

    def cached_loss(self, batches: Sequence[Batch]) -> dict[str, Term]:
        """The loss of all ``batches`` together and its exact gradient, in the memory of one of them.

        The gradient cache (Gao et al. 2021, 2101.06983): embed every chunk without a graph; take the loss and its
        gradient with respect to the embeddings, temperature and bias; embed each chunk again and push its share of
        the gradient through the towers, which draw no random numbers. Adds to ``.grad``; the terms come detached.
        Of several processes each adds what its rows give: the sum over processes is the step's gradient.
        """
        with torch.no_grad():
            embedded = [self._embed(batch) for batch in batches]
        images, texts = (torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True))
        terms = self._terms(images, texts, [key for batch in batches for key in _keys(batch)])
        rows = sum(sizes(len(images), images.device))
        (terms["contrastive"].total / rows).backward()
        start = 0
        for batch in batches:
            own = slice(start, start + len(batch))
            start = own.stop
            for output, leaf in zip(self._embed(batch), (images, texts), strict=True):
                if output.requires_grad and leaf.grad is not None:  # a tower with everything frozen has no graph
                    output.backward(leaf.grad[own])
        return {name: Term(term.total.detach(), term.count, term.scope) for name, term in terms.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Hold the scale at ``max_scale`` or below (softmax only: published sigmoid weights lie above it)."""
        if self.config.loss == "softmax":
            self.heads.logit_scale.clamp_(max=math.log(self.config.max_scale))

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's (B, E) pictures in order of rows, and its (B, E) texts."""
        images = batch.per_row(lambda group: self.embed_images(_single_frames(group.pixels)).unbind(0), WHAT)
        return torch.stack(images), self.embed_texts(batch.text["text"])

    def _terms(self, images: Tensor, texts: Tensor, keys: Sequence[str]) -> dict[str, Term]:
        metric, scale, bias = self.config.similarity, self.heads.logit_scale, self.heads.logit_bias
        if bias is None:
            mean = info_nce(images, texts, scale, metric=metric, keys=keys)
        else:
            mean = sigmoid_loss(images, texts, scale, bias, metric=metric, keys=keys)
        return {"contrastive": Term(mean * len(images), len(images), scope="batch")}


def _keys(batch: Batch) -> list[str]:
    """Content keys in order of rows."""
    return [batch.keys[n] for n in batch.visual_of_rows(WHAT).tolist()]


def _single_frames(pixels: Tensor | None) -> Tensor:
    """(n, 1, 3, H, W) -> (n, 3, H, W)."""
    if pixels is None:
        raise DataError("contrastive training needs pictures, not cached features: the vision encoder is trained.")
    if pixels.shape[1] != 1:
        raise DataError(f"CLIP reads single pictures; a visual of {pixels.shape[1]} frames came.")
    return pixels.flatten(0, 1)
