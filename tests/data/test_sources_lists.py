"""Lists in one cell, delimiters that a name does not promise, names with backslashes, fields that are not read, options
of lists of questions."""

import json
from typing import Any

import pytest

from isthmus.data.record import Image
from isthmus.data.sources import named_apart, open_source
from isthmus.data.sources.cells import unpacked
from isthmus.data.sources.files import merged_names
from isthmus.data.sources.guess import guess
from isthmus.errors import ConfigError, DataError, IsthmusWarning
from tests.data.helpers import png, text_of, write_tar
from tests.narrow import must_be


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img" / "day").mkdir(parents=True)
    for name in ("img/a.png", "img/b.png", "img/day/0.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def opened(folder, text, name="t.csv", **options):
    (folder / name).write_text(text, encoding="utf-8")
    kind = "csv" if name.endswith(("csv", "tsv")) else "jsonl"
    return open_source({"kind": kind, "file": name, **options}, data_root=folder)


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["a dog", "one, dog"]', ["a dog", "one, dog"]),
        ("['a dog', \"it's one\"]", ["a dog", "it's one"]),
        ("['a dog' 'one dog'\n \"it's\"]", ["a dog", "one dog", "it's"]),
        ("('a', 'b')", ["a", "b"]),
        ('[["q", "a"]]', [["q", "a"]]),
        ("[]", []),
        ("[2019]", "[2019]"),
        ("[a dog]", "[a dog]"),
        ("('tis)", "('tis)"),
    ],
)
def test_a_serialised_list_in_its_three_forms(cell, texts):
    assert unpacked(cell) == texts


@pytest.mark.parametrize("cell", ['["a", "b', "['a' ... 'b']", "['a', None]", '["a" "b", "c"]'])
def test_what_begins_as_a_list_and_is_none_is_refused(cell):
    with pytest.raises(DataError, match="bad list: the text begins as a list"):
        unpacked(cell)


def test_captions_choices_and_names_in_one_cell(folder):
    text = 'raw,names\n"[""a dog"", ""one, dog""]","[\'img/a.png\', \'img/b.png\']"\n[],img/a.png\n'
    source = opened(folder, text, fields={"caption": "raw", "image": "names"})
    assert source[0].texts[0].text == ("a dog", "one, dog")
    assert len(source[0].images) == 2
    with pytest.raises(DataError, match="empty text: the caption"):
        source[1]
    row = {"question": "which?", "choices": "['red', 'blue']", "answer": "red"}
    assert opened(folder, json.dumps(row), "c.jsonl")[0].meta["choices"] == ("red", "blue")
    with pytest.raises(DataError, match="the choices should be a list of texts"):
        opened(folder, json.dumps({**row, "choices": "red, blue"}), "d.jsonl")[0]
    with pytest.raises(DataError, match="bad label: a picture has one class here, and this one has 2"):
        opened(folder, "label\n\"['cat', 'dog']\"\n")[0]


def test_answers_in_one_cell_and_answers_as_objects(folder):
    source = opened(folder, "question,answer\nq,\"['b', 'a', 'a']\"\n")
    with pytest.warns(IsthmusWarning, match="all right, the first of the commonest is learnt"):
        record = source[0]
    assert (record.meta["answers"], record.texts[-1].text) == (("b", "a", "a"), "a")
    given = [{"answer": "x", "answer_confidence": "yes"}, {"answer": "y"}, {"answer": "y"}]
    record = opened(folder, json.dumps({"question": "q", "answers": given}), "a.jsonl", fields={"answer": "answers"})[0]
    assert (record.meta["answers"], record.texts[-1].text) == (("x", "y", "y"), "y")


