"""Official annotation files: tiny ones in every format made here, and samples of the real ones (data)."""

import json
from typing import Any

import pytest

from isthmus.data.sources import open_source
from isthmus.data.sources.annotations import LETTER
from isthmus.data.sources.guess import guess
from isthmus.data.text import render
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import file_of, png, write_tar
from tests.narrow import must_be

RED = png((255, 0, 0))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = name.endswith("l")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
        return path

    return write


def opened(tmp_path, **spec):
    return open_source(spec, data_root=tmp_path)


def ten(*answers):
    return [{"answer": a, "answer_id": n} for n, a in enumerate(answers, start=1)]


QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 7, "question": "What colour?", "question_id": 70},
        {"image_id": 8, "question": "Is it?", "question_id": 80},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 80, "answer_type": "yes/no", "question_type": "is it", "answers": ten("no", "yes", "yes")},
        {
            "question_id": 70,
            "answer_type": "other",
            "question_type": "what colour",
            "multiple_choice_answer": "red",
            "answers": ten("Red", "red", "pink"),
        },
    ]
}
VQA = {"kind": "vqav2", "questions": "q.json", "annotations": "a.json"}


def test_vqa_questions_with_their_ten_answers(write, tmp_path):
    write("q.json", QUESTIONS)
    write("a.json", ANNOTATIONS)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/COCO_val2014_000000000007.jpg").write_bytes(RED)
    source = opened(tmp_path, **VQA, image_folder="pictures", suffix="Answer shortly.")
    first, second = source[0], source[1]
    assert first.meta == {"kind": "yes/no", "answers": ("no", "yes", "yes")}
    assert [t.text for t in first.texts] == ["Is it?\nAnswer shortly.", "yes"], "the commonest answer is learnt"
    assert second.id == "vqa/70"
    assert second.texts[-1].text == "red"
    assert second.images[0].source.read() == RED
    assert opened(tmp_path, **VQA, image_folder="pictures", by="question_type")[0].meta["kind"] == "is it"


@pytest.mark.parametrize(
    ("questions", "annotations", "words"),
    [
        (QUESTIONS, {"annotations": [*ANNOTATIONS["annotations"], {"question_id": 9}]}, "question 9 is not in q.json"),
        (QUESTIONS, {"annotations": ANNOTATIONS["annotations"] * 2}, "question_id 80 is there twice"),
        (QUESTIONS, {"annotations": ANNOTATIONS["annotations"][:1]}, "1 questions of q.json have no answers"),
        ({"questions": QUESTIONS["questions"] * 2}, ANNOTATIONS, "question_id 70 is there twice"),
        (ANNOTATIONS, ANNOTATIONS, "needs a list 'questions'"),
        (
            QUESTIONS,
            {"annotations": [{"question_id": 80, "image_id": 7}]},
            "80 is about the image 7, and in q.json about 8",
        ),
        (QUESTIONS, {"annotations": [{"answers": []}]}, "entry 0 has no 'question_id'"),
    ],
)
def test_vqa_files_that_do_not_fit(write, tmp_path, questions, annotations, words):
    write("q.json", questions)
    write("a.json", annotations)
    with pytest.raises(DataError, match=words):
        opened(tmp_path, **VQA)


def test_options_are_checked_by_name(write, tmp_path):
    write("q.json", QUESTIONS)
    write("a.json", ANNOTATIONS)
    with pytest.raises(ConfigError, match="did you mean 'annotations'"):
        opened(tmp_path, kind="vqav2", questions="q.json", anotations="a.json")
    with pytest.raises(ConfigError, match="did you mean 'answer_type'"):
        opened(tmp_path, **VQA, by="answertype")
    with pytest.raises(ConfigError, match="did you mean 'vqav2'"):
        opened(tmp_path, kind="vqa2", questions="q.json")


PROBLEM = {
    "question": "Which is a  solid?",
    "choices": ["milk", "a cup"],
    "answer": 1,
    "hint": "",
    "image": "image.png",
    "subject": "natural science",
    "grade": "grade2",
    "lecture": "Solids keep\ntheir shape.",
    "solution": "A cup is hard.",
    "split": "test",
}
SCIENCE = {"kind": "scienceqa", "problems": "problems.json", "splits": "splits.json", "split": "test"}


