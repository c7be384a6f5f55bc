"""What a file is by its first bytes, and the file that almost has the name of one that is not there."""

import gzip

import pytest

from isthmus.file_type import but_is, file_type, near


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\n <!DOCTYPE html><html>", "HTML"),
        (b"\xef\xbb\xbf<html lang=en>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (gzip.compress(b"text", mtime=0), "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"\xff\xff\xff\xff\x80\x01", "Arrow"),
        ("a,b".encode("utf-16"), "UTF-16"),
        (b"\x00\x00\x00\x1cftypheic", "HEIC"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
    ],
)
def test_what_a_file_is_that_begins_so(start, what):
    found = file_type(start)
    assert found is not None
    assert what in found.what
    assert but_is(start, "copy it") == f", but {found.what}; {found.advice or 'name another file'}"


@pytest.mark.parametrize("start", [b"", b"image,caption\n", b"[1]", b"key: value", b"\x93\xfe"])
def test_a_beginning_that_tells_nothing(start):
    assert file_type(start) is None
    assert but_is(start, "copy it") == "; copy it"


def test_the_file_under_almost_that_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cat.png").touch()
    for name in ("a/cat.PNG", "a/Cat.png", "a/a/cat.png", "a/cat"):
        assert near(tmp_path / name, ("jpg", "png")) == f"; there is {tmp_path / 'a' / 'cat.png'}"
    assert near(tmp_path / "a" / "dog.png") == ""
    assert near(tmp_path / "b" / "dog.png") == f"; there is no folder {tmp_path / 'b'}"
