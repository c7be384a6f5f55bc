"""Connectors: the isthmus between a vision encoder and a language model.

Legend: N visuals, F frames, P patches, D width of the features, R visual tokens per visual, D_out width handed on.
"""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from isthmus.errors import ConfigError, nearest
from isthmus.nn.connectors.projector import Projector


@runtime_checkable
class Connector(Protocol):
    """What a connector must answer; any ``nn.Module`` with these two methods is one."""

    def forward(
        self, features: Tensor, mask: Tensor | None = None, times: Tensor | None = None, text: Any = None
    ) -> Tensor:
        """(N, F, P, D) features -> (N, R, D_out). ``mask`` (N, F, P) is true on real patches, ``times`` (N, F) are
        the frames' positions in seconds, ``text`` is for connectors that read a question."""
        ...

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """R for a visual of that many frames, each with ``grid`` rows and columns of patches."""
        ...


CONNECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": partial(Projector, depth=1),
    "mlp2x_gelu": partial(Projector, depth=2),
}
"""Name -> maker (feature width, width handed on). ``mlpNx_gelu`` with another N works as well."""


def build_connector(name: str, vision_width: int, out_width: int) -> Any:
    """The connector called ``name``: one of CONNECTORS, ``mlpNx_gelu``, or ``my_file:MyConnector``.

    The last is class ``MyConnector`` of ``my_file.py`` in the current folder, made with (vision_width, out_width).
    Raises ConfigError for an unknown name, a missing file or class, and a class that is no connector.
    """
    if ":" in name:
        made = _from_file(name)(vision_width, out_width)
        if not isinstance(made, nn.Module) or not isinstance(made, Connector):
            raise ConfigError(
                f"connector {name!r} must be an nn.Module with forward(features, ...) and num_tokens(frames, grid)."
            )
        return made
    deeper = re.fullmatch(r"mlp([1-9]\d?)x_gelu", name)
    if deeper:
        return Projector(vision_width, out_width, depth=int(deeper[1]))
    if name not in CONNECTORS:
        raise ConfigError(
            f"unknown connector {name!r}; {nearest(name, CONNECTORS)} A class of your own is named my_file:MyConnector."
        )
    return CONNECTORS[name](vision_width, out_width)


def _from_file(name: str) -> Callable[[int, int], Any]:
    """The class behind ``my_file:MyConnector``. Only plain names: a configuration cannot point elsewhere."""
    stem, _, cls = name.partition(":")
    file = Path(f"{stem}.py")
    if not stem.isidentifier() or not cls.isidentifier():
        raise ConfigError(f"connector {name!r}: write my_file:MyConnector, with my_file.py in the current folder.")
    if not file.is_file():
        raise ConfigError(f"connector {name!r}: there is no {file} in the current folder {Path.cwd()}.")
    spec = importlib.util.spec_from_file_location(stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, cls):
        raise ConfigError(
            f"connector {name!r}: {file} has no class {cls}; "
            f"{nearest(cls, [n for n in vars(module) if not n.startswith('_')])}"
        )
    return getattr(module, cls)
