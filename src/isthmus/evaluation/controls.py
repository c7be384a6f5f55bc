"""Controls of a score: the same questions with their picture, blind (no picture) and shuffled (another's picture)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Literal, get_args

from isthmus.errors import CapabilityError, ConfigError, DataError, nearest
from isthmus.evaluation.protocols import Answers, Records, Sample
from isthmus.evaluation.turns import partners, with_pictures_of, without_picture

Control = Literal["blind", "shuffled"]

WINDOW = 64
"""Different pictures among which the shuffled control finds another one; up to twice as many in the last window."""
_APART = 1_000_003
"""Between the seeds of windows, so that none is another one's at a neighbouring seed."""


def check_controls(controls: Sequence[str]) -> None:
    """Raises ConfigError for an unknown control."""
    for name in controls:
        if name not in get_args(Control):
            raise ConfigError(f"Unknown control {name!r}; {nearest(name, get_args(Control))}")


def answers_of(model: Answers, records: Sequence[Sample], decoding: Mapping[str, object]) -> list[str]:
    """One answer per record. Raises CapabilityError when the model gives another number of them."""
    answers = model.answer_records(records, **decoding)
    if len(answers) != len(records):
        raise CapabilityError(f"The model gave {len(answers)} answers to {len(records)} questions.")
    return answers


def answers_with_controls(
    model: Answers,
    prompts: Sequence[Sample],
    others: Sequence[Sample],
    controls: Sequence[str],
    decoding: Mapping[str, object],
) -> dict[str, list[str]]:
    """``answer``, and ``blind`` and ``shuffled`` as far as ``controls`` name them, each in the order of ``prompts``.

    ``others`` are the records whose pictures are shown in ``shuffled``. A record without pictures runs once: its
    answer stands in the controls too.
    """
    seeing = [i for i, record in enumerate(prompts) if record.images]
    changed = {
        "blind": lambda: [without_picture(prompts[i]) for i in seeing],
        "shuffled": lambda: [with_pictures_of(prompts[i], others[i]) for i in seeing],
    }
    # In one call, so that a model can read what they share once: pictures, shots, the system's words.
    said = iter(
        answers_of(model, [*prompts, *(record for control in controls for record in changed[control]())], decoding)
    )
    answers = {"answer": list(islice(said, len(prompts)))}
    for control in controls:
        found = list(answers["answer"])
        for i in seeing:
            found[i] = next(said)
        answers[control] = found
    return answers


def picture_keys(records: Records[Sample], task: str, *, mixed: bool = False) -> list[str]:
    """One key per record for all of its pictures together: what decides whose picture is another one.

    Raises DataError for a record without a picture, unless the data are ``mixed``; all of them without is an error.
    """
    keys = []
    for i in range(len(records)):
        record = records[i]
        if not record.images and not mixed:
            raise DataError(
                f"Task {task!r}: sample {record.id!r} has no picture to leave out or to exchange "
                "for the controls; leave out the controls (controls=[]), the sample, or say mixed=true."
            )
        keys.append(" ".join(p.content_key() for p in record.images))
    if not any(keys) and keys:
        raise DataError(f"Task {task!r}: no sample has a picture; leave out the controls (controls=[]).")
    return keys


def shuffled_partners(keys: Sequence[str], seed: int) -> list[int]:
    """For each record the index of one with another picture; a record without a picture (key "") stands for itself.

    The other record is one of the same window (:func:`windows`), so that both pictures are decoded once, and how many
    are held at a time does not grow with the data. Raises DataError when all pictures are the same.
    """
    seeing = [i for i, key in enumerate(keys) if key]
    found = list(range(len(keys)))
    for number, window in enumerate(windows([keys[i] for i in seeing])):
        places = [seeing[i] for i in window]
        for i, partner in zip(places, partners([keys[i] for i in places], seed + _APART * number), strict=True):
            found[i] = places[partner]
    return found


def windows(keys: Sequence[str], size: int = WINDOW) -> list[range]:
    """Neighbouring records in order, ``size`` different pictures at a time; what is left over, less than ``size``, is
    the last window's."""
    starts, found = [0], set[str]()
    for i, key in enumerate(keys):
        if key not in found and len(found) == size:
            starts.append(i)
            found.clear()
        found.add(key)
    if len(starts) > 1 and len(found) < size:
        starts.pop()
    return [range(a, b) for a, b in pairwise([*starts, len(keys)])]


@dataclass(frozen=True, slots=True)
class ControlPlan:
    """How records run under the controls: ``shuffled`` shows the pictures of record ``other[i]``, and the records of
    one window (:func:`windows`) run together."""

    other: Sequence[int]
    window: Sequence[int]

    @classmethod
    def of(cls, keys: Sequence[str], controls: Sequence[str], seed: int) -> "ControlPlan":
        """``keys`` of all records, see :func:`picture_keys`. Without ``shuffled`` there is one window."""
        if "shuffled" not in controls:
            return cls(range(len(keys)), (0,) * len(keys))
        seeing = [i for i, key in enumerate(keys) if key]
        window = [0] * len(keys)
        for number, places in enumerate(windows([keys[i] for i in seeing])):
            for place in places:
                window[seeing[place]] = number
        return cls(shuffled_partners(keys, seed), window)

    def chunks(self, todo: Sequence[int], size: int) -> Iterator[list[int]]:
        """The numbers ``todo`` in order, at most ``size`` at a time and each time of one window."""
        for _, places in groupby(todo, lambda i: self.window[i]):
            some = list(places)
            yield from (some[start : start + size] for start in range(0, len(some), size))


def plan_controls(
    records: Records[Sample], task: str, controls: Sequence[Control], seed: int, *, mixed: bool = False
) -> ControlPlan:
    """See :class:`ControlPlan`. Raises DataError when there are controls and no pictures to leave out: see
    :func:`picture_keys`."""
    keys = picture_keys(records, task, mixed=mixed) if controls else [""] * len(records)
    return ControlPlan.of(keys, controls, seed)


def shuffled_among(controls: Sequence[str], count: int) -> dict[str, int]:
    """What a manifest holds of the windows, so that outputs with other partners are not mixed with new ones. Nothing
    where ``count`` records are too few for two windows."""
    return {"shuffled_among": WINDOW} if "shuffled" in controls and count > WINDOW else {}
