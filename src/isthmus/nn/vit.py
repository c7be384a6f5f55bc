"""The vision transformer: OpenAI CLIP's, SigLIP's and EVA's towers, chosen by configuration; and what an encoder of a
user's own gives in its place.

    pixels (n, 3, H, W) → patches (n, P, D) → [class token] + positions → [ln_pre] → blocks → pooled (n, D)

Legend: n pictures, P patches (row-major), D width. A tower hands out any of its L+1 hidden states, and computes no
block above the highest requested one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.config import WHERE_SET, check_options
from isthmus.errors import ConfigError
from isthmus.nn.attention import Attention
from isthmus.nn.block import Block, Mlp, init_attention, init_block
from isthmus.user_code import label, resolve

Interpolation = Literal["hf", "open_clip"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes and variant of a vision transformer; ``image_size`` and ``patch_size`` are in pixels.

    ``post_norm`` says what the last LayerNorm sees: the ``pooled`` vector (CLIP), ``all`` tokens (SigLIP) or nothing.
    ``pool`` is the class token (CLIP), an attention head with a learned query (SigLIP), or none.

    With ``kind``, ``path/file.py:Class``, the encoder is a :class:`VisionEncoder` of a user's own, made with this and
    with ``options`` by name. Of the other fields it has sizes: ``layers`` + 1 hidden states, each of one vector of
    ``width`` per patch of ``patch_size``, without a class token.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int = 0
    mlp_width: int = 0
    activation: str = "quick_gelu"
    eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: Literal["pooled", "all", "none"] = "pooled"
    pool: Literal["class", "attention", "none"] = "class"
    kind: str = field(default="", metadata={WHERE_SET: True})
    options: Mapping[str, object] = field(default_factory=dict, hash=False, metadata={WHERE_SET: True})

    def __post_init__(self) -> None:
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}.")
        if self.kind:
            object.__setattr__(self, "class_token", False)
            return
        if self.options:
            raise ConfigError("vision: options belong to an encoder of your own; name it as kind, path/file.py:Class.")
        for name in ("heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"vision: missing {name!r}, at least 1.")
        if self.pool == "class" and not self.class_token:
            raise ConfigError("pool 'class' needs class_token: true; take pool 'attention' or 'none'.")
        if self.post_norm == "pooled" and self.pool == "none":
            raise ConfigError("post_norm 'pooled' needs something pooled; with pool 'none' take post_norm 'none'.")

    @property
    def grid(self) -> int:
        """Patches along one side of a picture of ``image_size``."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches plus the class token if there is one: the rows of the position table."""
        return self.grid**2 + self.class_token

    @classmethod
    def vit_b_32(cls) -> "VisionConfig":
        return cls(image_size=224, patch_size=32, width=768, layers=12, heads=12, mlp_width=3072)

    @classmethod
    def vit_b_16(cls) -> "VisionConfig":
        return cls(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072)

    @classmethod
    def vit_l_14(cls) -> "VisionConfig":
        return cls(image_size=224, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)

    @classmethod
    def vit_l_14_336(cls) -> "VisionConfig":
        return cls(image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)

    @classmethod
    def eva_g_14(cls, layers: int = 39) -> "VisionConfig":
        """EVA-CLIP's ViT-g (Fang et al. 2022, 2211.07636) without its last block, as BLIP-2 reads it.

        Its keys have no bias; ours is kept and stays zero, which no softmax feels.
        """
        return cls(
            image_size=224,
            patch_size=14,
            width=1408,
            layers=layers,
            heads=16,
            mlp_width=6144,
            activation="gelu",
            eps=1e-6,
            pre_norm=False,
            patch_bias=True,
            post_norm="none",
            pool="none",
        )

    @classmethod
    def siglip_b_16(cls, image_size: int = 224) -> "VisionConfig":
        return cls.siglip(image_size=image_size, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072)

    @classmethod
    def siglip_so400m_14(cls, image_size: int = 384) -> "VisionConfig":
        return cls.siglip(image_size=image_size, patch_size=14, width=1152, layers=27, heads=16, mlp_width=4304)

    @classmethod
    def siglip(
        cls,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        activation: str = "gelu_tanh",
        eps: float = 1e-6,
        pool: Literal["attention", "none"] = "attention",
    ) -> "VisionConfig":
        """SigLIP's variant at any size: no class token, no first norm, attention pooling over normed tokens."""
        return cls(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_width=mlp_width,
            activation=activation,
            eps=eps,
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            post_norm="all",
            pool=pool,
        )


