"""Scenes written for other tools read back as they were."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.data.images import open_image
from isthmus.data.record import Text
from isthmus.data.sources import open_source
from isthmus.demo.scenes import SceneSource, export
from isthmus.demo.scenes.source import Form
from isthmus.errors import ConfigError, DataError
from tests.narrow import there


def _same_picture(data, record):
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == record.images[0].source.read().tobytes()


def test_llava(tmp_path):
    folder = export(tmp_path / "out", format="llava", count=5, seed=3)
    items = json.loads((folder / "scenes.json").read_text())
    source = SceneSource("conversations", count=5, seed=3)
    assert len(items) == 5
    for item, record in zip(items, (source[i] for i in range(5)), strict=True):
        _same_picture((folder / "images" / item["image"]).read_bytes(), record)
        assert item["conversations"][0]["value"] == f"<image>\n{record.texts[0].text}"
        assert [t["from"] for t in item["conversations"][:2]] == ["human", "gpt"]
        assert [t["value"] for t in item["conversations"][1:]] == [t.text for t in record.texts[1:]]


def test_webdataset(tmp_path):
    folder = export(tmp_path / "out", format="webdataset", split="test", count=3)
    source = SceneSource("captions", split="test", count=3)
    with tarfile.open(folder / "00000.tar") as tar:
        files = {m.name: there(tar.extractfile(m)).read() for m in tar}
    assert len(files) == 9
    for i in range(3):
        _same_picture(files[f"{i:06d}.png"], source[i])
        texts = source[i].texts[0].text
        assert files[f"{i:06d}.txt"].decode() == texts[0]
        assert json.loads(files[f"{i:06d}.json"])["captions"] == list(texts)


def test_coco(tmp_path):
    folder = export(tmp_path / "out", format="coco", count=3)
    facts = json.loads((folder / "captions.json").read_text())
    assert [i["file_name"] for i in facts["images"]] == ["000000.png", "000001.png", "000002.png"]
    source = SceneSource("captions", count=3)
    for i in range(3):
        told = [a["caption"] for a in facts["annotations"] if a["image_id"] == i]
        assert told == list(source[i].texts[0].text)


def _told(record):
    """What a record says and shows, without ids and places; an alternative that comes twice is told once."""
    return [
        (part.role, part.text if isinstance(part.text, str) else tuple(dict.fromkeys(part.text)), part.learn)
        if isinstance(part, Text)
        else (part.role, open_image(part.source).tobytes())
        for part in record.parts
    ]


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["train", "dev", "test"]), st.integers(1, 4))
def test_what_was_written_comes_back_through_the_sources(seed, split, count):
    with tempfile.TemporaryDirectory() as place:
        layouts: list[tuple[str, Form, dict[str, str | dict[str, str]]]] = [
            ("llava", "conversations", {"kind": "llava", "file": "scenes.json", "image_folder": "images"}),
            ("webdataset", "captions", {"kind": "webdataset", "shards": "*.tar", "fields": {"caption": "captions"}}),
            ("coco", "captions", {"kind": "coco", "file": "captions.json", "image_folder": "images"}),
        ]
        for layout, form, spec in layouts:
            folder = export(Path(place) / layout, format=layout, split=split, count=count, seed=seed)
            found = open_source(spec, data_root=folder)
            made = SceneSource(form, split=split, count=count, seed=seed)
            assert len(found) == count
            for i in range(count):
                assert _told(found[i]) == _told(made[i])


def test_refusals_leave_nothing_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        export(tmp_path / "full")
    with pytest.raises(ConfigError, match="webdataset"):
        export(tmp_path / "new", format="webdatasets")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine").read_text() == "keep"
