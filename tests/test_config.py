"""Strict configurations: what is built, what is refused and how the refusal reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from isthmus.config import plain, section, strict
from isthmus.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rate: float = 1.0
    layers: int | tuple[int, ...] = -1
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    flag: bool = False
    note: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()


def test_nested_values_are_built_and_come_back_plain():
    values = {
        "inner": {"width": 3, "kind": "b"},
        "rate": 2,
        "layers": [1, 2],
        "names": ["x"],
        "pair": [1, "y"],
        "flag": True,
        "note": None,
        "extra": {"k": [1]},
        "many": [{"width": 1}],
    }
    made = strict(Outer, values, "outer")
    assert made == Outer(
        inner=Inner(width=3, kind="b"),
        rate=2.0,
        layers=(1, 2),
        names=("x",),
        pair=(1, "y"),
        flag=True,
        extra={"k": [1]},
        many=(Inner(width=1),),
    )
    assert isinstance(made.rate, float)
    assert strict(Outer, plain(made), "outer") == made
    assert strict(Outer, made, "outer") is made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"width": 3}, "rat": 1.0}, "outer: unknown key 'rat'; did you mean 'rate'"),
        ({"inner": {"width": 3, "kin": "a"}}, r"outer\.inner: unknown key 'kin'; did you mean 'kind'"),
        ({"inner": {"width": 3, "kind": "c"}}, r"outer\.inner\.kind: unknown value 'c'; known: a, b"),
        ({}, "outer: missing 'inner'"),
        ({"inner": {"width": "3"}}, r"outer\.inner\.width: expected int, found str '3'"),
        ({"inner": {"width": True}}, r"outer\.inner\.width: expected int, found bool True"),
        ({"inner": 3}, r"outer\.inner: expected keys and values, found int 3"),
        ({"inner": {"width": 3}, "names": "x"}, r"outer\.names: expected a list"),
        ({"inner": {"width": 3}, "pair": [1]}, r"outer\.pair: expected 2 values, found 1"),
        ({"inner": {"width": 3}, "names": [1]}, r"outer\.names\[0\]: expected str"),
        ({"inner": {"width": 3}, "layers": "x"}, r"outer\.layers: str 'x' fits none"),
        ({"inner": {"width": 3}, "flag": 1}, r"outer\.flag: expected bool, found int 1"),
        ({"inner": {"width": 3}, "rate": None}, r"outer\.rate: expected float, found nothing"),
        ({"inner": {"width": 3}, "extra": [1]}, r"outer\.extra: expected keys and values"),
        ({"inner": {"width": 3}, "pair": [1, "y", 2]}, r"outer\.pair: expected 2 values, found 3"),
        ({"inner": {"width": 3}, "layers": ["x"]}, r"outer\.layers: list \['x'\] fits none of .*: expected int"),
        ({"inner": {"width": 3}, "many": [{"width": 1}, {"widht": 2}]}, r"outer\.many\[1\]: unknown key 'widht'; did"),
        ({"inner": {"width": 3}, "note": Path()}, r"outer: PosixPath .* is nothing that JSON or YAML can say"),
        ({"inner": {"wide": "3"}, "flag": 1}, r"unknown key 'wide'.* missing 'width'\. .*flag: expected bool"),
        (["inner"], "outer: expected keys and values, found list"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        strict(Outer, values, "outer")


def test_a_section_holds_keys_and_values():
    values = {"vision": {"width": 3}, "language": "small"}
    assert section(values, "vision") is values["vision"]
    with pytest.raises(ConfigError, match="language: expected keys and values, found str 'small'"):
        section(values, "language")
