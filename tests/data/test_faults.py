"""Each common fault of data, tried: the error names the fault itself, not something that follows from it."""

import gzip
import json

import pytest
from PIL import Image

from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.data.sources.guess import guess
from isthmus.errors import IsthmusError, IsthmusWarning

HTML = b"<!DOCTYPE html><html><body>404</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "c"}]}
ROW = {"image": "a.png", "caption": "a cat"}
ROWS = json.dumps(ROW).encode()
FIELDS = {"fields": {"image": "bild", "caption": "satz"}}

FILES = {
    "a header divided by semicolons": ("csv", b"image;caption\na.png;c\n", {"delimiter": ","}, 'make it ";"'),
    "divided otherwise, fields named": ("csv", b"bild;satz\na.png;c\n", FIELDS | {"delimiter": "\t"}, 'make it ";"'),
    "divided by colons": ("csv", b"bild:satz\na.png:c\n", FIELDS, '`delimiter` ":"'),
    "divided by spaces": ("csv", b"image caption\na.png c\n", {}, '`delimiter` " "'),
    "a table without a header": ("csv", b"a.png,a cat\nb.png,a dog\n", {}, "first line holds a sample"),
    "an empty table": ("csv", b"", {}, "it is empty"),
    "a table that is JSON": ("csv", json.dumps([ROW]).encode(), {}, "JSON is read by `kind: jsonl`"),
    "a table that is JSON lines": ("csv", ROWS, {}, "JSON is read by `kind: jsonl`"),
    "a table that is HTML": ("csv", HTML, {}, "an HTML page"),
    "a table in UTF-16": ("csv", "image,caption\n".encode("utf-16"), {}, "text in UTF-16"),
    "a table of Excel": ("csv", b"PK\x03\x04\x14\x00\xff\xfe", {}, ".xlsx"),
    "JSON lines in gzip": ("jsonl", gzip.compress(ROWS, mtime=0), {}, "gzip; unpack it"),
    "JSON lines that are a table": ("jsonl", b"image,caption\na.png,c\n", {}, "a table is read by `kind: csv`"),
    "JSON lines that are Parquet": ("jsonl", b"PAR1\x15\x98\x15", {}, "a Parquet table"),
    "JSON lines that are YAML": ("jsonl", b"kind: jsonl\n", {}, "not JSON, it begins 'kind: jsonl'"),
    "one object over lines": ("jsonl", json.dumps(ROW, indent=1).encode(), {}, "one JSON object over several lines"),
    "JSON lines that are COCO's": ("jsonl", json.dumps(COCO).encode(), {}, "read by `kind: coco`"),
    "rows within an object": ("jsonl", json.dumps({"data": [ROW]}).encode(), {}, "'data' is a list of objects"),
    "a pointer to conversations": ("llava", LFS, {}, "a Git LFS pointer"),
    "empty JSON": ("coco", b"", {}, "is empty"),
    "COCO's that is HTML": ("coco", HTML, {}, "an HTML page"),
    "a field that no row has": ("jsonl", ROWS, {"fields": {"caption": "captoin"}}, "did you mean 'caption'"),
    "a key in capitals": ("jsonl", ROWS, {"Image_Folder": "."}, "did you mean 'image_folder'"),
    "a picture at an address": ("jsonl", b'{"image": "https://x.org/a.png", "caption": "c"}', {}, "nothing is fetched"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_of_another_form_is_named(tmp_path, fault):
    kind, content, options, said = FILES[fault]
    (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(IsthmusError) as error:
        open_source({"kind": kind, "file": "data.txt"} | options, data_root=tmp_path)[0]
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(HTML, "an HTML page"), (LFS, "a Git LFS pointer"), (gzip.compress(b"a", mtime=0), "gzip; unpack it")],
)
def test_a_shard_that_is_no_tar_is_named(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(IsthmusError, match=said):
        open_source({"kind": "webdataset", "shards": "a.tar"}, data_root=tmp_path)


def test_data_of_an_unknown_kind_is_named_on_the_command_line(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1\x15\x98\x15")
    with pytest.raises(IsthmusError, match="a Parquet table; save it as JSON lines"):
        guess(tmp_path / "data.parquet")


PICTURES = {
    "HTML": (HTML, "an HTML page"),
    "a pointer": (LFS, "a Git LFS pointer"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing; convert it"),
    "PDF": (b"%PDF-1.4", "a PDF document; convert it"),
    "nothing": (b"", r"empty \(0 bytes\)"),
    "a PNG cut off": (b"\x89PNG\r\n\x1a\n\x00\x00", "truncated or damaged"),
}


@pytest.mark.parametrize("fault", PICTURES)
def test_a_picture_that_is_none_is_named(tmp_path, fault):
    content, said = PICTURES[fault]
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"image": "a.jpg"}))
    record = open_source({"kind": "jsonl", "file": "rows.jsonl"}, data_root=tmp_path)[0]
    with pytest.raises(IsthmusError, match=said):
        open_image(record.images[0].source)


@pytest.mark.parametrize("name", ["pics/a.png", "A.png", "a", "a.PNG"])
def test_a_missing_picture_names_the_one_that_is_there(tmp_path, name):
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pics" / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"image": name}))
    spec = {"kind": "jsonl", "file": "rows.jsonl", "image_folder": "pics"}
    record = open_source(spec, data_root=tmp_path)[0]
    with pytest.raises(IsthmusError, match=r"missing image: .*there is .*pics/a\.png"):
        open_image(record.images[0].source)


def test_a_folder_of_another_level_is_named(tmp_path):
    place = tmp_path / "all" / "train" / "cat"
    place.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "1.png")
    (tmp_path / "none").mkdir()
    for folder, said in (
        ("all/train/cat", "name the folder above"),
        ("none", "it is empty"),
        ("all/train/cat/1.png", "is a file"),
    ):
        with pytest.raises(IsthmusError, match=said):
            open_source({"kind": "folder", "folder": folder}, data_root=tmp_path)
    with pytest.warns(IsthmusWarning, match="its folders, train, are taken for classes"):
        open_source({"kind": "folder", "folder": "all"}, data_root=tmp_path)
    for kind, key in (("jsonl", "file"), ("webdataset", "shards")):
        with pytest.raises(IsthmusError, match="is a folder; name the files in it"):
            open_source({"kind": kind, key: "all"}, data_root=tmp_path)
