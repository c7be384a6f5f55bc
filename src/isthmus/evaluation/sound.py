"""Records that can be used: what cannot be read is quarantined and counted before the first question.

Every picture is opened once, so that a broken one costs its sample and not the evaluation, and neither a partner of
shuffled pictures nor a rank among others depends on where it stood. The same reading gives its content key, which
is remembered. Decoding is left to the questions: a picture whose header is sound and whose data are not is met there,
raises :class:`.window.Undecodable`, and the evaluation begins anew with every picture decoded beforehand. Pictures
made in the program that have a key are not opened. Of a question task every answer to score against is checked.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import islice
from typing import Literal

from isthmus.data.images import FileImage, TarImage, check_header, decoded
from isthmus.data.mix import Source
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Image, Record, Video
from isthmus.data.video import FileFrames, FolderFrames
from isthmus.data.visits import read_once
from isthmus.errors import DataError
from isthmus.evaluation.protocols import Records
from isthmus.evaluation.turns import last_turn, turns
from isthmus.evaluation.window import DecodedWindow

Check = Literal["decode", "read", "none"]
"""What is done to each picture beforehand: decoded, read (content key, header and limits), or nothing."""
_PLACES = FileImage | TarImage | FileFrames | FolderFrames
"""Sources that say where a picture is and do not hold it."""

Demand = Callable[[Record], object]
"""Raises DataError for a record that a task cannot use."""


class Sound:
    """The records of a source that can be read and meet ``demand``, in order; the others are in ``quarantine``.

    ``pictures`` is how far each picture is read: ``none`` for data of which only words are read. Otherwise the
    records' pictures carry their content keys and are decoded through a window, so that a picture with several
    questions and controls is decoded once.

    Raises DataError when more are bad than the quarantine allows, or none is left.
    """

    def __init__(
        self,
        records: Records[Record],
        quarantine: Quarantine,
        *,
        demand: Demand | None = None,
        pictures: Check = "decode",
    ) -> None:
        self.records, self.quarantine = records, quarantine
        self._demand, self._check = demand, _Pictures(pictures)
        self._window = DecodedWindow()
        self.name = records.name if isinstance(records, Source) else ""
        self._keys: list[tuple[str, ...]] = []
        self._kept = [i for i in range(len(records)) if self._usable(i)]
        quarantine.count_read(len(records))
        if not self._kept:
            raise DataError(f"No sample of {self.name or 'the data'} can be used: {quarantine.example()}")

    def _usable(self, index: int) -> bool:
        name, keys, fault = _checked(self.records, index, self._check, self._demand)
        if fault:
            self.quarantine.add(name or f"{self.name}[{index}]", self.name, fault)
        else:
            self._keys.append(keys)
        return not fault

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        record, keys = self.records[self._kept[index]], iter(self._keys[index])
        if self._check.check == "none" or not record.images:
            return record
        shown = (self._window.image(p, next(keys)) if isinstance(p, Image) else p for p in record.parts)
        return replace(record, parts=tuple(shown))


def first_sound(records: Records[Record], most: int) -> list[Record]:
    """The first ``most`` records that can be read, or as many as there are; the rest is not read."""
    check = _Pictures("decode")
    readable = (records[i] for i in range(len(records)) if not _checked(records, i, check)[2])
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
    records: Records[Record], index: int, check: "_Pictures", demand: Demand | None = None
) -> tuple[str, tuple[str, ...], str]:
    """The record's id (empty when it cannot be had), its pictures' content keys, and what is wrong with it (empty when
    nothing is)."""
    try:
        record = records[index]
    except DataError as error:
        return "", (), str(error)
    try:
        if demand is not None:
            demand(record)
    except DataError as error:
        return record.id, (), str(error)
    found = [check(image) for image in record.images]
    return record.id, tuple(key for key, _ in found), next((fault for _, fault in found if fault), "")


class _Pictures:
    """Content key and fault of each picture or clip, found out once for each file."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self._found: dict[Hashable, tuple[str, str]] = {}

    def __call__(self, image: Image) -> tuple[str, str]:
        if self.check == "none" or not (image.key == "" or isinstance(image.source, _PLACES)):
            return image.key, ""
        if not isinstance(image.source, _PLACES):  # what holds its content is not kept
            return self._look(image)
        if image.source not in self._found:
            self._found[image.source] = self._look(image)
        return self._found[image.source]

    def _look(self, image: Image) -> tuple[str, str]:
        try:
            held = read_once(image)
            if isinstance(image, Video):
                return held.key, ""  # its frames were decoded by reading
            decoded(held.source) if self.check == "decode" else check_header(held.source)
        except DataError as error:
            return "", str(error)
        return held.key, ""
