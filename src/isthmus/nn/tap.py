"""Tap: the hidden states of a vision encoder that a connector reads, from pixels or from a feature cache.

    pixels (n, F, 3, H, W) ─ vision ─→ hidden states (L+1 of them) ─ those tapped, joined on channels ─→ (n, F, P, Dv)

Legend: n visuals of one shape, F frames, L blocks, P patches (one more with the class token), Dv width of the features.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.batch import Visuals
from isthmus.errors import ConfigError, DataError
from isthmus.nn.attention import frozen
from isthmus.nn.patch_positions import add_patch_positions
from isthmus.nn.vit import Interpolation, VisionConfig, VisionEncoder


@dataclass(frozen=True, kw_only=True)
class Tap:
    """What is read of the encoder ``vision``.

    ``layers`` count over its L+1 hidden states, -1 is the last block's raw output; several are joined on channels.
    ``class_token`` keeps it before the patches; ``patch_positions`` adds each patch's place; ``interpolate`` is how
    pictures of other sizes than the encoder's get its position table, none: they are refused.

    Raises ConfigError for a hidden state that the encoder does not have.
    """

    vision: VisionConfig
    layers: tuple[int, ...]
    class_token: bool = False
    patch_positions: bool = False
    interpolate: Interpolation | None = None

    def __post_init__(self) -> None:
        count = self.vision.layers + 1
        if not self.layers:
            raise ConfigError("feature_layer names no hidden state; give a number such as -2.")
        for layer in self.layers:
            if not -count <= layer < count:
                raise ConfigError(
                    f"feature_layer {layer} does not exist: a vision encoder of {self.vision.layers} blocks has "
                    f"{count} hidden states, 0 to {count - 1} or -{count} to -1."
                )
        if self.class_token and not self.vision.class_token:
            raise ConfigError("the feature layer is to hold the class token, and this vision encoder has none.")

    @property
    def width(self) -> int:
        """Dv"""
        return self.vision.width * len(self.layers)

    def tokens(self, grid: tuple[int, int]) -> int:
        """P for a picture of ``grid`` rows and columns of patches."""
        return grid[0] * grid[1] + self.class_token

    def features(
        self, encoder: VisionEncoder, pixels: Float[Tensor, "n F 3 height width"]
    ) -> Float[Tensor, "n F P Dv"]:
        """(n, F, 3, H, W) normalised pixels -> (n, F, P, Dv), what a feature cache holds.

        Without gradient unless a stage has opened a parameter of the encoder.
        """
        with nullcontext() if trains(encoder) else frozen():
            states = encoder(
                pixels.flatten(0, 1), layers=self.layers, interpolate=self.interpolate, pooled=False
            ).layers
        found = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        if self.patch_positions:
            found = add_patch_positions(found, encoder.grid(*pixels.shape[-2:]))
        if self.vision.class_token and not self.class_token:
            found = found[:, 1:]
        return found.unflatten(0, pixels.shape[:2])

    def read(self, encoder: VisionEncoder, group: Visuals) -> Float[Tensor, "n F P Dv"]:
        """(n, F, P, Dv) of a group that brings pixels or cached features. Raises DataError for cached features that
        are of another width, or while the encoder trains, which would change them at every step."""
        if group.pixels is not None:
            return self.features(encoder, group.pixels)
        if group.features is None:
            raise DataError("a group of visuals has neither pixels nor cached features.")
        if trains(encoder):
            raise DataError(
                "the stage trains the vision encoder, but the batch brings cached features; turn the feature cache off "
                "or freeze vision.*."
            )
        if group.features.shape[-1] != self.width:
            raise DataError(
                f"cached features are {group.features.shape[-1]} wide, the connector reads {self.width}; the cache was "
                "made for another encoder or feature_layer."
            )
        return group.features

    def unreachable(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of a net's parameters that nothing tapped depends on: the encoder above, and where no block has mixed
        it into the patches a class token that is not kept. Of an encoder of a user's own that is not known."""
        if self.vision.kind:
            return ()
        depth = self.vision.layers
        highest = max(layer % (depth + 1) for layer in self.layers)
        dead = [f"vision.blocks.{n}." for n in range(highest, depth)] + ["vision.ln_post.", "vision.pool."]
        if highest == 0 and not self.class_token:
            dead.append("vision.class_token")
        return tuple(name for name in names if name.startswith(tuple(dead)))


def trains(part: torch.nn.Module) -> bool:
    """Has a stage opened a parameter of it?"""
    return any(parameter.requires_grad for parameter in part.parameters())
