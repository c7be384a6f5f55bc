"""The systems, one file per paper. A class is imported only when it is asked for by its kind."""

from importlib import import_module
from typing import Any

from isthmus.errors import ConfigError, nearest

MODELS = {
    "blip2": "isthmus.models.blip2:Blip2",
    "clip": "isthmus.models.clip:Clip",
    "lm": "isthmus.models.lm:BareLM",
    "llava": "isthmus.models.llava:Llava",
    "flamingo": "isthmus.models.flamingo:Flamingo",
    "image_encoder": "isthmus.models.towers:ImageEncoder",
    "text_encoder": "isthmus.models.towers:TextEncoder",
}
"""Kind -> where its class is."""


def model_class(kind: str) -> Any:
    """The class of a kind. Raises ConfigError for an unknown one."""
    if kind not in MODELS:
        raise ConfigError(f"unknown kind of model {kind!r}; {nearest(kind, MODELS)}")
    module, _, name = MODELS[kind].partition(":")
    return getattr(import_module(module), name)
