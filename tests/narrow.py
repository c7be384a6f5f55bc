"""What a test knows of a value and its type leaves open, checked where the value is used."""

from typing import TypeVar

T = TypeVar("T")


def there(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value


def must_be(kind: type[T], value: object) -> T:
    """The value, which must be of that class."""
    assert isinstance(value, kind), f"{type(value).__name__}, not {kind.__name__}"
    return value
