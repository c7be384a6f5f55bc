"""Records that can be used: what cannot be read is quarantined and counted before the first question is asked.

Every picture is opened once, so that a broken one costs its sample and not the evaluation, and neither a partner of
shuffled pictures nor a rank among others depends on where it stood. Pictures made in the program are not looked at.
Of a question task every answer to score against is looked at too.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from isthmus.data.images import BytesImage, FileImage, TarImage, open_image
from isthmus.data.mix import Source
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Record, Video
from isthmus.data.video import FileFrames, FolderFrames
from isthmus.errors import DataError
from isthmus.evaluation.protocols import Records
from isthmus.evaluation.turns import last_turn, turns

_STORED = FileImage | TarImage | BytesImage | FileFrames | FolderFrames


Demand = Callable[[Record], object]
"""Raises DataError for a record that a task cannot use."""


class Sound:
    """The records of a source that can be read and meet ``demand``, in order; the others are in ``quarantine``.

    ``pictures`` false leaves the pictures unopened, for data of which only words are read.

    Raises DataError when more are bad than the quarantine allows, or none is left.
    """

    def __init__(
        self, records: Records, quarantine: Quarantine, *, demand: Demand | None = None, pictures: bool = True
    ) -> None:
        self.records, self.quarantine = records, quarantine
        self._demand, self._pictures = demand, pictures
        self.name = records.name if isinstance(records, Source) else ""
        faults: dict[str, str] = {}
        self._kept = [i for i in range(len(records)) if self._usable(i, faults)]
        quarantine.seen(len(records))
        if not self._kept:
            raise DataError(f"No sample of {self.name or 'the data'} can be used: {quarantine.example()}")

    def _usable(self, index: int, faults: dict[str, str]) -> bool:
        name, fault = _checked(self.records, index, faults, self._demand, pictures=self._pictures)
        if fault:
            self.quarantine.add(name or f"{self.name}[{index}]", self.name, fault)
        return not fault

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        return self.records[self._kept[index]]


def first_sound(records: Records, most: int) -> list[Record]:
    """The first ``most`` records that can be read, or as many as there are; the rest is not looked at."""
    faults: dict[str, str] = {}
    readable = (records[i] for i in range(len(records)) if not _checked(records, i, faults)[1])
    return list(islice(readable, most))


def answered(record: Record) -> None:
    """The demand of tasks that score the last question. Raises DataError without an answer, or with an empty one."""
    try:
        last_turn(record)
    except DataError as error:
        raise DataError(f"empty answer: {error}") from None


def all_answered(record: Record) -> None:
    """The demand of tasks that score every question, see :func:`answered`."""
    answered(record)
    for number, turn in enumerate(turns(record)[:-1], start=1):
        if not any(a.strip() for a in turn.answers):
            raise DataError(f"empty answer: Sample {record.id!r} has an empty answer to question {number}.")


def _checked(
    records: Records, index: int, faults: dict[str, str], demand: Demand | None = None, *, pictures: bool = True
) -> tuple[str, str]:
    """The record's id (empty when it cannot be had) and what is wrong with it (empty when nothing is)."""
    try:
        record = records[index]
    except DataError as error:
        return "", str(error)
    try:
        if demand is not None:
            demand(record)
    except DataError as error:
        return record.id, str(error)
    if not pictures:
        return record.id, ""
    return record.id, next((f for image in record.images if (f := _fault(image, faults))), "")


def _fault(image: Any, faults: dict[str, str]) -> str:
    """What is wrong with a stored picture or clip, found out once for each; empty when nothing is."""
    if not isinstance(image.source, _STORED):
        return ""
    where = "" if isinstance(image.source, BytesImage) else image.source.describe()
    if not where or where not in faults:
        try:
            image.source.read() if isinstance(image, Video) else open_image(image.source)
            faults[where] = ""
        except DataError as error:
            faults[where] = str(error)
    return faults[where]
