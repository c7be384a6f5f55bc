"""What became of a checkpoint's tensors: the account that is kept while a model is opened.

Readers record which tensors files hold, and the last step which of them the net took. A tensor of the net that *is* one
of a file's, in the same memory, was matched, whatever its name; one that was split, joined, transposed or merged on the
way was converted. What is in no file, and what is in a file and not used, must be recorded with a reason by the code
that decides it. Readers are passed the account of what is being opened; one that is called by itself, without, keeps
none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Tensors of the net: ``matched`` and ``converted`` from the files, ``from_parts`` of models named beside them,
    ``absent`` from all of these (name -> why). ``ignored`` are the files' own (name -> why). ``notes`` are what else is
    read otherwise than the files have it, a sentence each. ``dtype`` is what most of
    the checkpoint's own numbers are stored in, ``float32`` or ``bfloat16``."""

    matched: int
    converted: int
    from_parts: int
    dtype: str = "float32"
    absent: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        counts = [f"{self.matched} as stored", f"{self.converted} converted"]
        counts += [f"{self.from_parts} of the models named"] if self.from_parts else []
        lines = [f"{', '.join(counts)}, {len(self.absent)} absent, {len(self.ignored)} unused"]
        for label, named in (("absent", self.absent), ("unused", self.ignored)):
            for why in dict.fromkeys(named.values()):
                names = [name for name, reason in named.items() if reason == why]
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                lines.append(f"  {label}: {', '.join(names[:2])}{more} ({why})")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


DERIVED = "made anew by everybody who reads it"
"""Why a tensor that follows from the configuration, such as position ids, is not used."""

Place = tuple[int, int]
"""Address and count of numbers: a joint matrix and its first part begin at the same address."""


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel()


@dataclass
class Account:
    """What has been recorded so far. ``own`` and ``parts`` are tensors of files by place, of the checkpoint itself and
    of what was opened beside it; they are kept, so that no other tensor gets the place meanwhile. ``taken`` are the
    places of what the net was given, ``held`` are its own tensors."""

    own: dict[Place, Tensor] = field(default_factory=dict)
    parts: dict[Place, Tensor] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    taken: list[Place] = field(default_factory=list)
    held: dict[Place, Tensor] = field(default_factory=dict)

    def report(self) -> LoadReport:
        matched = sum(place in self.own for place in self.taken)
        named = sum(place in self.parts and place not in self.own for place in self.taken)
        return LoadReport(
            matched=matched,
            converted=len(self.taken) - matched - named - len(self.absent),
            from_parts=named,
            dtype=self._dtype(),
            absent=dict(self.absent),
            ignored=dict(self.ignored),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _dtype(self) -> str:
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.own.values():
            if tensor.is_floating_point():
                counts[tensor.dtype] += tensor.numel()
        return str(counts.most_common(1)[0][0]).removeprefix("torch.") if counts else "float32"


def beside(account: Account, part: Account) -> None:
    """``part`` is the account of a model, or of weights, that was opened for the one of ``account``."""
    account.parts |= part.own | part.held
    account.notes += part.notes


def stored(account: Account | None, tensors: Iterable[Tensor]) -> None:
    """These came out of a file."""
    if account is not None:
        account.own |= {_place(tensor): tensor for tensor in tensors}


def took(account: Account | None, plan: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Pairs of a tensor of the net, each once, and what it was made from."""
    if account is not None:
        for target, source in plan:
            account.taken.append(_place(source))
            account.held[_place(target)] = target


def converted(account: Account | None, tensors: Iterable[Tensor]) -> None:
    """These were taken and are about to be changed: an adapter is merged into them."""
    if account is not None:
        places = {_place(tensor) for tensor in tensors}
        account.taken = [(-1, place[1]) if place in places else place for place in account.taken]


def absent(account: Account | None, names: Iterable[str], why: str) -> None:
    """Tensors of the net that no file holds, and that are right without."""
    if account is not None:
        account.absent |= dict.fromkeys(names, why)


def ignored(account: Account | None, names: Iterable[str], why: str) -> None:
    """Tensors of a file that the net has no use for."""
    if account is not None:
        account.ignored |= dict.fromkeys(names, why)


def noted(account: Account | None, *sentences: str) -> None:
    """What is read otherwise than the files have it, or will be written otherwise."""
    if account is not None:
        account.notes += sentences
