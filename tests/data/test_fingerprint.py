"""Fingerprints: any change of the data that is looked at shows, and a fresh copy of the same data does not."""

import json
import os
import shutil

import pytest

from isthmus.data.fingerprint import SAMPLES, fingerprint
from isthmus.data.mix import Source
from isthmus.data.record import Record, Text
from isthmus.data.sources import open_source

from .helpers import png, write_tar


def listed(folder):
    """A JSON of questions with pictures, shards, and one folder of pictures per class, each as a description."""
    folder.mkdir()
    for name in ("images", "classes/cat", "classes/dog"):
        (folder / name).mkdir(parents=True)
    rows = [{"id": i, "image": f"{i}.png", "question": "what?", "answer": f"thing {i}"} for i in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "side.jsonl").write_text("".join(json.dumps({"key": str(i), "more": f"a {i}"}) + "\n" for i in range(6)))
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(png((i, 0, 0)))
        (folder / "classes" / ("cat" if i % 2 else "dog") / f"{i}.png").write_bytes(png((0, i, 0)))
    members = [(f"{i}.{end}", data) for i in range(6) for end, data in (("png", png((i, 9, 0))), ("txt", b"red"))]
    write_tar(folder / "a.tar", members)
    return folder


def sources(folder):
    return {
        "rows": {"kind": "jsonl", "file": "rows.json", "image_folder": "images"},
        "shards": {"kind": "webdataset", "shards": "a.tar"},
        "joined": {
            "kind": "webdataset",
            "shards": "a.tar",
            "captions": {"file": "side.jsonl", "key": "key", "fields": "more"},
        },
        "classes": {"kind": "folder", "folder": "classes"},
    }


def prints(folder):
    return {name: fingerprint(open_source(spec, data_root=folder)) for name, spec in sources(folder).items()}


def test_a_copy_with_other_times_has_the_same_fingerprints(tmp_path):
    first = listed(tmp_path / "here")
    shutil.copytree(first, tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        os.utime(path, (1, 1))
    assert prints(first) == prints(tmp_path / "there")
    assert all(told.startswith("6 samples, sha256 ") for told in prints(first).values())


@pytest.mark.parametrize(
    ("changed", "hit"),
    [
        (lambda f: (f / "images" / "3.png").write_bytes(png((200, 0, 0))), {"rows"}),
        (lambda f: (f / "images" / "3.png").unlink(), {"rows"}),
        (lambda f: (f / "rows.json").write_text((f / "rows.json").read_text().replace("thing 4", "thing 9")), {"rows"}),
        (lambda f: (f / "side.jsonl").write_text((f / "side.jsonl").read_text().replace("a 5", "a 7")), {"joined"}),
        (lambda f: (f / "classes" / "cat" / "1.png").rename(f / "classes" / "dog" / "1.png"), {"classes"}),
        (
            lambda f: (f / "a.tar").write_bytes((f / "a.tar").read_bytes().replace(b"red", b"tan", 1)),
            {"shards", "joined"},
        ),
    ],
)
def test_a_change_shows_in_the_sources_that_read_it(tmp_path, changed, hit):
    folder = listed(tmp_path / "data")
    before = prints(folder)
    changed(folder)
    after = prints(folder)
    assert {name for name in before if before[name] != after[name]} == hit


def test_rows_in_memory_count_however_many_there_are(tmp_path):
    rows = [{"text": f"line {i}"} for i in range(3 * SAMPLES + 1)]
    file = tmp_path / "lines.jsonl"

    def told():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return fingerprint(open_source({"kind": "jsonl", "file": str(file)}))

    before = told()
    rows[2]["text"] = "line x"  # not one of the evenly spread samples
    assert told() != before


def test_annotations_and_pages_count_beyond_the_samples_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.data.fingerprint.SAMPLES", 1)  # the first alone
    questions = [{"image_id": i, "question": f"what {i}?", "question_id": i} for i in range(3)]
    answers = [{"question_id": i, "answers": [{"answer": f"thing {i}"}]} for i in range(3)]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    problems = {str(i): {"question": f"why {i}?", "choices": ["a", "b"], "answer": 0} for i in range(3)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "splits.json").write_text(json.dumps({"test": ["0", "1", "2"]}))
    pages = [{"texts": [f"line {i}", None], "images": [None, f"{i}.png"]} for i in range(3)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    specs = {
        "vqav2": {"questions": "q.json", "annotations": "a.json"},
        "scienceqa": {"problems": "problems.json", "splits": "splits.json", "split": "test"},
        "obelics": {"file": "pages.jsonl"},
    }

    def told():
        return {
            kind: fingerprint(open_source({"kind": kind} | more, data_root=tmp_path)) for kind, more in specs.items()
        }

    before = told()
    for file, old, hit in (
        ("q.json", "what 2", "vqav2"),
        ("a.json", "thing 2", "vqav2"),
        ("problems.json", "why 2", "scienceqa"),
        ("pages.jsonl", "line 2", "obelics"),
    ):
        whole = (tmp_path / file).read_text()
        (tmp_path / file).write_text(whole.replace(old, "another"))
        assert {kind for kind, new in told().items() if new != before[kind]} == {hit}
        (tmp_path / file).write_text(whole)
    assert told() == before


def test_any_source_has_one_and_scenes_have_their_parameters_in_it():
    class Mine(Source):
        name = "mine"

        def __init__(self, words):
            self.words = words

        def __len__(self):
            return len(self.words)

        def __getitem__(self, index):
            return Record(str(index), (Text(self.words[index]),))

    assert fingerprint(Mine(["a", "b"])) == fingerprint(Mine(["a", "b"])) != fingerprint(Mine(["a", "c"]))
    scenes = {"kind": "scenes", "form": "captions", "count": 1000}
    told = [fingerprint(open_source(scenes | extra)) for extra in ({}, {}, {"seed": 1}, {"size": 80}, {"count": 999})]
    assert told[0] == told[1]
    assert len(set(told)) == 4
