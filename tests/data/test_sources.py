"""Sources on tiny files made here: every kind, every damage."""

import json
import tarfile

import pytest

from isthmus.data.images import open_image
from isthmus.data.record import Image, Text
from isthmus.data.sources import SOURCES, open_mix, open_source
from isthmus.data.sources.annotations import READERS
from isthmus.data.sources.benchmarks import BENCHMARKS
from isthmus.data.sources.files import Root, safe_name
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import png, write_tar

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def said(record):
    return [(p.role, p.text) if isinstance(p, Text) else (p.role, "<image>") for p in record.parts]


def colour(image):
    return open_image(image.source).getpixel((1, 1))


def llava(tmp_path, *samples, **options):
    write(tmp_path / "data.json", list(samples))
    return open_source({"kind": "llava", "file": "data.json", **options}, data_root=tmp_path)


def talk(*values):
    return [{"from": "gpt" if n % 2 else "human", "value": v} for n, v in enumerate(values)]


# LLaVA

LEAD = {"from": "gpt", "value": "dropped"}


def test_llava_conversations(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/red.png").write_bytes(RED)
    (tmp_path / "pictures/blue.png").write_bytes(BLUE)
    source = llava(
        tmp_path,
        {"id": 7, "image": "red.png", "conversations": talk("<image>\nwhat?", "red", "sure?", "yes")},
        {"id": "b", "image": ["red.png", "blue.png"], "conversations": talk("<image> or <image>\n which? ", "blue")},
        {"id": "c", "conversations": talk("hello", "hi"), "model": "x"},
        {"id": "d", "image": "red.png", "conversations": [LEAD, *talk("q\n<image>", "a")]},
        image_folder="pictures",
    )
    assert len(source) == 4
    first, both, blind, lead = source[0], source[1], source[2], source[3]
    assert first.id == "data/7"
    assert said(first) == [
        ("user", "<image>"),
        ("user", "what?"),
        ("assistant", "red"),
        ("user", "sure?"),
        ("assistant", "yes"),
    ]
    assert [p.learn for p in first.texts] == [False, True, False, True]
    assert said(both) == [
        ("user", "<image>"),
        ("user", "or "),
        ("user", "<image>"),
        ("user", "\n which?"),
        ("assistant", "blue"),
    ]
    assert [colour(i) for i in both.images] == [(255, 0, 0), (0, 0, 255)]
    assert said(blind) == [("user", "hello"), ("assistant", "hi")]
    assert said(lead) == [("user", "q"), ("user", "<image>"), ("assistant", "a")]


def test_llava_json_lines_messages_and_tars(tmp_path):
    write_tar(tmp_path / "a.tar", [("x/red.png", RED)])
    write_tar(tmp_path / "b.tar", [("blue.png", BLUE)])
    rows = [
        {"image": "x/red.png", "conversations": talk("<image>q", "a")},
        {
            "image": ["blue.png"],
            "messages": [
                {"role": role, "content": c}
                for role, c in (("system", "s"), ("user", "<image>"), ("assistant", "blue"))
            ],
        },
        {"image": "none.png", "conversations": talk("<image>q", "a")},
    ]
    write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source({"kind": "llava", "file": "data.jsonl", "images": "{a,b}.tar"}, data_root=tmp_path)
    assert [colour(source[n].images[0]) for n in range(2)] == [(255, 0, 0), (0, 0, 255)]
    assert said(source[1]) == [("system", "s"), ("user", "<image>"), ("assistant", "blue")]
    with pytest.raises(DataError, match=r"missing image: no shard holds 'none\.png'"):
        source[2]
    write_tar(tmp_path / "c.tar", [("blue.png", BLUE)])
    with pytest.raises(DataError, match=r"holds 'blue\.png' and so does"):
        open_source({"kind": "llava", "file": "data.jsonl", "images": "?.tar"}, data_root=tmp_path)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"image": "a.png", "conversations": talk("<image><image>", "a")}, "2 <image> and the sample 1 pictures"),
        ({"image": "a.png", "conversations": talk("q", "a")}, "0 <image> and the sample 1 pictures"),
        ({"conversations": talk("<image>", "a")}, "1 <image> and the sample 0 pictures"),
        ({"image": "../a.png", "conversations": talk("<image>", "a")}, "leaves the image folder"),
        ({"image": "/etc/a.png", "conversations": talk("<image>", "a")}, "leaves the image folder"),
        ({"conversations": [{"from": "humman", "value": "q"}]}, "did you mean 'human'"),
        ({"conversations": "q"}, "must be a list of turns"),
        ({"conversations": [{"from": "human", "value": ["q"]}]}, "should be a text and is list"),
        ({"other": 1}, "no text: of the fields"),
    ],
)
def test_llava_samples_that_are_bad(tmp_path, sample, words):
    source = llava(tmp_path, sample)
    with pytest.raises(DataError, match=words):
        source[0]


