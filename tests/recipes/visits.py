"""Questions about pictures, and what a process opens and decodes of them."""

import json
from collections import Counter

import pytest
from PIL import Image as PilImage
from PIL.ImageFile import ImageFile

from isthmus.data.images import FileImage, ImageTransform
from isthmus.data.loader import Loader
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.sources import open_source
from tests.data.helpers import byte_level


def count_visits(monkeypatch):
    """How often each file was read, and how many pictures were decoded, in this process."""
    opened, decoded = Counter(), Counter()
    read, decode = FileImage.read, ImageFile.load

    def counted(self):
        opened[self.path.name] += 1
        return read(self)

    def loaded(self):
        decoded["all"] += bool(self.tile)  # nothing is left to do where it was decoded before
        return decode(self)

    monkeypatch.setattr(FileImage, "read", counted)
    monkeypatch.setattr(ImageFile, "load", loaded)
    return opened, decoded


def questions(folder, count):
    """A source of ``count`` questions about as many pictures."""
    rows = []
    for number in range(count):
        PilImage.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return {"kind": "llava", "file": str(folder / "data.json"), "image_folder": str(folder)}


def epoch_of(part, data):
    """What one of two processes of a training opens and decodes in an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        opened, decoded = count_visits(patch)
        sources, processor = [open_source(data)], ContrastiveProcessor(byte_level(), ImageTransform(size=8))
        for batches in Loader(sources, processor, batch_size=4, group=False, part=(part, 2)).epoch():
            assert all(key for batch in batches for key in batch.keys)
        return dict(opened), decoded["all"]
