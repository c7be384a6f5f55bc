"""Frozen configurations from plain mappings, strictly: an unknown key, a missing one or a wrong type is an error.

Every configuration of the project is a frozen, keyword-only dataclass. :func:`strict` builds one from what JSON or
YAML gives (dicts, lists, numbers, strings), :func:`plain` turns one back. Types are checked by pydantic in its strict
mode for JSON; what does not fit is said in this module's words, with the path of the key.
"""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from pydantic import ConfigDict, TypeAdapter, ValidationError

from isthmus.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic_core import ErrorDetails

T = TypeVar("T")

WHERE_SET = "where set"
"""In a field's metadata: :func:`plain` leaves the field out while it is empty, so that folders and hashes of what does
not use it stay as they are."""


def strict(cls: type[T], mapping: object, where: str) -> T:
    """``cls(**mapping)`` with nested dataclasses built, types checked and unknown keys refused.

    ``where`` names the place for the reader of an error, e.g. ``"model.vision"``. An integer is accepted where a
    float is expected, a list where a tuple is. Raises ConfigError.
    """
    return mapping if isinstance(mapping, cls) else fit(cls, mapping, where)


def plain(value: "DataclassInstance | Mapping[str, object]") -> dict[str, object]:
    """A configuration, or any nest of dataclasses, mappings and sequences, as what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    shown = [f for f in fields(value) if f.init and not (WHERE_SET in f.metadata and not getattr(value, f.name))]
    return {f.name: _plain(getattr(value, f.name)) for f in shown}


def _plain(value: object) -> object:
    if isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        return plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


@overload
def fit(hint: type[T], value: object, where: str) -> T: ...
@overload
def fit(hint: UnionType, value: object, where: str) -> Any: ...  # nothing says what a union's value is
def fit(hint: object, value: object, where: str) -> object:
    """``value`` as the annotation ``hint`` wants it, or a ConfigError that names every place that does not fit."""
    value = _plain(value)
    try:
        return _adapter(hint).validate_json(json.dumps([value], default=_unwritable))[0]
    except ValidationError as error:
        raise ConfigError(_explained(error, hint, value, where)) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _adapter(hint: object) -> TypeAdapter[tuple[object]]:
    """For a list of one such value: pydantic lets a dataclass have this configuration only within something else."""
    return TypeAdapter(
        tuple[hint],  # type: ignore[valid-type]
        config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True),
    )


def _unwritable(value: object) -> NoReturn:
    raise TypeError(f"{_show(value)} is nothing that JSON or YAML can say.")


_WANTED = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "string_type": "str",
    "bool_type": "bool",
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "dataclass_type"), "keys and values"),
}
"""pydantic's kind of error -> what was expected, in words of YAML."""


def check_options(
    function: Callable[..., object],
    options: Mapping[str, object],
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


def _explained(error: ValidationError, hint: object, value: object, where: str) -> str:
    """What does not fit, place by place; unknown keys come first, for they explain why others are missing."""
    said: list[str] = []
    forms: dict[str, list[str]] = {}
    for fault in sorted(error.errors(include_url=False), key=lambda f: f["type"] != "unexpected_keyword_argument"):
        place, wanted, found = _at(hint, value, fault["loc"][1:])
        if len(_forms(wanted)) > 1:
            forms.setdefault(f"{where}{place}: {_show(found)} fits none of the allowed forms", []).append(_said(fault))
        elif fault["type"] in ("unexpected_keyword_argument", "missing"):
            place, wanted, found = _at(hint, value, fault["loc"][1:-1])
            said.append(f"{where}{place}: {_about_key(fault, wanted, found)}")
        else:
            said.append(f"{where}{place}: {_said(fault, _forms(wanted)[0])}")
    return " ".join([*said, *(f"{head}: {' | '.join(reasons)}" for head, reasons in forms.items())])


def _about_key(fault: "ErrorDetails", holder: object, found: object) -> str:
    key = fault["loc"][-1]
    if isinstance(key, int):
        return _said_of_length(holder, found)
    if fault["type"] == "missing":
        return f"missing {key!r}."
    known = [f.name for form in _forms(holder) if is_dataclass(form) for f in fields(form) if f.init]
    return f"unknown key {key!r}; {nearest(str(key), known)}"


def _said(fault: "ErrorDetails", wanted: object = None) -> str:
    """One fault in words of YAML."""
    found = fault["input"]
    if fault["type"] in _WANTED:
        return f"expected {_WANTED[fault['type']]}, found {_show(found)}."
    if fault["type"] == "too_long":
        return _said_of_length(wanted, found)
    if fault["type"] == "literal_error":
        known = (
            nearest(str(found), map(str, get_args(wanted))) if wanted else f"known: {fault.get('ctx', {})['expected']}."
        )
        return f"unknown value {found!r}; {known}"
    return f"{fault['msg'].removeprefix('Value error, ')}, found {_show(found)}."


def _said_of_length(wanted: object, found: object) -> str:
    return f"expected {len(get_args(wanted))} values, found {len(cast(Sized, found))}."


def _at(hint: object, value: object, loc: Sequence[int | str]) -> tuple[str, object, object]:
    """The path in words, the annotation and the value at a place of pydantic's; where several forms are allowed the
    path ends, for the next step is pydantic's name of a form."""
    place = ""
    for step in loc:
        forms = _forms(hint)
        if len(forms) > 1:
            break
        hint = _member(forms[0], step)
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, Sequence) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            value = None
        place += f"[{step}]" if isinstance(step, int) else f".{step}"
    return place, hint, value


def _forms(hint: object) -> list[object]:
    """What a union allows beside nothing at all; any other annotation is its own only form."""
    return [a for a in get_args(hint) if a is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]


def _member(hint: object, step: int | str) -> object:
    """The annotation of a field, a key or a place in an annotation."""
    if is_dataclass(hint):
        return get_type_hints(hint).get(str(step), object)
    members = [a for a in get_args(hint) if a is not Ellipsis]
    return members[step] if isinstance(step, int) and step < len(members) else members[-1] if members else object


def _show(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """``base`` with the keys of ``over`` laid on top, mappings merged all the way down."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            out[key] = merged(mine, value)
        else:
            out[key] = value
    return out


def section(values: Mapping[str, object], name: str) -> dict[str, object]:
    """What stands under a name in plain keys and values, which are such again. Raises ConfigError for anything else."""
    found = values[name]
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected keys and values, found {_show(found)}.")
    return found
