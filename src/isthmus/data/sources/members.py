"""Which pictures of a tar's sample are meant: by the names its text uses, else in natural order."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from isthmus.data.video import natural
from isthmus.errors import DataError


class Named(Protocol):
    """A member of a tar: ``name`` is its full name there."""

    @property
    def name(self) -> str: ...


M = TypeVar("M", bound=Named)


def in_order(members: Sequence[M]) -> list[M]:
    """By name, with the numbers in it by value: ``k.2.png`` before ``k.10.png``, wherever they stand in the tar."""
    return sorted(members, key=lambda member: natural(member.name))


def called(name: str, members: Sequence[M]) -> M | None:
    """The one member with this name after its key, or as its full name, with or without the ending; else none."""
    for one in dict.fromkeys((name.lower(), name.lower().rsplit("/", 1)[-1])):
        for bare in (False, True):
            hits = [m for m in members if one in _names(m.name.lower(), bare)]
            if len(hits) == 1:
                return hits[0]
    return None


def listed(names: Sequence[str], members: Sequence[M]) -> list[M]:
    """The members that a sample's list of pictures names, in its order; where it names none of them, all in natural
    order. Raises DataError when only some of the names are members'."""
    found = [called(name, members) for name in names]
    if all(member is None for member in found):
        return in_order(members)
    if None in found:
        raise DataError(
            f"missing image: the sample lists {names[found.index(None)]!r}, and none of its pictures in the tar is "
            f"called so ({', '.join(m.name for m in in_order(members))}); name them alike"
        )
    return [member for member in found if member is not None]


def _names(member: str, bare: bool) -> set[str]:
    """What a sample may call the member ``a/k.0.png``: a/k.0.png, k.0.png or 0.png; ``bare`` leaves out the ending."""
    file = member.rsplit("/", 1)[-1]
    names = {member, file, file.partition(".")[2]}
    return {name.rpartition(".")[0] for name in names} - {""} if bare else names