def test_conversations_in_one_cell(folder):
    turns = json.dumps([{"from": "human", "value": 'say ["x"]'}, {"from": "gpt", "value": '["x", "y"]'}])
    record = opened(folder, json.dumps({"conversations": turns}), "a.jsonl")[0]
    assert [p.text for p in record.texts] == ['say ["x"]', '["x", "y"]'], "what is said stays as it is"


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("lead", ["", "\ufeff", "sep={}\n"])
def test_the_delimiter_is_found_by_columns_that_are_known(folder, delimiter, lead):
    quoted = f'"red{delimiter} or not"'
    text = lead.format(delimiter) + f"filepath;title\nimg/a.png;{quoted}\n".replace(";", delimiter, 1)
    text = text.replace("img/a.png;", f"img/a.png{delimiter}")
    record = opened(folder, text, fields={"image": "filepath", "caption": "title"})[0]
    assert record.texts[0].text == f"red{delimiter} or not"
    (folder / "t.csv").write_text(text.replace("filepath", "image").replace("title", "caption"), encoding="utf-8")
    assert guess(folder / "t.csv")["kind"] == "csv"
    assert open_source(guess(folder / "t.csv"))[0].images


def test_a_lone_column_and_other_signs_in_names_stay(folder):
    assert opened(folder, "caption\na; b, c\n".replace(", ", " "))[0].texts[0].text == "a; b c"
    record = opened(folder, "caption;x,image\nred,img/a.png\n", fields={"caption": "caption;x"})[0]
    assert record.texts[0].text == "red"


def test_a_wrong_delimiter_is_told_as_one_and_no_misspelt_key(folder):
    with pytest.raises(ConfigError, match=r"read as one column, 'image;caption', which ';' would divide into 2"):
        opened(folder, "image;caption\nimg/a.png;x\n", delimiter=",")
    with pytest.raises(ConfigError, match="has no field 'captoin'; did you mean 'caption'"):
        opened(folder, "image;caption\nimg/a.png;x\n", fields={"caption": "captoin"})


def test_names_with_backslashes_are_found(folder):
    record = opened(folder, "image,caption\nimg\\day\\0.png,x\n")[0]
    assert record.images[0].source.read() == png()
    assert open_source({"kind": "csv", "file": r".\t.csv"}, data_root=folder)[0].images[0].source.read() == png()
    assert guess(folder / "t.csv") == {"kind": "csv", "file": str(folder / "t.csv")}
    with pytest.raises(DataError, match="leaves the image folder"):
        opened(folder, "image,caption\n..\\x.png,x\n")[0]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]


