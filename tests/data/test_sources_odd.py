"""Sources whose files are of an odd encoding, shape or name, and still read, or refused in clear words."""

import base64
import io
import json
import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image as PilImage

from isthmus.data.images import open_image
from isthmus.data.record import Image
from isthmus.data.sources import open_source
from isthmus.data.sources.files import Root, stems
from isthmus.data.sources.guess import guess
from isthmus.errors import ConfigError, DataError, IsthmusWarning
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


def test_the_systems_text_between_turns_is_not_moved_to_the_front(tmp_path):
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "system", "user", "assistant")]
    with pytest.raises(DataError, match="turn 3 is the system's; its text stands before all turns"):
        rows(tmp_path, {"messages": turns})[0]


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


def opened(tmp_path, **row):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    return open_source({"kind": "jsonl", "file": "rows.json"}, data_root=tmp_path)


@pytest.mark.parametrize("place", ["image", "image_url"])
def test_a_picture_within_the_text(tmp_path, place):
    """As OpenAI's files for fine-tuning hold them, one above the longest name of a file."""
    noise = io.BytesIO()
    PilImage.effect_noise((64, 64), 50).save(noise, "PNG")
    url = f"data:image/PNG;base64,{base64.b64encode(noise.getvalue()).decode()}"
    if place == "image":
        source = opened(tmp_path, image=url, caption="noise")
    else:
        shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "noise"}]
        source = opened(tmp_path, messages=turns)
    assert guess(tmp_path / "rows.json")["kind"] == "jsonl"
    (image,) = source[0].images
    assert open_image(image.source).size == (64, 64)
    assert image.content_key() == Image.key_of(noise.getvalue())
    assert len(image.source.describe()) < 60


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data:image/png;base64,@@", "a data: URL of 24 characters is not base64"),
        ("iVBORw0KGgo/" * 100, "has 1,200 characters, more than a file's name may have; a picture in base64 begins"),
        ("x" * 300, "missing image: there is no readable file"),
        ("a\\" + "x" * 300, "missing image: there is no readable file"),
        ("a\0.png", "bad image name"),
    ],
)
def test_names_that_no_file_has_are_bad_samples(tmp_path, name, words):
    source = opened(tmp_path, image=name, caption="noise")
    guess(tmp_path / "rows.json")
    with pytest.raises(DataError, match=words):
        open_image(source[0].images[0].source)
    video = opened(tmp_path, video=name, caption="noise")
    with pytest.raises(DataError):
        video[0].images[0].source.read()


def test_a_speaker_that_is_a_list_is_a_bad_sample(tmp_path):
    with pytest.raises(DataError, match="turn 1 is from"):
        opened(tmp_path, conversations=[{"from": ["human"], "value": "x"}])[0]


def test_spaces_around_a_cell_are_not_learnt(tmp_path):
    source = table(tmp_path, "image, question, answer, kind\n red.png , what is it? , a cube ,other\n")
    assert [part.text for part in source[0].texts] == ["what is it?", "a cube"]
    assert source[0].meta["answers"] == ("a cube",)
    assert source[0].images[0].source.read() == RED
    labelled = table(tmp_path, "image,label\nred.png, cat \n", templates=["a {}."])[0]
    assert (labelled.texts[0].text, labelled.meta["class"]) == ("a cat.", "cat")


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    with pytest.raises(DataError, match="has the column 'answer' 2 times"):
        table(tmp_path, "image,question,answer,answer\nred.png,what?,a,b\n")
    with pytest.raises(DataError, match="has the column 'said' 2 times"):
        table(tmp_path, "image,question,said,said\nred.png,what?,a,b\n", fields={"answer": "said"})
    assert table(tmp_path, "x,x,image,caption\n1,2,red.png,a\n")[0].texts[0].text == "a"


def test_files_called_alike_have_samples_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text('[{"text": "t", "id": 7}]')
        (tmp_path / folder / "x.csv").write_text("text,id\nt,7\n")
        (tmp_path / folder / "n.json").write_text('[{"text": "t", "id": 7}]')
        write_tar(tmp_path / folder / "x.tar", [("k.txt", b"t")])
        (tmp_path / folder / "p.jsonl").write_text(json.dumps({"texts": ["t"], "images": [None]}))
    for kind, key, name, ids in (
        ("jsonl", "file", "*/x.json", ["a/x/7", "b/x/7"]),
        ("csv", "file", "*/x.csv", ["a/x/7", "b/x/7"]),
        ("webdataset", "shards", "*/x.tar", ["a/x/k", "b/x/k"]),
        ("obelics", "file", "*/p.jsonl", ["a/p/0", "b/p/1"]),
        ("jsonl", "file", ["a/x.json", "b/n.json"], ["x/7", "n/7"]),
    ):
        more = {"min_images": 0} if kind == "obelics" else {}
        source = open_source({"kind": kind, key: name, **more}, data_root=tmp_path)
        assert [source[i].id for i in range(2)] == ids
    assert stems([Path("x.json"), Path("x.jsonl")]) == ["x (1)", "x (2)"]


