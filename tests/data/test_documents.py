"""Interleaved pages: OBELICS and MMC4 layouts, real files, shards, and what is wrong with bad ones."""

import base64
import json

import pytest

from isthmus.data.record import Image
from isthmus.data.sources import open_source
from isthmus.data.sources.guess import guess
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import png, write_tar

OBELICS = {"texts": ["a", None, "b", None], "images": [None, "x.png", None, "y.png"], "url": "https://example.org"}
MMC4 = {
    "text_list": ["one.", "two.", "three."],
    "image_info": [
        {"image_name": "y.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.2},
    ],
}


def told(record) -> list[str]:
    return [p.source.describe().rsplit("/", 1)[-1] if isinstance(p, Image) else str(p.text) for p in record.parts]


@pytest.fixture
def folder(tmp_path):
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def write(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_obelics_pages_keep_their_order(folder):
    source = open_source(
        {"kind": "obelics", "file": write(folder, "p.jsonl", OBELICS, {"texts": ["t"], "images": [None]})}
    )
    assert len(source) == 1  # a page without a picture is left out
    record = source[0]
    assert told(record) == ["a", "x.png", "b", "y.png"]
    assert all(p.role == "text" for p in record.parts)
    assert all(p.learn for p in record.texts)
    assert (record.id, record.meta) == ("p/0", {"url": "https://example.org"})
    both = open_source({"kind": "obelics", "file": write(folder, "p.jsonl", OBELICS), "max_images": 1})
    assert told(both[0]) == ["a", "x.png", "b"]
    assert (
        len(
            open_source(
                {
                    "kind": "obelics",
                    "file": write(folder, "q.jsonl", OBELICS, {"texts": ["t"], "images": [None]}),
                    "min_images": 0,
                }
            )
        )
        == 2
    )


def test_mmc4_pictures_stand_before_their_sentence(folder):
    file = write(folder, "m.jsonl", MMC4)
    assert told(open_source({"kind": "mmc4", "file": file})[0]) == ["x.png", "one. two.", "y.png", "three."]
    assert told(open_source({"kind": "mmc4", "file": file, "min_sim": 0.24})[0]) == ["one. two.", "y.png", "three."]


def test_pages_in_shards_bring_their_pictures(folder):
    page = {**OBELICS, "images": [None, "0", None, "1"]}
    shard = write_tar(
        folder / "s.tar", [("k.json", json.dumps(page).encode()), ("k.0.png", png()), ("k.1.png", png((0, 9, 0)))]
    )
    (record,) = [open_source({"kind": "obelics", "shards": str(shard)})[0]]
    assert told(record) == ["a", "s.tar :: k.0.png", "b", "s.tar :: k.1.png"]
    coded = {
        "text_list": ["one."],
        "image_info": [{"image_name": "z", "matched_text_index": 0, "image_base64": base64.b64encode(png()).decode()}],
    }
    shard = write_tar(folder / "c.tar", [("k.json", json.dumps(coded).encode())])
    record = open_source({"kind": "mmc4", "shards": str(shard)})[0]
    assert record.images[0].source.read() == png()


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("obelics", {**OBELICS, "texts": ["a"]}, "1 texts and 4 images"),
        ("obelics", {"texts": ["a"], "images": ["x.png"]}, "place 0 must hold either"),
        ("obelics", {"texts": "a", "images": []}, "no list 'texts'"),
        ("mmc4", {**MMC4, "image_info": [{"image_name": "x.png"}]}, "needs image_name and matched_text_index"),
        ("mmc4", {**MMC4, "image_info": [{"image_name": "x.png", "matched_text_index": 9}]}, "sentence 9 of 3"),
        ("obelics", {"texts": [None, "a"], "images": ["../x.png", None]}, "leaves the image folder"),
    ],
)
def test_bad_pages_are_explained(folder, kind, row, words):
    source = open_source({"kind": kind, "file": write(folder, "p.jsonl", row)})
    with pytest.raises(DataError, match=words):
        source[0]


def test_bad_descriptions_are_explained(folder):
    with pytest.raises(ConfigError, match="did you mean 'obelics'"):
        open_source({"kind": "obelic"})
    with pytest.raises(ConfigError, match="either file"):
        open_source({"kind": "mmc4"})
    file = write(folder, "p.jsonl", {"texts": ["t"], "images": [None]})
    with pytest.raises(DataError, match="no page with 1 pictures"):
        open_source({"kind": "obelics", "file": file})
    with pytest.raises(ConfigError, match="did you mean 'max_images'"):
        open_source({"kind": "obelics", "file": file, "max_image": 3})


def test_layouts_are_known_by_sight(folder):
    assert guess(folder / write(folder, "p.jsonl", OBELICS))["kind"] == "obelics"
    assert guess(folder / write(folder, "m.jsonl", MMC4))["kind"] == "mmc4"


def test_the_real_files(real_data):
    pages = {
        kind: open_source(
            {
                "kind": kind,
                "file": str(real_data / "recipes" / f"{kind}_style.jsonl"),
                "image_folder": str(real_data / "recipes" / "images"),
            }
        )
        for kind in ("obelics", "mmc4")
    }
    assert {kind: len(source) for kind, source in pages.items()} == {"obelics": 85, "mmc4": 85}
    for source in pages.values():
        assert sum(len(source[i].images) for i in range(85)) == 98
    (sample,) = [open_source({"kind": "mmc4", "file": str(real_data / "formats" / "mmc4" / "docs_sample.jsonl")})]
    assert [len(told(sample[0])), len(sample[0].images)] == [5, 2]
