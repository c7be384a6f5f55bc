"""Frozen configurations from plain mappings, strictly: an unknown key, a missing one or a wrong type is an error.

Every configuration of the project is a frozen, keyword-only dataclass. :func:`strict` builds one from what JSON or
YAML gives (dicts, lists, numbers, strings), :func:`plain` turns one back.
"""

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from isthmus.errors import ConfigError, nearest

T = TypeVar("T")


def strict(cls: type[T], mapping: Any, where: str) -> T:
    """``cls(**mapping)`` with nested dataclasses built, types checked and unknown keys refused.

    ``where`` names the place for the reader of an error, e.g. ``"model.vision"``. An integer is accepted where a
    float is expected, a list where a tuple is. Raises ConfigError.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected keys and values, found {_show(mapping)}.")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - set(mapping))
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(map(repr, missing))}.")
    return cls(**{key: fit(hints[key], value, f"{where}.{key}") for key, value in mapping.items()})


def plain(value: Any) -> Any:
    """A configuration (or any nest of dataclasses, mappings and sequences) as what JSON can hold."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def fit(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` wants it, or a ConfigError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: unknown value {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return strict(hint, value, where)
    if origin is tuple:
        return _fit_tuple(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _fit_mapping(hint, arguments, value, where)
    if origin is not None and issubclass(origin, Sequence):
        return (
            origin(_fit_tuple((arguments[0], ...), value, where))
            if origin is list
            else _fit_tuple((arguments[0], ...), value, where)
        )
    return _fit_scalar(hint, value, where)


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    where: str,
    *,
    given: Collection[str] | int = (),
    also: Collection[str] = (),
) -> None:
    """Do the ``options`` of a description fit what a function or class takes by name?

    ``given`` are parameters that the caller fills (names, or how many from the front), ``also`` names that are known
    besides. Raises ConfigError for an unknown option (the nearest is named), one that is missing, or one of a wrong
    type; parameters without an annotation take anything, and a function with ``**`` checks its own.
    """
    target = function.__init__ if isinstance(function, type) else function
    every = inspect.signature(function).parameters
    filled = list(every)[:given] if isinstance(given, int) else given
    parameters = {n: p for n, p in every.items() if n not in filled and p.kind is not p.VAR_POSITIONAL}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise ConfigError(f"{where}: unknown option {option!r}; {nearest(str(option), (*parameters, *also))}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{where} needs the option {name!r}")
    hints = get_type_hints(target)
    for name, value in options.items():
        if name in hints:
            fit(hints[name], value, f"{where}: {name}")


def _fit_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    real = [c for c in choices if c is not type(None)]
    if len(real) == 1:
        return fit(real[0], value, where)
    reasons = []
    for choice in real:
        try:
            return fit(choice, value, where)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(f"{where}: {_show(value)} fits none of the allowed forms: " + " | ".join(reasons))


def _fit_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, found {_show(value)}.")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{where}: expected {len(arguments)} values, found {len(value)}.")
    return tuple(fit(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))


def _fit_mapping(hint: Any, arguments: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected keys and values, found {_show(value)}.")
    return {key: fit(arguments[1], item, f"{where}.{key}") for key, item in value.items()}


def _fit_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {_show(value)}.")
    return value


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` laid on top, mappings merged all the way down."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        out[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out
