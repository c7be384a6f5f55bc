"""The systems: all facts of a kind of model beside its net, one file each, imported only when asked for.

A user's own system is a class of the same base, :class:`isthmus.systems.base.System`, in a file of theirs.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from isthmus.errors import ConfigError, nearest

if TYPE_CHECKING:
    from isthmus.systems.base import System

SYSTEMS = {
    "clip": "isthmus.systems.clip:ClipSystem",
    "lm": "isthmus.systems.lm:LmSystem",
    "flamingo": "isthmus.systems.flamingo:FlamingoSystem",
    "blip2": "isthmus.systems.blip2:Blip2System",
    "llava": "isthmus.systems.llava:LlavaSystem",
    "image_encoder": "isthmus.systems.towers:ImageEncoderSystem",
    "text_encoder": "isthmus.systems.towers:TextEncoderSystem",
}
"""Kind -> where its facts are."""


@cache
def system(kind: str) -> "System":
    """The facts of a kind of model. Raises ConfigError for an unknown one."""
    if kind not in SYSTEMS:
        raise ConfigError(f"unknown kind of model {kind!r}; {nearest(kind, SYSTEMS)}")
    module, _, name = SYSTEMS[kind].partition(":")
    return getattr(import_module(module), name)()
