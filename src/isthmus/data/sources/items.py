"""What readers of official files share: rows made from items on access, and fields that are checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from isthmus.data.sources.files import NamedImages, once
from isthmus.data.sources.rows import Row
from isthmus.errors import ConfigError, DataError, nearest

T = TypeVar("T")


class LazyRows(Generic[T]):
    """Rows made from items on access; the item itself is checked then.

    ``also_read``: what else ``make`` reads. A change of it, as of the items, must change the fingerprint.
    """

    def __init__(
        self, items: Sequence[T], make: Callable[[T], Row], images: NamedImages, also_read: Iterable[object] = ()
    ) -> None:
        self.items, self.make, self.images, self.also_read = items, make, images, also_read

    def __len__(self) -> int:
        return len(self.items)

    def listing(self) -> Iterator[object]:
        yield from self.items
        yield from self.also_read
        yield from self.images.listing()

    def __getitem__(self, index: int) -> Row:
        return self.make(self.items[index])


def listed_under(content: object, key: str, file: str) -> list[Mapping[str, object]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise DataError(f"{file} is not of the expected format: it needs a list {key!r} with entries")
    return found


def each_once(items: Iterable[Mapping[str, object]], key: str, file: str) -> list[Mapping[str, object]]:
    """The items, each id once. Raises DataError for a missing id or one that comes twice."""
    found = list(items)
    for number, item in enumerate(found):
        if key not in item:
            raise DataError(f"{file}: entry {number} has no {key!r}; is it a file of this format?")
    once((item[key] for item in found), file, key)
    return found


def field_of(sample: str, item: object, name: str, form: type[T] | tuple[type[T], ...] = str) -> T:
    """A field of one sample. Raises DataError, which names both, where it is missing or has another form."""
    if not isinstance(item, Mapping) or name not in item:
        raise DataError(f"missing field: {sample} has no {name!r}")
    found: object = item[name]
    if not isinstance(found, form):
        raise DataError(f"bad field: {sample}: {name!r} should not be {str(found)[:60]!r} ({type(found).__name__})")
    return found


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"source: {option} {value!r} is unknown; {nearest(value, allowed)}")


def filled_name(image_name: str, **known: object) -> str:
    """The option ``image_name`` filled in. Raises ConfigError when it names something else, or in another form."""
    try:
        return image_name.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        places = ", ".join(f"{{{name}}}" for name in known)
        raise ConfigError(
            f"source: image_name {image_name!r} cannot be filled in ({error}); it may hold {places}, here "
            f"{', '.join(repr(value) for value in known.values())}"
        ) from None