def test_a_missing_picture_shows_when_it_is_read(tmp_path):
    record = llava(tmp_path, {"image": "gone.png", "conversations": talk("<image>", "a")})[0]
    with pytest.raises(DataError, match=r"missing image: .*gone\.png"):
        record.images[0].source.read()


# WebDataset


def shards(tmp_path, **options):
    write_tar(
        tmp_path / "s-000.tar",
        [
            ("k1.png", RED),
            ("k1.json", b'{"qa": [["what?", "red"], ["sure?", true]]}'),
            ("d/k2.PNG", BLUE),
            ("d/k2.json", b'{"qa": [["how many?", 3]]}'),
        ],
    )
    write_tar(tmp_path / "s-001.tar", [("k1.png", BLUE), ("k1.json", b'{"qa": []}'), ("k1.note.md", b"ignored")])
    return open_source(
        {"kind": "webdataset", "shards": "s-{000..001}.tar", "fields": {"questions": "qa"}, **options},
        data_root=tmp_path,
    )


def test_question_lists_as_conversations(tmp_path):
    source = shards(tmp_path, suffix="One word.")
    assert [source[n].id for n in range(2)] == ["s-000/k1", "s-000/d/k2"]
    assert said(source[0]) == [
        ("user", "<image>"),
        ("user", "what?\nOne word."),
        ("assistant", "red"),
        ("user", "sure?\nOne word."),
        ("assistant", "true"),
    ]
    assert source[0].meta["answers"] == ("true",)
    assert colour(source[1].images[0]) == (0, 0, 255)
    with pytest.raises(DataError, match="list of questions is empty"):
        source[2]
    assert source.name == "webdataset:s-{000..001}"


def test_question_lists_one_by_one_or_in_pieces(tmp_path):
    single = shards(tmp_path, turns="single")
    assert [single[n].id for n in range(3)] == ["s-000/k1#0", "s-000/k1#1", "s-000/d/k2#0"]
    assert said(single[1]) == [("user", "<image>"), ("user", "sure?"), ("assistant", "true")]
    assert len(single) == 4  # the sample without questions keeps its place and is counted when met
    pieces = shards(tmp_path, max_turns=1, limit=1)
    assert [pieces[n].id for n in range(len(pieces))] == ["s-000/k1#0", "s-000/k1#1"]
    assert len(shards(tmp_path, max_turns=2)) == 3


def test_questions_that_match_an_expression_are_kept(tmp_path):
    sure = shards(tmp_path, turns="single", matching="^sure")
    assert [sure[n].id for n in range(len(sure) - 1)] == ["s-000/k1#0"]
    assert said(sure[0]) == [("user", "<image>"), ("user", "sure?"), ("assistant", "true")]
    whole = shards(tmp_path, matching="^sure")
    assert len(whole) == 2  # the sample without questions keeps its place here, too
    assert said(whole[0]) == said(sure[0])
    with pytest.raises(ConfigError, match="no question matches 'nobody'"):
        shards(tmp_path, matching="nobody", limit=1)
    write(tmp_path / "a.jsonl", '{"text": "x"}')
    with pytest.raises(DataError, match="matching chooses among the questions of a list, and the sample has 'text'"):
        open_source({"kind": "jsonl", "file": "a.jsonl", "matching": "x"}, data_root=tmp_path)[0]


def test_captions_classes_and_side_files(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("k1.png", RED),
            ("k1.txt", b"a red thing\n"),
            ("k1.cls", b"1"),
            ("k2.png", BLUE),
            ("k2.txt", b"blue"),
            ("k2.cls", b"9"),
        ],
    )
    write(tmp_path / "names.txt", "blue\nred\n")
    write(tmp_path / "side.jsonl", json.dumps({"key": "k1", "caption": "red one", "words": ["red", "red one", " "]}))
    spec = {"kind": "webdataset", "shards": "a.tar"}
    assert said(open_source(spec, data_root=tmp_path)[0]) == [("text", "<image>"), ("text", "a red thing")]
    named = open_source(
        {**spec, "classes": "names.txt", "templates": ["a {}", "one {}"], "fields": {"caption": "none"}},
        data_root=tmp_path,
    )
    assert said(named[0])[1] == ("text", ("a red", "one red"))
    assert named[0].meta == {"class": "red", "label": 1}
    with pytest.raises(DataError, match="bad label: 9 is not one of the 2"):
        named[1]
    side = open_source(
        {**spec, "captions": {"file": "side.jsonl", "key": "key", "fields": ["caption", "words"]}}, data_root=tmp_path
    )
    assert said(side[0])[1] == ("text", ("a red thing", "red one", "red"))
    with pytest.raises(DataError, match="the side file has none for 'k2'"):
        side[1]
    asked = open_source({**spec, "instruction": "What is it?"}, data_root=tmp_path)
    assert said(asked[0]) == [("user", "<image>"), ("user", "What is it?"), ("assistant", "a red thing")]
    with pytest.raises(ConfigError, match="has no field 'word'; did you mean 'words'"):
        open_source({**spec, "captions": {"file": "side.jsonl", "key": "key", "fields": "word"}}, data_root=tmp_path)


