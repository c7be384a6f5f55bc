"""COCO captions whose texts or ids repeat."""

import pytest

from isthmus.data.sources import open_source
from isthmus.errors import DataError
from tests.data.test_sources import said, write

COCO = {
    "images": [{"id": 5, "file_name": "red.png"}],
    "annotations": [{"id": n, "image_id": 5, "caption": c} for n, c in enumerate(["one", "one", "two"])],
}


def test_coco_captions_that_two_people_wrote_alike_are_two(tmp_path):
    write(tmp_path / "captions.json", COCO)
    source = open_source({"kind": "coco", "file": "captions.json"}, data_root=tmp_path)
    assert said(source[0])[1] == ("text", ("one", "one", "two"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": COCO["images"] * 2}, "the image id 5 is there twice"),
        ({"annotations": [*COCO["annotations"], COCO["annotations"][0]]}, "the annotation id 0 is there twice"),
        ({"annotations": [{"image_id": 777, "caption": "x"}]}, "for the image 777, which is not among `images`"),
    ],
)
def test_coco_files_whose_ids_do_not_fit(tmp_path, change, words):
    write(tmp_path / "captions.json", COCO | change)
    with pytest.raises(DataError, match=words):
        open_source({"kind": "coco", "file": "captions.json"}, data_root=tmp_path)
