"""Sources whose files are of an odd encoding, shape or name, and still read, or refused in clear words."""

import json

import pytest

from isthmus.data.images import open_image
from isthmus.data.sources import open_source
from isthmus.data.sources.files import Root
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import pixel, png, write_tar

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def table(tmp_path, content, **options):
    (tmp_path / "pairs.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "red.png").write_bytes(RED)
    return open_source({"kind": "csv", "file": "pairs.csv", **options}, data_root=tmp_path)


@pytest.mark.parametrize("content", ["image,caption\nred.png,é\n".encode("latin-1"), b"image,caption\xe9\nred.png,a\n"])
def test_a_table_that_is_not_utf8(tmp_path, content):
    with pytest.raises(DataError, match=r"pairs\.csv is not UTF-8 text"):
        table(tmp_path, content)


def test_class_names_that_are_not_utf8(tmp_path):
    (tmp_path / "names.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"names\.txt is not UTF-8 text"):
        table(tmp_path, "image,label\nred.png,0\n", classes="names.txt")


def test_a_field_too_long_names_the_line(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.csv, line 3: not a valid table: field larger"):
        table(tmp_path, "image,caption\nred.png,a\nred.png," + "x" * 131_073 + "\n")


@pytest.mark.parametrize("delimiter", ["||", "\\t", "\n", '"'])
def test_a_delimiter_is_one_character(tmp_path, delimiter):
    with pytest.raises(ConfigError, match="delimiter must be one character"):
        table(tmp_path, "image||caption\nred.png||a\n", delimiter=delimiter)


def test_templates_keep_their_other_braces(tmp_path):
    source = table(tmp_path, "image,label\nred.png,cat\n", templates=["a {x} {}", "{0} {} {"])
    assert source[0].texts[0].text == ("a {x} cat", "{0} cat {")


@pytest.mark.parametrize(
    ("label", "classes", "name", "number"),
    [("0", ["cat", "dog"], "cat", 0), (" 1", ["cat", "dog"], "dog", 1), ("0", ["1", "0"], "0", 1)],
)
def test_class_numbers_in_a_table(tmp_path, label, classes, name, number):
    record = table(tmp_path, f"image,label\nred.png,{label}\n", classes=classes)[0]
    assert (record.meta["class"], record.meta["label"]) == (name, number)


@pytest.mark.parametrize("label", ["2", "-1", "x", "9" * 5000])
def test_class_numbers_in_a_table_that_are_none(tmp_path, label):
    source = table(tmp_path, f"image,label\nred.png,{label}\n", classes=["cat", "dog"])
    with pytest.raises(DataError, match=r"bad label: .* is not one of the 2 class numbers"):
        source[0]


@pytest.mark.parametrize("member", ["a/red.png", "./a/red.png"])
@pytest.mark.parametrize("name", ["a/red.png", "./a/red.png"])
def test_members_of_a_tar_of_the_folder_itself(tmp_path, member, name):
    write_tar(tmp_path / "pictures.tar", [(member, RED)])
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name, "caption": "c"}]))
    source = open_source({"kind": "jsonl", "file": "rows.json", "images": "pictures.tar"}, data_root=tmp_path)
    assert open_image(source[0].images[0].source).getpixel((1, 1)) == (255, 0, 0)


def test_names_with_brackets(tmp_path):
    folder = tmp_path / "set [old]"
    folder.mkdir()
    for name in ("a [1].json", "b{1,2}.json", "s1.tar", "s2.tar"):
        (folder / name).touch()
    root = Root(folder)
    assert root.files("a [1].json") == [folder / "a [1].json"]
    assert root.files("b{1,2}.json") == [folder / "b{1,2}.json"]
    assert root.files("*.tar") == root.files("s{1..2}.tar") == root.files("s[12].tar")
    assert root.files("*.tar") == [folder / "s1.tar", folder / "s2.tar"]
    assert Root(tmp_path).files(str(folder / "a [1].json")) == [folder / "a [1].json"]
    with pytest.raises(DataError, match="no such file"):
        root.files("c [1].json")