@pytest.mark.parametrize(
    ("layout", "question", "answer"),
    [
        (
            "CQM-A",
            f"Context: N/A\nQuestion: Which is a solid?\nOptions: (A) milk (B) a cup\n{LETTER}",
            "B",
        ),
        (
            "QCM-LEA",
            "Which is a solid?\nContext: N/A\nOptions: (A) milk (B) a cup",
            "Solids keep\ntheir shape. A cup is hard. The answer is B.",
        ),
        (
            "QCM-ALE",
            "Which is a solid?\nContext: N/A\nOptions: (A) milk (B) a cup",
            "The answer is B. BECAUSE: Solids keep\ntheir shape. A cup is hard.",
        ),
    ],
)
def test_scienceqa_prompts(write, tmp_path, layout, question, answer):
    write("problems.json", {"1": PROBLEM, "2": {**PROBLEM, "image": None, "hint": "Read this."}})
    write("splits.json", {"test": ["1", "2"], "train": []})
    (tmp_path / "test/1").mkdir(parents=True)
    (tmp_path / "test/1/image.png").write_bytes(RED)
    source = opened(tmp_path, **SCIENCE, format=layout)
    assert [t.text for t in source[0].texts] == [question, answer]
    assert source[0].meta == {"kind": "natural science", "choices": ("milk", "a cup"), "answers": ("B",)}
    assert source[0].images[0].source.read() == RED
    assert (source[1].images, "Context: Read this." in source[1].texts[0].text) == ((), True)
    assert [len(opened(tmp_path, **SCIENCE, only=only)) for only in ("image", "text")] == [1, 1]
    assert [opened(tmp_path, **SCIENCE, by="modality")[n].meta["kind"] for n in (0, 1)] == ["image", "text"]


def test_scienceqa_files_that_do_not_fit(write, tmp_path):
    write("problems.json", {"1": {**PROBLEM, "answer": 2}})
    write("splits.json", {"test": ["1"], "dev": ["3"]})
    with pytest.raises(DataError, match="2 is not the number of one of the 2 choices"):
        opened(tmp_path, **SCIENCE)[0]
    with pytest.raises(DataError, match="the first is 3"):
        opened(tmp_path, **{**SCIENCE, "split": "dev"})
    with pytest.raises(ConfigError, match="no split 'tst'; did you mean 'test'"):
        opened(tmp_path, **{**SCIENCE, "split": "tst"})
    with pytest.raises(ConfigError, match="did you mean 'QCM-LEA'"):
        opened(tmp_path, **SCIENCE, format="QCMLEA")


def test_pope_samplings_are_kinds(write, tmp_path):
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"}
    for sampling in ("random", "popular", "adversarial"):
        write(f"coco_pope_{sampling}.jsonl", [row, {**row, "question_id": 2, "label": "yes"}])
    source = opened(tmp_path, kind="pope", file="coco_pope_*.jsonl")
    assert len(source) == 6
    assert {source[n].meta["kind"] for n in range(6)} == {"random", "popular", "adversarial"}
    assert source[0].meta["answers"] == ("no",)
    assert len({source[n].id for n in range(6)}) == 6
    write("coco_pope_bad.jsonl", [{**row, "label": "maybe"}])
    with pytest.raises(DataError, match="yes and no, not 'maybe'"):
        opened(tmp_path, kind="pope", file="coco_pope_bad.jsonl")[0]
    write("coco_pope_twice.jsonl", [row, row])
    with pytest.raises(DataError, match="question_id 1 is there twice"):
        opened(tmp_path, kind="pope", file="coco_pope_twice.jsonl")


