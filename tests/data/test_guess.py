"""A file's kind is seen from its content."""

import json
from pathlib import Path

import pytest

from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.data.sources.guess import guess
from isthmus.demo.scenes.export import export
from isthmus.errors import DataError
from tests.data.helpers import png


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", [{"conversations": []}], "llava"),
        ("b.json", {"images": [], "annotations": []}, "coco"),
        ("c.json", [{"question": "x"}], "jsonl"),
    ],
)
def test_json(tmp_path, name, content, kind):
    (tmp_path / name).write_text(json.dumps(content))
    assert guess(tmp_path / name) == {"kind": kind, "file": str(tmp_path / name)}


def test_other_files_and_folders(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"conversations": []}\n{"half')
    assert guess(tmp_path / "d.jsonl")["kind"] == "llava"
    (tmp_path / "e.csv").write_text("filepath,title\n")
    assert guess(tmp_path / "e.csv")["kind"] == "csv"
    for name in ("cat", "dog"):
        picture(tmp_path / "classes" / name / "a.png")
    assert guess(tmp_path / "classes")["kind"] == "folder"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.tar").touch()
    assert guess(tmp_path / "shards")["kind"] == "webdataset"


@pytest.mark.parametrize(("name", "content"), [("x.json", "{"), ("y.json", "3"), ("z.jsonl", "")])
def test_what_is_not_known_says_what_to_do(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="Describe it in a YAML file"):
        guess(tmp_path / name)
    with pytest.raises(DataError, match="no data at"):
        guess(tmp_path / "missing.json")
    with pytest.raises(DataError, match=r"no data at \{kind: scenes\}\. A description .* ends in \.yaml"):
        guess(Path("{kind: scenes}"))


def test_endings_in_capitals_and_lines_that_are_empty(tmp_path):
    picture(tmp_path / "a.png")
    for name, content in (
        ("A.CSV", "image,caption\na.png,red\n"),
        ("B.JSONL", '\n\n{"image": "a.png", "caption": "red"}'),
    ):
        (tmp_path / name).write_text(content)
        for place in (tmp_path / name, tmp_path):  # as a file, and as the only list of its folder
            assert open_source(guess(place))[0].texts[0].text == "red"
        (tmp_path / name).unlink()
    (tmp_path / "X.TAR").touch()
    assert guess(tmp_path) == {"kind": "webdataset", "shards": [str(tmp_path / "X.TAR")]}


@pytest.mark.parametrize(
    ("files", "start", "what"),
    [
        (
            ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"],
            b"\xff\xff\xff\xff\x10\x04",
            "an Arrow table",
        ),
        (["dataset_dict.json", "train/dataset_info.json", "train/data-0.arrow"], b"\xff\xff\xff\xff", "an Arrow table"),
        (["README.md", "data/train-00000-of-00001.parquet"], b"PAR1", "a Parquet table"),
    ],
)
def test_data_sets_of_hugging_face_are_named_with_what_to_do(tmp_path, files, start, what):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}" if name.endswith("json") else start)
    with pytest.raises(DataError, match=f"{files[-1]} is no list that is read here, but {what}.* save it as JSON"):
        guess(tmp_path)


def test_json_lines_that_end_in_json(tmp_path):
    """As POPE's files do; a line that is wrong is named when the source is opened."""
    row = '{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}\n'
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\ufeff" + row + row.replace("1", "2"), encoding="utf-8")
    assert len(open_source(guess(path))) == 2
    path.write_text(row + '{"question_id": 2,\n')
    assert guess(path)["kind"] == "pope"
    with pytest.raises(DataError, match=r"coco_pope_random\.json, line 2: not valid JSON"):
        open_source(guess(path))


def test_deep_nesting_is_said_in_words(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="Describe it in a YAML file"):
        guess(tmp_path / "deep.json")


@pytest.mark.parametrize("format", ["llava", "coco", "webdataset"])
def test_what_the_program_writes_is_read_as_a_folder_and_by_its_file(tmp_path, format):
    folder = export(tmp_path / "scenes", format=format, count=4)
    source = open_source(guess(folder))
    assert len(source) == 4
    assert open_image(source[1].images[0].source).size == (64, 64)
    for file in folder.glob("*.json"):
        assert open_image(open_source(guess(file))[1].images[0].source).size == (64, 64)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png((255, 0, 0)))


def test_a_folder_of_pictures_with_a_list_of_their_texts(tmp_path):
    """As Hugging Face's imagefolder has it."""
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,red\n")
    record = open_source(guess(tmp_path))[0]
    assert (record.texts[0].text, open_image(record.images[0].source).size) == ("red", (6, 6))


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a.png"], "conversations": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
    ],
)
def test_the_folder_of_pictures_is_found_however_an_entry_names_them(tmp_path, row):
    picture(tmp_path / "pics" / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert guess(tmp_path)["image_folder"] == str(tmp_path / "pics")


def test_what_capfilt_writes_is_read_as_a_folder(tmp_path):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": ["red", "a square"]}')
    (tmp_path / "report.json").write_text('{"pictures": 1}')
    assert open_source(guess(tmp_path))[0].texts[0].text == ("red", "a square")


def test_a_list_beside_folders_of_classes_that_is_not_about_pictures(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / name / "a.png")
    for name, content in (("names.csv", "label,name\n0,cat\n"), ("log.jsonl", '{"image": "gone.png", "caption": "x"}')):
        (tmp_path / name).write_text(content)
        assert guess(tmp_path) == {"kind": "folder", "folder": str(tmp_path)}
        (tmp_path / name).unlink()


def test_pictures_that_could_be_in_two_folders_are_not_guessed(tmp_path):
    for name in ("small", "large"):
        picture(tmp_path / name / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": []}]))
    assert guess(tmp_path) == {"kind": "llava", "file": str(tmp_path / "d.json")}


@pytest.mark.parametrize(
    "files",
    [
        ["train.json", "val.json", "images/a.png"],  # two lists
        ["data.jsonl", "images/a.png"],  # one whose field of pictures is not known
        ["images/a.png"],
        ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png"],  # splits, not classes
        ["cat/a.png", "dog/a.png", "test/cat/a.png"],
    ],
)
def test_what_could_be_two_things_is_not_guessed(tmp_path, files):
    for name in files:
        picture(tmp_path / name)
        if not name.endswith("png"):
            (tmp_path / name).write_text('{"img": "a.png", "caption": "a cat"}\n')
    with pytest.raises(DataError, match="Describe it in a YAML file"):
        guess(tmp_path)
