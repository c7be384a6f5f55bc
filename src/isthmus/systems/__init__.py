"""The systems: all facts of a kind of model beside its net, one file each, imported on first use.

A user's own system is a class of the same base, :class:`isthmus.systems.base.System`, in a file of theirs, and goes by
that file's pinned name (:mod:`isthmus.user_code`).
"""

from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from isthmus.errors import ConfigError, nearest
from isthmus.user_code import is_user_code, label, resolve

if TYPE_CHECKING:
    from isthmus.net import Net
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
"""Name -> where its facts are."""


@cache
def system(name: str) -> "System[Net]":
    """The facts of a kind of model, by a name of SYSTEMS or a pinned name of a user's class.

    Raises ConfigError for an unknown name, and for a class that is no system or leaves out what has no default.
    """
    if is_user_code(name):
        return _of_user(name)
    if name not in SYSTEMS:
        raise ConfigError(
            f"unknown kind of model {name!r}; {nearest(name, SYSTEMS)} A system of your own is named "
            "path/file.py:MySystem."
        )
    module, _, cls = SYSTEMS[name].partition(":")
    return getattr(import_module(module), cls)()


def _of_user(name: str) -> "System[Net]":
    from isthmus.net import Net
    from isthmus.systems.base import System

    found = resolve(name)
    if not isinstance(found, type) or not issubclass(found, System):
        raise ConfigError(f"{label(name)} is no system: it must be a class of isthmus.systems.base.System.")
    for needed in ("kind", "net"):
        if needed not in dir(found):
            raise ConfigError(f"{label(name)} does not say its {needed!r}; see examples/my_system.py.")
    if not (isinstance(found.net, type) and issubclass(found.net, Net)):
        raise ConfigError(f"{label(name)}: its net must be a class of isthmus.net.Net, and is {found.net!r}.")
    if "CONFIG" not in dir(found.net) or not is_dataclass(found.net.CONFIG):
        raise ConfigError(
            f"{label(name)}: its net {found.net.__name__} must say its CONFIG, a frozen dataclass with the options of "
            "a recipe's `config`; see examples/my_system.py."
        )
    if found.kind in SYSTEMS:
        raise ConfigError(f"{label(name)} is called {found.kind!r} like one of isthmus's own; give it another `kind`.")
    return found(name)
