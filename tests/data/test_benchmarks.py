"""Official files of benchmarks: tiny ones made here by their published descriptions."""

import base64
import json

import pytest

from isthmus.data.record import Image
from isthmus.data.sources import open_source
from isthmus.data.sources.annotations import LETTER
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import file_of, png, text_of
from tests.narrow import must_be

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
CHOICES = ["a cat", "a dog", "a cow", "a hen"]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, content)))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def opened(root, **spec):
    return open_source(spec, data_root=root)


def asked(record):
    return "".join("<image>" if isinstance(part, Image) else part.text for part in record.parts[:-1])


AOKVQA = {
    "question_id": "q1",
    "image_id": 299207,
    "question": "What is it?",
    "choices": CHOICES,
    "correct_choice_idx": 1,
    "direct_answers": ["dog", "hound", "dog"],
    "difficult_direct_answer": False,
}


def test_aokvqa_asks_for_a_choice_or_in_words(tmp_path):
    write(tmp_path, "a.json", [AOKVQA, AOKVQA | {"question_id": "q2", "difficult_direct_answer": True}])
    write(tmp_path, "000000299207.jpg", RED)
    source = opened(tmp_path, kind="a-okvqa", file="a.json")
    assert len(source) == 2
    record = source[0]
    assert asked(record) == f"<image>What is it?\nA. a cat\nB. a dog\nC. a cow\nD. a hen\n{LETTER}"
    assert (text_of(record.parts[-1]), record.meta["answers"], record.meta["choices"]) == ("B", ("B",), tuple(CHOICES))
    assert record.images[0].source.read() == RED
    direct = opened(tmp_path, kind="a-okvqa", file="a.json", answer="direct", suffix="Shortly.")
    assert len(direct) == 1, "difficult ones are not asked for in words"
    assert asked(direct[0]) == "<image>What is it?\nShortly."
    assert direct[0].meta["answers"] == ("dog", "hound", "dog")


def test_docvqa_with_its_kinds(tmp_path):
    item = {"questionId": 5, "question": "Which year?", "image": "documents/x.png", "answers": ["1998", "in 1998"]}
    write(
        tmp_path, "val.json", {"data": [item | {"question_types": ["form", "handwritten"]}, item | {"questionId": 6}]}
    )
    source = opened(tmp_path, kind="docvqa", file="val.json")
    assert source[0].meta == {"kind": "form", "answers": ("1998", "in 1998")}
    assert source[0].images[0].source.describe().endswith("documents/x.png")
    assert "kind" not in source[1].meta
    write(tmp_path, "val.json", {"data": [item | {"answers": "1998"}]})
    with pytest.raises(DataError, match="question 5: 'answers' should not be '1998'"):
        opened(tmp_path, kind="docvqa", file="val.json")[0]


def test_seedbench_reads_its_pictures(tmp_path):
    item = {
        "question_id": "101",
        "question": "How many?",
        **{f"choice_{letter}": text for letter, text in zip("abcd", CHOICES, strict=True)},
        "answer": "C",
        "data_id": "1454_x",
        "data_type": "image",
        "question_type_id": 5,
    }
    film = item | {"question_id": "9", "data_type": "video", "segment": [1, 2]}
    write(tmp_path, "s.json", {"questions": [film, item], "question_type": {"Instances Counting": 5}})
    source = opened(tmp_path, kind="seed-bench", file="s.json")
    assert len(source) == 1
    assert source[0].meta["kind"] == "Instances Counting"
    assert source[0].meta["answers"] == ("C",)
    assert asked(source[0]).endswith(f"D. a hen\n{LETTER}")


def test_vsr_is_true_or_false(tmp_path):
    row = {"image": "1.jpg", "image_link": "x", "caption": "The cat is on the mat.", "label": 1, "relation": "on"}
    write(tmp_path, "test.jsonl", [row, row | {"label": 0}, row | {"label": 2}])
    source = opened(tmp_path, kind="vsr", file="test.jsonl", suffix="True or false?")
    assert asked(source[0]) == "<image>The cat is on the mat.\nTrue or false?"
    assert [text_of(source[i].parts[-1]) for i in (0, 1)] == ["true", "false"]
    assert source[0].meta["kind"] == "on"
    with pytest.raises(DataError, match=r"line 3 of test\.jsonl"):
        source[2]


MMMU = {
    "id": "validation_Art_Theory_3",
    "question": "Which is <image 1> like?",
    "options": "['<image 2>', 'a \"cow\"']",
    "answer": "B",
    "question_type": "multiple-choice",
    "image_1": "one.png",
    "image_2": {"path": "two.png"},
    "image_3": "three.png",
    "image_4": None,
}


def test_mmmu_puts_pictures_in_their_places(tmp_path):
    write(tmp_path, "m.jsonl", [MMMU, MMMU | {"id": "dev_Math_1", "options": "[]", "answer": "['24/7', '3.4']"}])
    choice, free = opened(tmp_path, kind="mmmu", file="m.jsonl")
    assert asked(choice) == f'<image>Which is <image> like?\nA. <image>\nB. a "cow"\n{LETTER}'
    assert [file_of(i).name for i in choice.images] == ["three.png", "one.png", "two.png"]
    assert choice.meta["kind"] == "Art_Theory"
    assert choice.meta["answers"] == ("B",)
    assert free.meta == {"kind": "Math", "answers": ("24/7", "3.4")}
    assert "using a single word" in asked(free)


