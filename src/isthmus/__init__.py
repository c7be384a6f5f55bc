"""isthmus: CLIP, Flamingo, BLIP-2 and LLaVA in one library.

``isthmus.load(x)`` opens a model folder; everything else hangs on what it returns. Names are imported on first use,
so ``import isthmus`` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isthmus.version import __version__

if TYPE_CHECKING:
    from isthmus.data.record import Image, Record, Text
    from isthmus.errors import IsthmusError
    from isthmus.model import Model
    from isthmus.opening import load
    from isthmus.recipes.run import train

__all__ = ["Image", "IsthmusError", "Model", "Record", "Text", "__version__", "load", "train"]

_HOMES = {
    "load": "isthmus.opening",
    "Model": "isthmus.model",
    "train": "isthmus.recipes.run",
    "Record": "isthmus.data.record",
    "Text": "isthmus.data.record",
    "Image": "isthmus.data.record",
    "IsthmusError": "isthmus.errors",
}


def __getattr__(name: str) -> Any:  # to a type checker a submodule too, which Python finds by itself
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
