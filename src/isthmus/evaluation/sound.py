"""Records that can be used: what cannot be read is quarantined and counted before the first question is asked.

Every picture is opened once, so that a broken one costs its sample and not the evaluation, and neither a partner of
shuffled pictures nor a rank among others depends on where it stood. Pictures made in the program are not looked at.
"""

from typing import Any

from isthmus.data.images import BytesImage, FileImage, TarImage, open_image
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Record, Video
from isthmus.data.video import FileFrames, FolderFrames
from isthmus.errors import DataError
from isthmus.evaluation.protocols import Records

_STORED = FileImage | TarImage | BytesImage | FileFrames | FolderFrames


class Sound:
    """The records of a source that can be read, in order; the others are in ``quarantine``.

    Raises DataError when more are bad than the quarantine allows, or none is left.
    """

    def __init__(self, records: Records, quarantine: Quarantine) -> None:
        self.records, self.quarantine = records, quarantine
        self.name = str(getattr(records, "name", ""))
        faults: dict[str, str] = {}
        self._kept = [i for i in range(len(records)) if self._usable(i, faults)]
        quarantine.seen(len(records))
        if not self._kept:
            raise DataError(f"No sample of {self.name or 'the data'} can be used: {quarantine.example()}")

    def _usable(self, index: int, faults: dict[str, str]) -> bool:
        name = f"{self.name}[{index}]"
        try:
            record = self.records[index]
            name = record.id
            fault = next((f for image in record.images if (f := _fault(image, faults))), "")
        except DataError as error:
            fault = str(error)
        if fault:
            self.quarantine.add(name, self.name, fault)
        return not fault

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        return self.records[self._kept[index]]


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