@pytest.fixture
def mme(tmp_path):
    top = tmp_path / "MME"
    write(top, "existence/0001.txt", "Is there a cat? Please answer yes or no.\tYes\nIs there a cow?\tNo\n")
    write(top, "existence/0001.jpg", RED)
    write(top, "posters/questions_answers_YN/tt1.txt", "Is it a film?\tYes\nIs it a book?\tNo\n")
    write(top, "posters/images/tt1.png", BLUE)
    return tmp_path


def test_mme_in_both_of_its_layouts(mme):
    source = opened(mme, kind="mme", folder="MME")
    assert [source[i].meta["kind"] for i in range(4)] == ["existence"] * 2 + ["posters"] * 2
    assert [source[i].meta["group"] for i in (0, 1)] == ["existence/0001"] * 2
    assert source[0].images[0].source.read() == RED
    assert source[3].images[0].source.read() == BLUE
    assert text_of(source[3].parts[-1]) == "No"
    assert len(opened(mme, kind="mme", folder="MME", categories=["posters"])) == 2
    write(mme, "MME/existence/0002.txt", "Is there a cat?\tYes\n")
    write(mme, "MME/existence/0003.txt", "Is there a cat? Yes\n")
    again = opened(mme, kind="mme", folder="MME", categories=["existence"])
    with pytest.raises(DataError, match="no picture of its name"):
        again[2]
    with pytest.raises(DataError, match="tab and Yes or No"):
        again[3]
    with pytest.raises(DataError, match="no MME"):
        opened(mme, kind="mme", folder="MME", categories=["poster"])


def mmbench(folder, rows):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    lines = ["\t".join(columns), *("\t".join(str(row.get(c, "")) for c in columns) for row in rows)]
    return write(folder, "mmbench.tsv", "\n".join(lines))


# As long as real pictures are: longer than the csv module takes by itself.
LONG = base64.b64encode(RED + bytes(150_000)).decode()
ROW = {"index": 7, "question": "What?", "A": "cat", "B": "dog", "C": "cow", "answer": "B", "category": "what"}


def test_mmbench_turns_the_choices(tmp_path):
    other = ROW | {"index": 8, "image": "7", "hint": "It barks.", "D": "nan"}
    mmbench(tmp_path, [ROW | {"image": LONG}, other])
    source = opened(tmp_path, kind="mmbench", file="mmbench.tsv")
    assert len(source) == 6
    turns = [source[i] for i in range(3)]
    assert [t.meta["choices"] for t in turns] == [("cat", "dog", "cow"), ("dog", "cow", "cat"), ("cow", "cat", "dog")]
    assert [t.meta["answers"] for t in turns] == [("B",), ("A",), ("C",)]
    assert {t.meta["group"] for t in turns} == {"7"}
    assert asked(turns[1]) == f"<image>What?\nA. dog\nB. cow\nC. cat\n{LETTER}"
    assert must_be(bytes, turns[0].images[0].source.read()).startswith(b"\x89PNG")
    assert asked(source[3]).startswith("<image>It barks.\nWhat?")
    assert source[3].images[0].source.read() == turns[0].images[0].source.read(), "a short cell names another row"
    assert len(opened(tmp_path, kind="mmbench", file="mmbench.tsv", circular=False)) == 2


def test_broken_pictures_of_a_table(tmp_path):
    mmbench(tmp_path, [ROW | {"image": "?" * 80}])
    with pytest.raises(DataError, match="picture of question 7 is not base64"):
        opened(tmp_path, kind="mmbench", file="mmbench.tsv")[0].images[0].source.read()


@pytest.mark.parametrize(
    ("spec", "content", "words"),
    [
        ({"kind": "a-okvqa"}, {"x": 1}, "not an A-OKVQA file"),
        ({"kind": "a-okvqa"}, [AOKVQA, AOKVQA], "q1 is there twice"),
        ({"kind": "a-okvqa", "answer": "words"}, [AOKVQA], "answer 'words' is unknown"),
        ({"kind": "docvqa"}, {"data": []}, "'data'"),
        ({"kind": "seed-bench"}, {"questions": [{"question_id": 1, "data_type": "video"}]}, "data_type 'image'"),
        ({"kind": "mmbench"}, "index\tquestion\n1\tx", "no column 'A'"),
    ],
)
def test_files_of_another_form_are_refused_at_once(tmp_path, spec, content, words):
    write(tmp_path, "file.json", content)
    with pytest.raises((ConfigError, DataError), match=words):
        opened(tmp_path, file="file.json", **spec)


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("a-okvqa", AOKVQA | {"correct_choice_idx": 4}),
        ("a-okvqa", {k: v for k, v in AOKVQA.items() if k != "correct_choice_idx"}),
        ("mmmu", MMMU | {"answer": "?"}),
        ("mmmu", MMMU | {"image_1": None}),
        ("mmmu", MMMU | {"options": "['a'"}),
    ],
)
def test_bad_samples_name_themselves(tmp_path, kind, item):
    write(tmp_path, "f.json", [item])
    with pytest.raises(DataError, match=r"q1|validation_Art_Theory_3"):
        opened(tmp_path, kind=kind, file="f.json")[0]
