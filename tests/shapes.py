"""The type checker under which the tests import the package: shapes are checked, other types are pyright's."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on those annotations that hold shapes."""
    kept = {name: hint for name, hint in function.__annotations__.items() if "jaxtyping" in repr(hint)}
    if not kept:
        return function
    function.__annotations__ = kept
    return beartype(function)