def test_empty_names_of_pictures_among_others_are_counted(tmp_path):
    with pytest.warns(IsthmusWarning, match="`image` of 2 of 3 samples is empty: they are read as text alone"):
        source = table(tmp_path, "image,question,answer\nred.png,q,a\n,q,a\n  ,q,a\n")
    assert [len(source[i].images) for i in range(3)] == [1, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(tmp_path, "image,question,answer\n,q,a\n")  # text alone throughout
        opened(tmp_path, question="q", answer="a")


@pytest.mark.parametrize(
    ("options", "row", "idle"),
    [
        ({"suffix": "Shortly."}, "image,caption\nred.png,a\n", "`suffix` changes nothing: .*`questions` or `question`"),
        ({"instruction": "Say."}, "image,question,answer\nred.png,q,a\n", "`instruction` changes nothing"),
        ({"templates": "a {}"}, "image,caption\nred.png,a\n", "`templates` changes nothing: .*`label`, .* `caption`"),
        ({"classes": ["x"]}, "image,caption\nred.png,a\n", "`classes` changes nothing"),
    ],
)
def test_an_option_that_no_sample_takes_is_told(tmp_path, options, row, idle):
    with pytest.warns(IsthmusWarning, match=idle):
        table(tmp_path, row, **options)


def test_an_option_that_some_samples_take_is_not_told(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(tmp_path, "image,question,answer\nred.png,q,a\n", suffix="Shortly.")
    with pytest.raises(ConfigError, match=r"turns: single .* take max_turns out"):
        table(tmp_path, "image,question,answer\nred.png,q,a\n", turns="single", max_turns=2)


@pytest.mark.parametrize("order", [("png", "txt", "json"), ("json", "png", "txt"), ("png", "json", "txt")])
def test_a_caption_in_a_file_of_its_own_goes_before_the_fields(tmp_path, order):
    members = {"png": RED, "txt": b"in a file", "json": b'{"caption": "in the fields"}'}
    write_tar(tmp_path / "s.tar", [(f"k.{ending}", members[ending]) for ending in order])
    assert open_source({"kind": "webdataset", "shards": "s.tar"}, data_root=tmp_path)[0].texts[0].text == "in a file"


def test_what_is_wrong_is_said_of_the_right_field(tmp_path):
    with pytest.raises(DataError, match="the picture's name should be a text and is missing"):
        opened(tmp_path, image=float("nan"), caption="a")[0]
    (tmp_path / "side.json").write_text('[{"key": "red", "more": {"x": 1}}]')
    with pytest.raises(DataError, match=r"side\.json: the captions of 'red': bad field"):
        table(tmp_path, "image,caption\nred.png,a\n", captions={"file": "side.json", "key": "key", "fields": "more"})


def test_the_developers_words_are_the_systems(tmp_path):
    turns = [("developer", "Be brief."), ("user", "what?"), ("assistant", "a")]
    record = opened(tmp_path, messages=[{"role": role, "content": text} for role, text in turns])[0]
    assert [part.role for part in record.parts] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"img": "a.PNG", "question": "q", "answer": "a"}, r"`img` seems to \('a.PNG'\).* `fields: \{image: img\}`"),
        ({"videos": ["a.mp4"], "text": "t"}, r"`fields: \{video: videos\}`"),
    ],
)
def test_a_field_of_pictures_that_nothing_reads_is_told(tmp_path, row, hint):
    with pytest.warns(IsthmusWarning, match=hint):
        opened(tmp_path, **row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path, **row, image="red.png")
        opened(tmp_path, question="is it a.png", answer="b.png", other=["x"])


def test_a_mark_of_a_clip_is_told(tmp_path):
    turns = [{"from": "human", "value": "<video> what?"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(DataError, match="the place of a clip is <image> here"):
        opened(tmp_path, video="clip", conversations=turns)[0]


@pytest.mark.parametrize(("there", "said"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_form_of_unicode_are_found(tmp_path, there, said):
    """As macOS writes the one and Linux the other; they look the same."""
    name, other = (unicodedata.normalize(form, "grö\u00dfe é.png") for form in (there, said))
    (tmp_path / name).write_bytes(RED)
    assert opened(tmp_path, image=other, caption="a")[0].images[0].source.read() == RED
    assert guess(tmp_path / "rows.json")["kind"] == "jsonl"
    write_tar(tmp_path / "s.tar", [(name, BLUE)])
    (tmp_path / "rows.json").write_text(json.dumps([{"image": other, "caption": "a"}]))
    source = open_source({"kind": "jsonl", "file": "rows.json", "images": "s.tar"}, data_root=tmp_path)
    assert source[0].images[0].source.read() == BLUE