@pytest.mark.parametrize(
    ("ending", "text"), [("txt", b"a"), ("cls", b"1"), ("json", b'{"question": "q", "answer": "a"}')]
)
def test_keys_cut_at_a_dot_do_not_merge_samples(tmp_path, ending, text):
    write_tar(
        tmp_path / "s.tar",
        [("v1.0_a.png", RED), (f"v1.0_a.{ending}", text), ("v1.0_b.png", BLUE), (f"v1.0_b.{ending}", text)],
    )
    source = open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)
    with pytest.raises(DataError, match=r"'v1.0_a.png' and 'v1.0_b.png' are one sample, 'v1', .* first dot"):
        source[0]


def test_a_question_may_have_several_pictures(tmp_path):
    sample = json.dumps({"question": "which is red?", "answer": "the left"}).encode()
    write_tar(tmp_path / "s.tar", [("k.left.png", RED), ("k.right.png", BLUE), ("k.json", sample)])
    source = open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)
    assert len(source[0].images) == 2


def rows(tmp_path, *values, **options):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in values), encoding="utf-8")
    return open_source({"kind": "jsonl", "file": "rows.jsonl", **options}, data_root=tmp_path)


def test_a_mark_in_a_question_is_the_place_of_a_picture(tmp_path):
    both = ["red.png", "blue.png"]
    source = rows(
        tmp_path,
        {"image": "red.png", "question": "<image>\nwhat?", "answer": "red"},
        {"image": both, "question": "is <image> as dark as <image>?", "answer": "no"},
        {"image": "red.png", "question": "<image> or <image>?", "answer": "no"},
        {"image": both, "questions": [["<image> what?", "red"], ["and <image>", "blue"]]},
    )
    told = [[getattr(part, "text", "[]") for part in source[i].parts] for i in (0, 1, 3)]
    assert told[0] == ["[]", "what?", "red"]
    assert told[1] == ["is ", "[]", " as dark as ", "[]", "?", "no"]
    assert told[2] == ["[]", "what?", "red", "and", "[]", "blue"]
    assert source[1].meta["answers"] == ("no",)
    with pytest.raises(DataError, match="has 2 <image> and the sample 1 pictures"):
        source[2]


def test_a_hole_of_a_table_is_no_answer(tmp_path):
    source = rows(
        tmp_path,
        {"image": "red.png", "question": "what?", "answer": float("nan")},
        {"image": "red.png", "question": float("nan"), "answer": "red"},
    )
    with pytest.raises(DataError, match="empty answer"):
        source[0]
    with pytest.raises(DataError, match="question should be a text and is missing"):
        source[1]


def test_a_null_caption_leaves_that_of_the_text_file(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.txt", b"red"), ("0.json", b'{"caption": null, "n": 1}'), ("0.png", RED)])
    source = open_source({"kind": "webdataset", "shards": "a.tar"}, data_root=tmp_path)
    assert source[0].texts[0].text == "red"


def test_hidden_files_are_no_pictures(tmp_path):
    (tmp_path / "red").mkdir()
    for name in ("a.png", "._a.png"):
        (tmp_path / "red" / name).write_bytes(RED)
    assert len(open_source({"kind": "folder", "folder": "."}, data_root=tmp_path)) == 1


def test_a_table_whose_quotation_mark_stays_open_names_the_line(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.csv, line \d: not a valid table: .*quotation mark left open"):
        table(tmp_path, 'image,caption\nred.png,"a dog\nred.png,a cat\n')


def test_a_row_of_more_cells_than_columns_is_a_bad_sample(tmp_path):
    source = table(tmp_path, "image,caption\nred.png,a dog, running\nred.png,a cat\n")
    with pytest.raises(DataError, match=r"row 1 has more cells than the header has columns, ' running' the first"):
        source[0]
    assert source[1].texts[0].text == "a cat"


def colours(record):
    return [pixel(open_image(image.source), (1, 1)) for image in record.images]


@pytest.mark.parametrize("names", [["b.png", "a.png"], ["k.b.png", "k.a"], None])
def test_pictures_of_a_tar_come_as_the_sample_lists_them(tmp_path, names):
    sample = {"question": "<image> or <image>?", "answer": "the first"} | ({"images": names} if names else {})
    members = [("k.a.png", RED), ("k.b.png", BLUE), ("k.json", json.dumps(sample).encode())]
    write_tar(tmp_path / "s.tar", members)
    found = colours(open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)[0])
    assert found == ([(0, 0, 255), (255, 0, 0)] if names else [(255, 0, 0), (0, 0, 255)])


def test_pictures_of_a_tar_without_a_list_come_in_natural_order(tmp_path):
    names = sorted(f"k.{n}.png" for n in range(11))
    sample = json.dumps({"question": "which?", "answer": "none"}).encode()
    members = [(name, png((int(name.split(".")[1]), 0, 0))) for name in names]
    write_tar(tmp_path / "s.tar", [*members, ("k.json", sample)])
    record = open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)[0]
    assert [red for red, _, _ in colours(record)] == list(range(11))