def test_karpathy_splits(write, tmp_path):
    def image(n: int, split: str, **more: Any) -> dict[str, Any]:
        sentences = [{"raw": f"A dog, number {n}."}, {"raw": "A pet."}]
        return {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": sentences, **more}

    images = [image(1, "train"), image(2, "test"), image(3, "restval", filepath="val2014")]
    write("dataset.json", {"images": images, "dataset": "flickr30k"})
    source = opened(tmp_path, kind="karpathy", file="dataset.json", split="train+restval")
    assert len(source) == 2
    assert source[0].texts[0].text == ("A dog, number 1.", "A pet.")
    assert file_of(source[1].images[0]) == tmp_path / "val2014/3.jpg"
    assert len(opened(tmp_path, kind="karpathy", file="dataset.json")) == 1
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        opened(tmp_path, kind="karpathy", file="dataset.json", split="tests")


def test_nlvr_examples_are_six_pictures_each(write, tmp_path):
    rows = [{"sentence": "There is a box.", "label": "true", "identifier": "7-0", "directory": "3"}]
    write("dev.jsonl", rows)
    (tmp_path / "images/3").mkdir(parents=True)
    for k in range(6):
        (tmp_path / f"images/3/dev-7-0-{k}.png").write_bytes(RED)
    source = opened(tmp_path, kind="nlvr", file="dev.jsonl", image_folder="images", suffix="true or false?")
    assert len(source) == 6
    assert source[5].images[0].source.read() == RED
    assert source[0].meta == {"answers": ("true",), "group": "7-0"}
    assert source[0].texts[0].text == "There is a box.\ntrue or false?"
    write_tar(tmp_path / "dev.tar", [(f"dev-7-0-{k}.png", RED) for k in range(6)])
    assert opened(tmp_path, kind="nlvr", file="dev.jsonl", images="dev.tar")[2].images[0].source.read() == RED
    assert len(opened(tmp_path, kind="nlvr", file="dev.jsonl", images="dev.tar", permutations=1)) == 1


def test_gqa_kinds(write, tmp_path):
    question = {"question": "What is it?", "answer": "dog", "imageId": "n1", "types": {"structural": "query"}}
    write("g.json", {"5": question, "6": {**question, "answer": None}})
    source = opened(tmp_path, kind="gqa", file="g.json")
    assert (source[0].id, source[0].meta["kind"], source[0].meta["answers"]) == ("gqa/5", "query", ("dog",))
    with pytest.raises(DataError, match="empty answer"):
        source[1]
    write("list.json", [question])
    with pytest.raises(DataError, match="is not a GQA file"):
        opened(tmp_path, kind="gqa", file="list.json")


QUESTION = {"question": "What is it?", "answer": "dog", "imageId": "n1"}
POPE = {"question_id": 3, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
NLVR = {"sentence": "There is a box.", "label": "true", "identifier": "7-0"}
PICTURE = {"filename": "1.jpg", "imgid": 1, "split": "test", "sentences": [{"raw": "A dog."}]}


def without(item, name):
    return {key: value for key, value in item.items() if key != name}


def of_vqa(question=None, annotation=None):
    asked, told = QUESTIONS["questions"][0] | (question or {}), ANNOTATIONS["annotations"][1] | (annotation or {})
    drop = [{k: v for k, v in item.items() if v != "-"} for item in (asked, told)]
    return VQA, {"q.json": {"questions": drop[:1]}, "a.json": {"annotations": drop[1:]}}


@pytest.mark.parametrize(
    ("spec", "files", "words"),
    [
        (*of_vqa(question={"image_id": "-"}), "question 70 has no 'image_id'"),
        (*of_vqa(question={"image_id": "abc"}), "question 70: 'image_id' should be a number and is 'abc'"),
        (*of_vqa(question={"question": "-"}), "question 70 has no 'question'"),
        (*of_vqa(annotation={"answers": "-"}), "question 70 has no 'answers'"),
        (*of_vqa(annotation={"answers": None}), "question 70: 'answers' should not be 'None'"),
        (*of_vqa(annotation={"answers": ["cat"]}), "question 70 has no 'answer'"),
        (*of_vqa(annotation={"answers": [{"answer": None}]}), "question 70: 'answer' should not be 'None'"),
        (
            {"kind": "gqa", "file": "g.json"},
            {"g.json": {"5": without(QUESTION, "imageId")}},
            "question 5 has no 'imageId'",
        ),
        (
            {"kind": "gqa", "file": "g.json"},
            {"g.json": {"5": without(QUESTION, "question"), "6": QUESTION}},
            "question 5 has no 'question'",
        ),
        ({"kind": "pope", "file": "p.jsonl"}, {"p.jsonl": [without(POPE, "image")]}, "question 3 has no 'image'"),
        (
            {"kind": "nlvr", "file": "d.jsonl"},
            {"d.jsonl": [without(NLVR, "sentence")]},
            "example 7-0 has no 'sentence'",
        ),
        (
            {"kind": "karpathy", "file": "k.json"},
            {"k.json": {"images": [PICTURE | {"sentences": [{"tokens": ["a"]}]}]}},
            "picture 1 has no 'raw'",
        ),
        (
            {"kind": "karpathy", "file": "k.json"},
            {"k.json": {"images": [without(PICTURE, "filename")]}},
            "picture 1 has no 'filename'",
        ),
        (
            SCIENCE,
            {"problems.json": {"1": without(PROBLEM, "choices")}, "splits.json": {"test": ["1"]}},
            "problem 1 has no 'choices'",
        ),
    ],
)
def test_a_bad_sample_is_named_with_its_field(write, tmp_path, spec, files, words):
    for name, content in files.items():
        write(name, content)
    with pytest.raises(DataError, match=f"^(missing|bad) field: {words}"):
        opened(tmp_path, **spec)[0]


def test_a_number_and_its_text_are_one_id(write, tmp_path):
    write("q.json", QUESTIONS)
    write("a.json", {"annotations": [a | {"question_id": str(a["question_id"])} for a in ANNOTATIONS["annotations"]]})
    assert opened(tmp_path, **VQA)[1].id == "vqa/70"


@pytest.mark.data
def test_samples_of_the_real_files(real_data):
    formats = real_data / "formats"
    vqa = open_source({**VQA, "questions": "vqav2/questions.json", "annotations": "vqav2/annotations.json"},
                      data_root=formats)  # fmt: skip
    assert len(vqa) == 3
    assert len(must_be(tuple, vqa[0].meta["answers"])) == 10
    assert vqa[0].texts[-1].text == "net"
    assert file_of(vqa[0].images[0]).name == "COCO_train2014_000000458752.jpg"
    gqa = open_source({"kind": "gqa", "file": "gqa/questions.json"}, data_root=formats)
    assert (
        str(render(gqa[0], "vicuna_bare"))
        == "USER: <image>\nWhat is hanging above the chalkboard? ASSISTANT: picture</s>"
    )
    assert gqa[0].meta == {"kind": "query", "answers": ("picture",)}
    made = open_source(
        {**VQA, "questions": "questions.json", "annotations": "annotations.json"},
        data_root=real_data / "metrics/vqa_accuracy",
    )
    assert len(made) == 54


@pytest.mark.data
def test_nlvr_as_published(real_data):
    source = open_source(
        {"kind": "nlvr", "file": "nlvr/dev.jsonl", "images": "nlvr/dev-000.tar", "suffix": "true or false?"},
        data_root=real_data,
    )
    assert len(source) == 5934
    assert len({source[n].meta["group"] for n in range(5934)}) == 989
    share = sum(source[n].meta["answers"] == ("true",) for n in range(5934)) / 5934
    assert round(100 * share, 1) == 55.3
    assert must_be(bytes, source[0].images[0].source.read())[:4] == b"\x89PNG"


def test_vizwiz_and_textvqa_in_their_official_forms(write, tmp_path):
    ten = [{"answer": a, "answer_confidence": "yes"} for a in ("dark", "red", "red")]
    entry = {"image": "v.jpg", "question": "q?", "answers": ten, "answer_type": "other", "answerable": 1}
    write("viz.json", [entry, {"image": "w.jpg", "question": "r?"}])
    assert guess(tmp_path / "viz.json")["kind"] == "vizwiz"
    source = open_source({"kind": "vizwiz", "file": "viz.json"}, data_root=tmp_path)
    record = source[0]
    assert (record.texts[-1].text, record.meta) == ("red", {"kind": "other", "answers": ("dark", "red", "red")})
    with pytest.raises(DataError, match=r"missing field: question about w.jpg has no 'answers'"):
        source[1]
    item = {"question_id": 7, "image_id": "f0", "question": "q?", "answers": ["b", "a", "a"], "ocr_tokens": ["x"]}
    write("text.json", {"dataset_name": "textvqa", "data": [item]})
    assert guess(tmp_path / "text.json")["kind"] == "textvqa"
    record = open_source({"kind": "textvqa", "file": "text.json"}, data_root=tmp_path)[0]
    assert (record.id, record.texts[-1].text, record.meta["answers"]) == ("textvqa/7", "a", ("b", "a", "a"))
    assert record.images[0].source.describe().endswith("f0.jpg")
