"""Asking a model with and without its eyes: the same questions seen, blind (no picture) and shuffled (another's)."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

from isthmus.errors import CapabilityError, ConfigError, DataError, nearest
from isthmus.evaluation.protocols import Answers, Records
from isthmus.evaluation.turns import partners, with_pictures_of, without_picture

Control = Literal["blind", "shuffled"]


def check_controls(controls: Sequence[str]) -> None:
    """Raises ConfigError for an unknown control."""
    for name in controls:
        if name not in get_args(Control):
            raise ConfigError(f"Unknown control {name!r}; {nearest(name, get_args(Control))}")


def ask(model: Answers, records: Sequence[Any], decoding: Mapping[str, Any]) -> list[str]:
    """One answer per record. Raises CapabilityError when the model gives another number of them."""
    answers = model.answer_records(records, **decoding)
    if len(answers) != len(records):
        raise CapabilityError(f"The model gave {len(answers)} answers to {len(records)} questions.")
    return answers


def ask_all(
    model: Answers,
    asked: Sequence[Any],
    others: Sequence[Any],
    controls: Sequence[str],
    decoding: Mapping[str, Any],
) -> dict[str, list[str]]:
    """``answer``, and ``blind`` and ``shuffled`` as far as ``controls`` name them, each in the order of ``asked``.

    ``others`` are the records whose pictures are shown in ``shuffled``. A record without pictures is not asked again:
    its answer stands in the controls too.
    """
    seeing = [i for i, record in enumerate(asked) if record.images]
    changed = {
        "blind": lambda: [without_picture(asked[i]) for i in seeing],
        "shuffled": lambda: [with_pictures_of(asked[i], others[i]) for i in seeing],
    }
    # In one call, so that a model can read what they share once: pictures, shots, the system's words.
    said = iter(ask(model, [*asked, *(record for control in controls for record in changed[control]())], decoding))
    answers = {"answer": list(islice(said, len(asked)))}
    for control in controls:
        found = list(answers["answer"])
        for i in seeing:
            found[i] = next(said)
        answers[control] = found
    return answers


def picture_keys(records: Records, task: str, *, mixed: bool = False) -> list[str]:
    """One key per record for all of its pictures together: what decides whose picture is another one.

    Raises DataError for a record without a picture, unless the data are ``mixed``; all of them without is an error.
    """
    keys = []
    for i in range(len(records)):
        record = records[i]
        if not record.images and not mixed:
            raise DataError(
                f"Task {task!r}: sample {record.id!r} has no picture, so it cannot be asked without it or with "
                "another; leave out the controls (controls=[]), the sample, or say mixed=true."
            )
        keys.append(" ".join(p.content_key() for p in record.images))
    if not any(keys) and keys:
        raise DataError(f"Task {task!r}: no sample has a picture; leave out the controls (controls=[]).")
    return keys


def strangers(keys: Sequence[str], seed: int) -> list[int]:
    """For each record the index of one with another picture; a record without a picture (key "") stands for itself.

    Raises DataError when all pictures are the same.
    """
    seeing = [i for i, key in enumerate(keys) if key]
    found = list(range(len(keys)))
    for i, partner in zip(seeing, partners([keys[i] for i in seeing], seed), strict=True):
        found[i] = seeing[partner]
    return found


def whose_pictures(
    records: Records, task: str, controls: Sequence[Control], seed: int, *, mixed: bool = False
) -> Sequence[int]:
    """Whose pictures each record is asked with under the controls: see :func:`strangers`; without ``shuffled``, its
    own. Raises DataError when there are controls and no pictures to leave out: see :func:`picture_keys`."""
    keys = picture_keys(records, task, mixed=mixed) if controls else []
    return strangers(keys, seed) if "shuffled" in controls else range(len(records))
