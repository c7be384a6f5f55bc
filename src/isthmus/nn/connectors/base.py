"""What every connector is. Legend: N visuals, F frames, P patches, D width of the features, R visual tokens."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.errors import CapabilityError, ConfigError


@runtime_checkable
class CountsTokens(Protocol):
    """What a connector says beside being a module."""

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int: ...


if TYPE_CHECKING:

    class AnyConnector(nn.Module, CountsTokens):
        """A connector, whether it derives from :class:`Connector` or is a user's module that counts its tokens."""


class Connector(nn.Module, ABC):
    """Base of connectors. A user's may be any ``nn.Module`` with ``forward(features)`` and ``num_tokens(frames,
    grid)``; who derives from this one gets what is common, and can say which patches a token was made of."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) features -> (N, R, D_out). ``text``, one row per visual, is for connectors that read a
        question; those of LLaVA are called with features alone."""

    @abstractmethod
    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """R for a visual of that many frames, each with ``grid`` rows and columns of patches."""

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        """(N, R, F, P): which patches each visual token was made of, every row a distribution.

        Raises CapabilityError where that is unknown.
        """
        raise CapabilityError(
            f"The connector {type(self).__name__} does not say which patches its tokens are made of (patch_weights), "
            "so there is no attention map."
        )


def side_of(patches: int, factor: int, who: str) -> int:
    """Patches along the side of a square map of ``patches``. Raises ConfigError unless ``factor`` divides it."""
    side = math.isqrt(patches)
    if side * side != patches or side % factor:
        raise ConfigError(
            f"{who} takes a square map of patches whose side is a multiple of {factor}, and here are {patches} "
            "patches; choose another picture or patch size, or another factor."
        )
    return side


def by_frame(weights: Float[Tensor, "N F R P"]) -> Float[Tensor, "N F*R F P"]:
    """(N, F, R, P) weights of tokens made of their own frame alone -> (N, F·R, F, P), zeros for the other frames."""
    frames = weights.shape[1]
    out = weights.new_zeros(len(weights), frames, weights.shape[2], frames, weights.shape[3])
    for frame in range(frames):
        out[:, frame, :, frame] = weights[:, frame]
    return out.flatten(1, 2)