def broken_shards(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [("a.png", RED), ("b.png", BLUE)]).read_bytes()
    second = whole.index(b"b.png")
    yield "empty", b"", "is empty"
    yield "junk", b"junk" * 500, "not an uncompressed tar"
    yield "zeros", bytes(10_240), "holds no file"
    yield "header cut", whole[: second + 100], "truncated or damaged after 1 files"
    yield "between members", whole[:second], "truncated or damaged after 1 files"
    yield "data cut", whole[: second + 600], "truncated or damaged"
    yield "no end", whole[: second + 1024], "truncated or damaged after 2 files"
    yield "damaged inside", whole[:second] + b"x" * 512 + whole[second + 512 :], "truncated or damaged after 1 files"


@pytest.mark.parametrize("number", range(8))
def test_broken_shards_are_refused_by_name(tmp_path, number):
    name, data, words = list(broken_shards(tmp_path))[number]
    (tmp_path / f"{name}.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad shard: .*{name}\.tar.*{words}"):
        open_source({"kind": "webdataset", "shards": f"{name}.tar"}, data_root=tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.png", "a.png"], "'a.png' twice"),
        (["a.png", "b.png", "a.txt"], "the key 'a' twice"),
        (["../a.png"], "leaves the folder"),
        (["/a.png"], "leaves the folder"),
        (["x/../../a.png"], "leaves the folder"),
    ],
)
def test_names_that_are_refused(tmp_path, names, words):
    write_tar(tmp_path / "t.tar", [(n, RED) for n in names])
    with pytest.raises(DataError, match=rf"bad shard: .*t\.tar.*{words}"):
        open_source({"kind": "webdataset", "shards": "t.tar"}, data_root=tmp_path)


def test_links_are_refused_and_folders_skipped(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="a link or device"):
        open_source({"kind": "webdataset", "shards": "t.tar"}, data_root=tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/k.png").write_bytes(RED)
    with tarfile.open(tmp_path / "ok.tar", "w") as tar:
        tar.add(tmp_path / "d", "d")
    assert len(open_source({"kind": "webdataset", "shards": "ok.tar"}, data_root=tmp_path)) == 1


def test_bad_members_are_sample_errors(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.json", b"{"), ("b.json", b"[1]"), ("c.cls", b"x"), ("d.txt", b"\xff")])
    source = open_source({"kind": "webdataset", "shards": "t.tar"}, data_root=tmp_path)
    for number, words in enumerate(("not valid JSON", "should hold a JSON object", "a class number", "not UTF-8")):
        with pytest.raises(DataError, match=words):
            source[number]


# COCO, CSV, folder, JSON lines, scenes


def test_coco_captions_are_alternatives(tmp_path):
    write(
        tmp_path / "captions.json",
        {
            "images": [{"id": 5, "file_name": "red.png"}, {"id": 6, "file_name": "none.png"}],
            "annotations": [{"image_id": 5, "caption": "one "}, {"image_id": 5, "caption": "two"}],
        },
    )
    (tmp_path / "red.png").write_bytes(RED)
    source = open_source({"kind": "coco", "file": "captions.json"}, data_root=tmp_path)
    assert len(source) == 1
    assert source[0].id == "captions/5"
    assert said(source[0]) == [("text", "<image>"), ("text", ("one", "two"))]
    write(tmp_path / "captions.json", {"images": [{"id": 5}]})
    with pytest.raises(DataError, match="not a COCO captions file"):
        open_source({"kind": "coco", "file": "captions.json"}, data_root=tmp_path)


def test_half_a_surrogate_pair_is_a_bad_sample(tmp_path):
    asked = ("what \ud83d?", "\U0001f600?")
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"question": q, "answer": "x"}) for q in asked))
    source = open_source({"kind": "jsonl", "file": "a.jsonl"}, data_root=tmp_path)
    with pytest.raises(DataError, match="bad text: the question holds half a surrogate pair"):
        source[0]
    assert source[1].texts[0].text == "\U0001f600?"


