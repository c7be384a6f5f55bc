"""Errors that teach: what went wrong, where, in which sample, and what to do about it.

Every error a user can cause is an :class:`IsthmusError`; the command line prints its text as one paragraph,
without a traceback. Anything else that escapes is a bug in isthmus.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class IsthmusWarning(UserWarning):
    """What works, but perhaps not as meant."""


class IsthmusError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 2
    """What the command line ends with."""


class ConfigError(IsthmusError):
    """A recipe, configuration or command-line value does not fit."""


class DataError(IsthmusError):
    """A source, file or sample cannot be used. Sample-level ones are quarantined and counted."""


class CheckpointError(IsthmusError):
    """A checkpoint is missing, damaged, or does not match the model."""


class StageError(IsthmusError):
    """A stage's freezing or training contract does not hold."""


class CapabilityError(IsthmusError):
    """The model lacks the requested capability."""


class EndpointError(IsthmusError):
    """A language model's endpoint refuses, fails, or is not what was named; further requests would fare no better."""


class ReplyError(IsthmusError):
    """One request to an endpoint got no usable answer."""


class MissingExtraError(IsthmusError):
    """An optional dependency is not installed."""


def as_sentence(error: object) -> str:
    """An error's text with a mark at its end, for more to follow."""
    return text if (text := str(error)).endswith((".", "?", "!")) else f"{text}."


def nearest(name: str, known: Iterable[str], *, many: int = 1) -> str:
    """``did you mean 'x'?`` for a misspelt name, or the list of what is known when nothing is near."""
    known = [str(k) for k in known]
    folded = {k.casefold(): k for k in known}  # capitals are the commonest fault of all
    low = name.casefold()
    close = difflib.get_close_matches(low, folded, n=max(many, 3), cutoff=0.5)
    close.sort(key=lambda c: sorted(c) != sorted(low))  # two swapped letters before anything else: cvs is csv, not vsr
    close = [folded[c] for c in close[:many]]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(sorted(known)[:24])
    return f"known: {shown}" + (", …" if len(known) > 24 else ".")


def misspelt(path: Path) -> str:
    """``; did you mean …?`` for a file that is not there, of the files beside it with the same ending; else nothing."""
    if path.exists() or not path.suffix or not path.parent.is_dir():
        return ""
    beside = [str(other) for other in path.parent.glob("*") if other.suffix == path.suffix and other.is_file()]
    said = nearest(str(path), beside)
    return f"; {said}" if said.startswith("did you mean") else ""