def test_a_system_field_and_answers_that_are_only_read(folder):
    turns = [*CHAT, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    record = opened(folder, json.dumps({"messages": turns, "system": "Be brief."}), "a.jsonl")[0]
    assert [(p.role, p.text, p.learn) for p in record.texts] == [
        ("system", "Be brief.", False), ("user", "q", False), ("assistant", "a", False),
        ("user", "r", False), ("assistant", "b", True),
    ]  # fmt: skip
    own = [{"role": "system", "content": "Be long."}, *turns]
    with pytest.raises(
        DataError, match=r"two system texts: the sample's field says 'Be brief\.' and its turn 'Be long\.'"
    ):
        opened(folder, json.dumps({"messages": own, "system": "Be brief."}), "b.jsonl")[0]
    asked = opened(folder, json.dumps({"question": "q", "answer": "a", "system": "Be brief."}), "c.jsonl")[0]
    assert asked.texts[0].role == "system"
    with pytest.raises(DataError, match=r"weight is 0\.5"):
        opened(folder, json.dumps({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}), "d.jsonl")[0]


def test_text_that_is_not_read_is_named_once_with_its_number(folder):
    rows = [{"question": "q", "answer": "a", "hint": h, "tools": [{"name": "t"}]} for h in ("x", "", "y")]
    text = "\n".join(map(json.dumps, rows))
    with pytest.warns(IsthmusWarning) as said:
        opened(folder, text, "h.jsonl")
    assert [str(w.message).split(",")[0] for w in said] == [
        "h: the field `tools` of 3 samples holds text that is not read.",
        "h: the field `hint` of 2 samples holds text that is not read",
    ]
    with pytest.warns(IsthmusWarning, match="`tools`"):
        source = opened(folder, text, "h.jsonl", fields={"context": "hint"})
    assert [source[n].texts[0].text for n in range(3)] == ["x\nq", "q", "y\nq"]


def test_text_in_a_tar_that_is_not_read_is_named_too(tmp_path):
    members = []
    for number, hint in enumerate(("x", "", "y")):
        row = {"question": "q", "answer": "a", "hint": hint}
        members += [(f"{number}.png", png()), (f"{number}.json", json.dumps(row).encode())]
    write_tar(tmp_path / "t.tar", [*members, ("bad.json", b"{")])
    spec = {"kind": "webdataset", "shards": "t.tar"}
    with pytest.warns(IsthmusWarning, match=r"t\.tar \(of 4 samples .* read\): the field `hint` of 2 samples"):
        open_source(spec, data_root=tmp_path)
    assert open_source(spec | {"fields": {"context": "hint"}}, data_root=tmp_path)[0].texts[0].text == "x\nq"


def test_one_picture_before_the_text_as_an_option(folder):
    turns = [{"role": "user", "content": "what?\n<image>"}, {"role": "assistant", "content": "a"}]
    text = json.dumps({"image": "img/a.png", "messages": turns})
    assert [p.role for p in opened(folder, text, "p.jsonl")[0].parts[:1]] == ["user"]
    assert text_of(opened(folder, text, "p.jsonl")[0].parts[0]) == "what?"
    parts = opened(folder, text, "p.jsonl", pictures="first")[0].parts
    assert (must_be(Image, parts[0]).source.describe().endswith("a.png"), text_of(parts[1])) == (True, "what?")


def test_names_that_repeat(folder):
    with pytest.warns(IsthmusWarning, match=r"1 class names are there again \('Crane'\)"):
        assert merged_names(["Crane", "ring", "crane "], "class") == ["Crane", "ring", "Crane"]
    specs = [{"kind": "csv", "file": f"{part}/train.csv"} for part in "ab"]
    assert [s.get("name") for s in named_apart(specs)] == [None, "csv:train (2)"]
    with pytest.warns(IsthmusWarning, match="Two sources are called 'x'"):
        named_apart([{**spec, "name": "x"} for spec in specs])
    for name in ("c/1.png", "d/1.png"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(png())
    (folder / "side.jsonl").write_text('{"key": "1", "c": "one"}\n{"key": "1", "c": "two"}\n{"key": "0", "c": "x"}')
    side: dict[str, Any] = {"captions": {"file": "side.jsonl", "key": "key", "fields": "c"}}
    with pytest.raises(DataError, match="the picture name, by which the side file gives captions, 1 is there twice"):
        open_source({"kind": "folder", "folder": "."} | side, data_root=folder)
    assert len(opened(folder, "image,id\nimg/a.png,1\n", **side)[0].texts[0].text) == 2
    styles = "image,id\nimg/a.png,1\nimg/b.png,1\nimg/a.png,0\n"
    with pytest.warns(IsthmusWarning, match=r"1 keys \('1' the first\) name 2 or fewer samples each"):
        source = opened(folder, styles, **side)
    assert [source[n].texts[0].text for n in range(3)] == [("one", "two"), ("one", "two"), "x"]


TALK = [{"from": who, "value": f"{who} {n}"} for n in range(3) for who in ("human", "gpt")]
SHORT, LONG = {"id": "short", "conversations": TALK[:2]}, {"id": "long", "conversations": TALK}
LIST = {"id": "list", "questions": [["a?", "b"]] * 3}


def talks(folder, *rows, **options):
    return opened(folder, json.dumps(rows), "a.json", **options)


@pytest.mark.parametrize(
    ("own", "option"), [({"turns": "single"}, "turns: single"), ({"max_turns": 2}, "max_turns: 2")]
)
def test_an_option_that_divides_no_conversation_is_refused(folder, own, option):
    said = f"{option} makes several records of a list .* 1 samples .'a/long' the first. are conversations of more"
    with pytest.raises(ConfigError, match=f"{said}.* own recipe has it, .* --task vqa --data FILE"):
        talks(folder, SHORT, LONG, **own)
    assert len(talks(folder, SHORT, SHORT, **own)) == 2  # they are as short as they should be
    with pytest.warns(IsthmusWarning, match=f"{said}, which stay one record each"):
        found = talks(folder, SHORT, LONG, LIST, **own)
    assert [found[n].id for n in range(3)] == ["a/short", "a/long", "a/list#0"]
    assert len(found) == 2 + (2 if "max_turns" in own else 3)


def test_a_conversation_beside_questions_is_one_record(folder):
    assert len(talks(folder, LIST | SHORT, turns="single")) == 1