def test_a_picture_that_a_sample_lists_and_the_tar_lacks(tmp_path):
    sample = json.dumps({"images": ["a.png", "c.png"], "question": "<image><image>?", "answer": "x"}).encode()
    write_tar(tmp_path / "s.tar", [("k.a.png", RED), ("k.b.png", BLUE), ("k.json", sample)])
    with pytest.raises(DataError, match=r"lists 'c\.png', and none of its pictures in the tar"):
        open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)[0]


def test_pictures_of_unknown_formats_are_bad_samples(tmp_path):
    sample = json.dumps({"question": "what?", "answer": "x"}).encode()
    write_tar(tmp_path / "s.tar", [("k.tif", b"II*\0"), ("k.json", sample), ("l.mp4", b"x"), ("l.json", sample)])
    source = open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)
    with pytest.raises(DataError, match="not a picture of the formats"):
        open_image(source[0].images[0].source)
    with pytest.raises(DataError, match=r"bad video: .*l\.mp4 is in a tar"):
        source[1]
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "a.tif").write_bytes(b"II*\0")
    assert len(open_source({"kind": "folder", "folder": "classes"}, data_root=tmp_path)) == 1


def test_a_mapped_field_that_no_row_has_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no field 'imgpath'; did you mean 'img_path'"):
        rows(tmp_path, {"img_path": "red.png", "question": "q", "answer": "a"}, fields={"image": "imgpath"})


def test_a_picture_that_is_an_object(tmp_path):
    asked = {"question": "q", "answer": "a"}
    source = rows(tmp_path, {"image": {"file_name": "red.png"}} | asked, {"image": {"name": "red.png"}} | asked)
    assert colours(source[0]) == [(255, 0, 0)]
    with pytest.raises(DataError, match=r"bad field: a picture is .*'name'.*; its name is expected under path, image"):
        source[1]


def test_pictures_in_turns_as_openai_writes_them(tmp_path):
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "blue.png"}}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    assert colours(rows(tmp_path, {"messages": turns})[0]) == [(0, 0, 255)]


@pytest.mark.parametrize("speakers", [["human", "human", "gpt"], ["human", "gpt", "gpt"]])
def test_two_turns_of_one_speaker_are_not_glued(tmp_path, speakers):
    turns = [{"from": speaker, "value": f"says {n}."} for n, speaker in enumerate(speakers)]
    with pytest.raises(DataError, match=rf"turns \d and \d are both from '{speakers[1]}'; join them"):
        rows(tmp_path, {"conversations": turns})[0]


@pytest.mark.parametrize("image_name", ["{image_id}.jpg", "{}.jpg", "{id:06d}.jpg"])
def test_a_name_of_pictures_that_cannot_be_filled_in(tmp_path, image_name):
    content = {"1": {"question": "q", "answer": "a", "imageId": "n12"}}
    (tmp_path / "gqa.json").write_text(json.dumps(content))
    source = open_source({"kind": "gqa", "file": "gqa.json", "image_name": image_name}, data_root=tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be filled in .*; it may hold \{id\}, here 'n12'"):
        source[0]


def test_a_part_of_another_type_is_a_bad_sample(tmp_path):
    turns = [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}, {"role": "assistant", "content": "no"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns}]))
    source = open_source({"kind": "jsonl", "file": "rows.json"}, data_root=tmp_path)
    with pytest.raises(DataError, match="of type 'audio'; it must be text, image or image_url"):
        source[0]