def test_csv_pairs(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    write(tmp_path / "pairs.csv", 'filepath,title\nred.png,"a red, thing"\nred.png,\n')
    spec = {"kind": "csv", "file": "pairs.csv", "fields": {"image": "filepath", "caption": "title"}}
    source = open_source(spec, data_root=tmp_path)
    assert said(source[0]) == [("text", "<image>"), ("text", "a red, thing")]
    with pytest.raises(DataError, match="empty text"):
        source[1]
    write(tmp_path / "pairs.tsv", "image\tquestion\tanswer\nred.png\twhat?\tred\n")
    assert said(open_source({"kind": "csv", "file": "pairs.tsv"}, data_root=tmp_path)[0])[1:] == [
        ("user", "what?"),
        ("assistant", "red"),
    ]
    with pytest.raises(ConfigError, match="has no field 'titel'; did you mean 'title'"):
        open_source({**spec, "fields": {"caption": "titel"}}, data_root=tmp_path)


def test_folder_of_classes(tmp_path):
    for name, data in (("cat/a.png", RED), ("sea lion_x/b.jpg", BLUE), ("cat/notes.txt", b"")):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(data)
    source = open_source({"kind": "folder", "folder": "top", "templates": "a photo of a {}"}, data_root=tmp_path)
    assert [said(source[n])[1][1] for n in range(2)] == ["a photo of a cat", "a photo of a sea lion x"]
    named = open_source({"kind": "folder", "folder": "top", "classes": ["x", "y"]}, data_root=tmp_path)
    assert [named[n].meta["class"] for n in range(2)] == ["x", "y"]
    with pytest.raises(DataError, match="2 class folders and the class file 1"):
        open_source({"kind": "folder", "folder": "top", "classes": ["x"]}, data_root=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_source({"kind": "folder", "folder": "none"}, data_root=tmp_path)


def test_any_json_lines(tmp_path):
    rows = [{"body": "running text", "name": "x"}, {"q": "is it?", "a": ["yes", "yeah"], "t": 3}]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    fields = {"text": "body", "id": "name", "question": "q", "answer": "a", "kind": "t"}
    source = open_source({"kind": "jsonl", "file": "rows.jsonl", "fields": fields}, data_root=tmp_path)
    assert source[0].id == "rows/x"
    assert said(source[0]) == [("text", "running text")]
    assert source[0].texts[0].learn
    assert said(source[1]) == [("user", "is it?"), ("assistant", "yes")]
    assert source[1].meta == {"answers": ("yes", "yeah"), "kind": "3"}
    write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not valid JSON"):
        open_source({"kind": "jsonl", "file": "rows.jsonl"}, data_root=tmp_path)
    write(tmp_path / "rows.json", "[1, 2]")
    with pytest.raises(DataError, match="a list of JSON objects"):
        open_source({"kind": "jsonl", "file": "rows.json"}, data_root=tmp_path)
    write(tmp_path / "rows.json", '[{"a": 1},')
    with pytest.raises(DataError, match="not valid JSON: it goes wrong at line 1"):
        open_source({"kind": "jsonl", "file": "rows.json"}, data_root=tmp_path)


def test_scenes_and_mixtures(tmp_path):
    scenes = {"kind": "scenes", "form": "captions", "count": 3, "size": 32}
    assert open_source(scenes)[0].images[0].key
    mix = open_mix([{**scenes, "weight": 2}, {**scenes, "form": "questions"}])
    assert mix.weights == (2.0, 1.0)
    assert [len(s) for s in mix.sources] == [3, 3]
    with pytest.raises(ConfigError, match="unknown option 'cuont'; did you mean 'count'"):
        open_source({"kind": "scenes", "form": "captions", "cuont": 3})
    with pytest.raises(ConfigError, match="needs the option 'form'"):
        open_source({"kind": "scenes"})


# Descriptions


def test_unknown_words_name_the_nearest(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "x"}')
    for spec, words in (
        ({"kind": "webdatset"}, "did you mean 'webdataset'"),
        ({}, "unknown kind ''"),
        ({"kind": "jsonl", "file": "a.jsonl", "image_foldr": "x"}, "did you mean 'image_folder'"),
        ({"kind": "jsonl", "file": "a.jsonl", "fields": {"captoin": "x"}}, "did you mean 'caption'"),
        ({"kind": "jsonl", "file": "a.jsonl", "fields": {"caption": 0}}, "int 0 fits none of the allowed forms"),
        ({"kind": "jsonl", "file": "a.jsonl", "turns": "some"}, "unknown value 'some'; known: all, single"),
        ({"kind": "jsonl", "file": "a.jsonl", "max_turns": 0}, "max_turns"),
        ({"kind": "jsonl", "file": "a.jsonl", "matching": "(a"}, "no regular expression"),
        ({"kind": "jsonl", "file": "a.jsonl", "limit": 0}, "limit must be"),
        ({"kind": "jsonl", "file": "a.jsonl", "templates": ["a cat"]}, "has no {}"),
        ({"kind": "jsonl", "file": "a.jsonl", "image_folder": ".", "images": "a.tar"}, "not both"),
        ({"kind": "jsonl"}, "needs the option 'file'"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_source(spec, data_root=tmp_path)
    for spec in (
        {"kind": "jsonl", "file": "b.jsonl"},
        {"kind": "webdataset", "shards": "b-*.tar"},
        {"kind": "coco", "file": "b.json"},
        {"kind": "jsonl", "file": "a.jsonl", "classes": "b.txt"},
    ):
        with pytest.raises(DataError, match=r"no such file: .*b"):
            open_source(spec, data_root=tmp_path)
    with pytest.raises(DataError, match="no such image folder"):
        open_source({"kind": "jsonl", "file": "a.jsonl", "image_folder": "none"}, data_root=tmp_path)
    write(tmp_path / "empty.json", "[]")
    with pytest.raises(DataError, match=r"'jsonl:empty' holds no sample: there is no row in empty\.json"):
        open_source({"kind": "jsonl", "file": "empty.json"}, data_root=tmp_path)
    assert set(SOURCES) == {
        "llava",
        "webdataset",
        "coco",
        "csv",
        "folder",
        "jsonl",
        "pope-objects",
        *READERS,
        *BENCHMARKS,
    }


def test_braces_and_globs(tmp_path):
    for name in ("a-08.x", "a-09.x", "a-10.x", "b-1.x"):
        (tmp_path / name).write_text("")
    root = Root(tmp_path)
    assert [p.name for p in root.files("a-{08..10}.x")] == ["a-08.x", "a-09.x", "a-10.x"]
    assert [p.name for p in root.files(["b-{1..1}.x", "{a,b}-*.x"])] == ["b-1.x", "a-08.x", "a-09.x", "a-10.x"]
    with pytest.raises(DataError, match=r"no such file: .*a-11\.x"):
        root.files("a-{10..11}.x")
    (tmp_path / "set [1]").mkdir()
    (tmp_path / "set [1]" / "c-1.x").write_text("")
    for pattern in (f"{tmp_path}/set [1]/c-*.x", "set [1]/c-?.x", "**/c-*.x"):  # a folder's own name is no pattern
        assert [p.name for p in Root(tmp_path).files(pattern)] == ["c-1.x"]
    assert [safe_name(n) for n in ("a/b.png", "../a", "/a", "C:/a", "a\\..\\b", "")] == [True] + [False] * 5


def test_pictures_know_their_place(tmp_path):
    image = shards(tmp_path)[0].images[0]
    assert isinstance(image, Image)
    assert image.source.describe().endswith("s-000.tar :: k1.png")


HF_TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cube"}]},
    {"role": "user", "content": "and this?"},
    {"role": "assistant", "content": "a ring"},
]


@pytest.mark.parametrize("place", ["image", "images", "paths", "parts"])
def test_messages_whose_content_is_a_list_of_parts(tmp_path, place):
    """As datasets of the chat form hold them, with the pictures in a column of their own or in the parts."""
    (tmp_path / "a.png").write_bytes(png())
    turns = json.loads(json.dumps(HF_TURNS))
    row = {"id": 1, "messages": turns}
    if place == "parts":
        turns[0]["content"][0]["image"] = "a.png"
    else:
        row["image" if place == "image" else "images"] = [{"path": "a.png"} if place == "paths" else "a.png"]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    found = open_source({"kind": "jsonl", "file": "rows.json"}, data_root=tmp_path)[0]
    assert [(type(p).__name__, p.role) for p in found.parts] == [
        ("Image", "user"),
        ("Text", "user"),
        ("Text", "assistant"),
        ("Text", "user"),
        ("Text", "assistant"),
    ]
    assert [p.text for p in found.texts] == ["what?", "a cube", "and this?", "a ring"]
    assert [p.learn for p in found.texts] == [False, True, False, True]
    assert found.images[0].source.read() == png()
