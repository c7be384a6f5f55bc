"""Connectors: the isthmus between a vision encoder and a language model, all of them by name, with options.

    projector: mlp2x_gelu                                        a name alone
    projector: {kind: resampler, latents: 8, layers: 2}          with options
    projector: {kind: my_connector.py:MyConnector, width: 32}    a class of the user's, relative to the recipe

Legend: D width of the features, D_out width of the language model.
"""

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, cast

from torch import nn

from isthmus.config import check_options, strict
from isthmus.errors import ConfigError, nearest
from isthmus.nn.connectors.base import Connector, CountsTokens
from isthmus.nn.connectors.pooling import AttentionPool, AveragePool, PixelShuffle
from isthmus.nn.connectors.projector import Projector
from isthmus.nn.connectors.qformer import QFormerConfig, QFormerConnector
from isthmus.nn.connectors.resampler import ResamplerConfig, ResamplerConnector
from isthmus.user_code import is_user_code, label, resolve

if TYPE_CHECKING:
    from isthmus.nn.connectors.base import AnyConnector

__all__ = ["CONNECTORS", "Connector", "build_connector", "named_mlp"]


def _linear(vision_width: int, out_width: int) -> nn.Module:
    return Projector(vision_width, out_width, depth=1)


def _resampler(vision_width: int, out_width: int, **options: object) -> nn.Module:
    return ResamplerConnector(vision_width, out_width, strict(ResamplerConfig, options, "projector resampler"))


def _qformer(vision_width: int, out_width: int, **options: object) -> nn.Module:
    options = {"vision_width": vision_width, **options}
    return QFormerConnector(strict(QFormerConfig, options, "projector qformer"), out_width, text=False)


CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "mlp": Projector,
    "resampler": _resampler,
    "qformer": _qformer,
    "pixel_shuffle": PixelShuffle,
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
}
"""Name -> maker of (D, D_out) and options by name. ``mlpNx_gelu`` is ``mlp`` of that depth, as LLaVA's files say it."""


def named_mlp(projector: str | Mapping[str, object]) -> int | None:
    """Layers of a connector that is LLaVA's linear layer or MLP and is named as its files name it; None for others."""
    deeper = re.fullmatch(r"mlp([1-9]\d?)x_gelu", projector) if isinstance(projector, str) else None
    return 1 if projector == "linear" else int(deeper[1]) if deeper else None


def build_connector(projector: str | Mapping[str, object], vision_width: int, out_width: int) -> "AnyConnector":
    """The connector of a recipe's ``projector``: a name, or a mapping with ``kind`` and options.

    A class of a user's file goes by its pinned name (:mod:`isthmus.user_code`) and is made with (vision_width,
    out_width, options). Raises ConfigError for an unknown name or option, an option of a wrong type, and a class that
    is no connector.
    """
    options: dict[str, object] = {"kind": projector} if isinstance(projector, str) else dict(projector)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise ConfigError(f"projector: give the connector's name as kind; {nearest(str(kind), CONNECTORS)}")
    if is_user_code(kind):
        return _users(kind, vision_width, out_width, options)
    if (depth := named_mlp(kind)) is not None:
        kind, options = (
            "linear" if kind == "linear" else "mlp",
            options | ({} if kind == "linear" else {"depth": depth}),
        )
    if kind not in CONNECTORS:
        raise ConfigError(
            f"unknown connector {kind!r}; {nearest(kind, (*CONNECTORS, 'mlp2x_gelu'))} A class of your own is named "
            "my_file.py:MyConnector."
        )
    check_options(CONNECTORS[kind], options, f"projector {kind}", given=("vision_width", "out_width"))
    return cast("AnyConnector", CONNECTORS[kind](vision_width, out_width, **options))


def _users(kind: str, vision_width: int, out_width: int, options: Mapping[str, object]) -> "AnyConnector":
    cls = resolve(kind)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and issubclass(cls, CountsTokens)):
        raise ConfigError(
            f"connector {label(kind)!r} must be a class that derives from isthmus.nn.connectors.Connector, or an "
            "nn.Module with forward(features) and num_tokens(frames, grid)."
        )
    check_options(cls, options, f"projector {label(kind)}", given=2)
    try:
        signature(cls).bind(vision_width, out_width, **options)
    except TypeError as error:
        raise ConfigError(
            f"connector {label(kind)!r} is made with the width of the features, that of the language model, and its "
            f"options by name, {cls.__name__}(vision_width, out_width, ...), and does not take these: {error}."
        ) from None
    return cast("AnyConnector", cls(vision_width, out_width, **options))