@dataclass(frozen=True, slots=True)
class VisionOutput:
    """``pooled`` (n, D) or none; ``layers``: the requested hidden states, in that order, each (n, P or 1+P, D)."""

    pooled: Float[Tensor, "n D"] | None
    layers: tuple[Float[Tensor, "n P D"], ...] = ()


class PatchEmbedding(nn.Conv2d):
    """The convolution over patches that do not overlap, as the one matrix product it is: quicker on a CPU."""

    def forward(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n P D"]:
        """(n, 3, H, W) -> (n, P, D); what is left over at the right and lower edges is not read."""
        side = self.kernel_size[0]
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        cut = pixels[..., : rows * side, : columns * side].unflatten(-1, (columns, side)).unflatten(2, (rows, side))
        # (n, 3, rows, side, columns, side) -> (n, rows · columns, 3 · side · side), as the weight's numbers lie.
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class AttentionPool(nn.Module):
    """SigLIP's pooling head: y = MHA(probe, tokens, tokens), then y + MLP(LN(y))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.width))
        self.attn = Attention(config.width, config.heads)
        self.ln = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)

    def forward(self, tokens: Float[Tensor, "n P D"]) -> Float[Tensor, "n D"]:
        """(n, P, D) -> (n, D)."""
        y = self.attn(self.probe.expand(len(tokens), -1, -1), tokens)
        return (y + self.mlp(self.ln(y)))[:, 0]


class VisionEncoder(nn.Module):
    """What nets see of a vision encoder. One of a user's own derives from it and gives ``hidden_states``; sizes other
    than ``image_size`` are its own affair."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config

    def hidden_states(self, pixels: Float[Tensor, "n 3 height width"]) -> Sequence[Tensor]:
        """(n, 3, H, W) -> ``config.layers`` + 1 hidden states (n, P, D), the patches row by row: the first is what
        enters the first layer, the last is what the last one gives."""
        raise NotImplementedError(f"{type(self).__name__} gives no hidden_states.")

    def pooled(self, last: Float[Tensor, "n P D"]) -> Float[Tensor, "n D"]:
        """(n, P, D), the last hidden state -> (n, D): one vector per picture."""
        return last.mean(1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that many pixels; what is left over at the edges is not read."""
        return height // self.config.patch_size, width // self.config.patch_size

    def forward(
        self,
        pixels: Float[Tensor, "n 3 height width"],
        *,
        layers: Sequence[int] = (),
        interpolate: Interpolation | None = None,
        pooled: bool = True,
    ) -> VisionOutput:
        """Encode ``pixels`` (n, 3, H, W). ``layers`` are indices into the hidden states. Raises ConfigError for a layer
        that is not there, and for hidden states that are not as the configuration says."""
        del interpolate
        states = self.hidden_states(pixels)
        due = (len(pixels), math.prod(self.grid(*pixels.shape[-2:])), self.config.width)
        if len(states) != self.config.layers + 1 or any(tuple(state.shape) != due for state in states):
            raise ConfigError(
                f"{type(self).__name__} gave the hidden states {[tuple(state.shape) for state in states]}; by the "
                f"configuration there are layers + 1 = {self.config.layers + 1}, each {due}: pictures, patches of "
                f"{self.config.patch_size} pixels a side without a class token, width."
            )
        return VisionOutput(self.pooled(states[-1]) if pooled else None, tuple(states[self._layer(n)] for n in layers))

    def _layer(self, index: int) -> int:
        count = self.config.layers + 1
        if not -count <= index < count:
            raise ConfigError(
                f"layer {index} does not exist: this tower has {count} hidden states, 0 to {count - 1} "
                f"or -{count} to -1."
            )
        return index % count


def build_vision(config: VisionConfig) -> VisionEncoder:
    """The encoder of a configuration. Raises ConfigError for a user's class that is none, and for wrong options."""
    if not config.kind:
        return VisionTransformer(config)
    cls, name = resolve(config.kind), label(config.kind)
    if not (isinstance(cls, type) and issubclass(cls, VisionEncoder)):
        raise ConfigError(f"vision {name!r} must be a class that derives from isthmus.nn.vit.VisionEncoder.")
    check_options(cls, config.options, f"vision {name}", given=1)
    return cast("Callable[..., VisionEncoder]", cls)(config, **config.options)


class VisionTransformer(VisionEncoder):
    """Dosovitskiy et al. 2021 with CLIP's changes (Radford et al. 2021, sec. 2.4) or SigLIP's (Zhai et al. 2023)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.patch_embed = PatchEmbedding(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.positions = nn.Parameter(torch.empty(config.tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, config.activation, config.eps) for _ in range(config.layers)
        )
        self.ln_post = nn.Identity() if config.post_norm == "none" else nn.LayerNorm(width, eps=config.eps)
        self.pool = AttentionPool(config) if config.pool == "attention" else None
        self._init_weights()

    def _init_weights(self) -> None:
        """OpenAI's scheme with this tower's width and depth; the patch convolution keeps PyTorch's start."""
        scale = self.config.width**-0.5
        nn.init.normal_(self.positions, std=scale)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=scale)
        for block in self.blocks:
            assert isinstance(block, Block)
            init_block(block, self.config.layers)
        if self.pool is not None:
            nn.init.normal_(self.pool.probe, std=scale)
            init_attention(self.pool.attn, scale, scale)

    def forward(
        self,
        pixels: Float[Tensor, "n 3 height width"],
        *,
        layers: Sequence[int] = (),
        interpolate: Interpolation | None = None,
        pooled: bool = True,
    ) -> VisionOutput:
        """Encode ``pixels`` (n, 3, H, W), normalised as the tower was trained.

        ``layers`` are indices into the L+1 hidden states: 0 is what enters the first block, -1 the last block's raw
        output (no post-norm). ``interpolate`` allows other sizes than ``image_size`` by resizing the position table
        one of the two published ways (:func:`resize_positions`). Raises ConfigError for a wrong size or layer.
        """
        depth = self.config.layers
        wanted = [self._layer(index) for index in layers]
        pooled = pooled and self.config.pool != "none"
        highest = depth if pooled else max(wanted, default=0)

        x = self._embed(pixels, interpolate)
        kept = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks[:highest], start=1):
            # Of the last block's output a pooling at the first token reads no other.
            alone = pooled and number == depth and self.pool is None and number not in wanted
            x = block(x, read=torch.zeros(len(x), dtype=torch.long, device=x.device) if alone else None)
            if number in wanted:
                kept[number] = x
        return VisionOutput(self.pooled(x) if pooled else None, tuple(kept[number] for number in wanted))

    def _embed(self, pixels: Tensor, interpolate: Interpolation | None) -> Tensor:
        """(n, 3, H, W) -> hidden state 0."""
        table = self._positions(pixels.shape[-2], pixels.shape[-1], interpolate)
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + table)

    def _positions(self, height: int, width: int, interpolate: Interpolation | None) -> Tensor:
        side, patch = self.config.image_size, self.config.patch_size
        if (height, width) == (side, side):
            return self.positions
        if interpolate is None:
            raise ConfigError(
                f"the vision encoder was made for {side}x{side} pixels and was given {height}x{width}; "
                "resize the pictures, or set interpolate='hf' or 'open_clip'."
            )
        if min(height, width) < patch:
            raise ConfigError(f"a picture of {height}x{width} pixels is smaller than one {patch}x{patch} patch.")
        own = self.config.grid
        return resize_positions(
            self.positions, (own, own), self.grid(height, width), how=interpolate, class_token=self.config.class_token
        )

    def hidden_states(self, pixels: Float[Tensor, "n 3 height width"]) -> Sequence[Tensor]:
        """All L+1 of them."""
        return self(pixels, layers=range(self.config.layers + 1), pooled=False).layers

    def pooled(self, last: Float[Tensor, "n P D"]) -> Float[Tensor, "n D"]:
        """By the configuration's ``pool`` and ``post_norm``."""
        x = last
        if self.config.post_norm == "all":
            x = self.ln_post(x)
        x = self.pool(x) if self.pool is not None else x[:, 0]
        return self.ln_post(x) if self.config.post_norm == "pooled" else x


def resize_positions(
    table: Float[Tensor, "_ D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    how: Interpolation,
    class_token: bool,
) -> Float[Tensor, "_ D"]:
    """A position table (1+P or P, D) for another grid, by bicubic interpolation; the class token's row stays.

    ``hf``: plain bicubic, as transformers does at call time. ``open_clip``: antialiased bicubic, as open_clip does
    when it loads a checkpoint. They differ whenever the grids do. Raises ConfigError when table and grid disagree.
    """
    if how not in ("hf", "open_clip"):
        raise ConfigError(f"unknown interpolation {how!r}; known: hf, open_clip.")
    extra = int(class_token)
    if len(table) != math.prod(old_grid) + extra:
        raise ConfigError(
            f"a position table of {len(table)} rows does not fit a grid of {old_grid[0]}x{old_grid[1]} "
            f"patches and {extra} class token(s)."
        )
    if old_grid == new_grid:
        return table
    patches = table[extra:].unflatten(0, old_grid).permute(2, 0, 1)[None]
    resized = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=how == "open_clip")
    return torch.cat([table[:extra], resized[0].permute(1, 2, 0).flatten(0, 1)])
