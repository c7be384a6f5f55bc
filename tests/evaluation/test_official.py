"""Official files: what is wrong with them is said with file, id and cure; scores equal the reference ones (data)."""

import json

import pytest

from isthmus.errors import ConfigError, DataError, IsthmusWarning
from isthmus.evaluation import official
from isthmus.evaluation.rescore import compare, read_folder, rescore
from isthmus.evaluation.scored_files import score_files, write_folder

CAPTIONS = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "A man rides a wave."},
        {"id": 11, "image_id": 1, "caption": "A surfer on a wave"},
        {"id": 12, "image_id": 2, "caption": "Two dogs sit on a red sofa"},
    ],
}
GIVEN = [{"image_id": 2, "caption": "a red sofa"}, {"image_id": 1, "caption": "a man rides a wave"}]


def question(number, *answers, kind="other"):
    return {
        "question_id": number,
        "answer_type": kind,
        "question_type": "what is",
        "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers)],
    }


VQA = {
    "annotations": [
        question(1, *["red"] * 7, *["blue"] * 3),
        question(2, *["yes"] * 10, kind="yes/no"),
        question(3, *["racing"] * 5, *["race"] * 5),
    ]
}
ANSWERS = [
    {"question_id": 1, "answer": "Blue"},
    {"question_id": 2, "answer": "yes"},
    {"question_id": 3, "answer": ""},
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_captions_by_item_and_corpus(write):
    scores = score_files(write("r.json", CAPTIONS), write("p.json", GIVEN), "caption")
    facts = scores.facts
    assert list(facts["per_item"]) == ["1", "2"]
    assert facts["per_item"]["1"]["ROUGE_L"] == 1.0
    assert set(facts["corpus"]) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert (facts["n"], facts["empty"], facts["left_out"]) == (2, 0, 0)
    assert facts["scorer"] == {"name": "caption", "version": 1}


def test_vqa_by_item_type_and_corpus(write):
    facts = score_files(write("r.json", VQA), write("p.json", ANSWERS), "vqa").facts
    blue = (7 * 1 + 3 * 2 / 3) / 10
    assert facts["per_item"] == {
        "1": {"vqa_accuracy": pytest.approx(blue)},
        "2": {"vqa_accuracy": 1.0},
        "3": {"vqa_accuracy": 0.0},
    }
    assert facts["corpus"]["vqa_accuracy"] == pytest.approx((blue + 1) / 3)
    assert facts.get("by_answer_type") == {"other": pytest.approx(blue / 2), "yes/no": 1.0}
    assert facts["empty"] == 1, "an empty answer is counted, not refused"


def test_ok_vqa_stems(write):
    rows = [*ANSWERS[:2], {"question_id": 3, "answer": "races"}]
    assert score_files(write("r.json", VQA), write("p.json", rows), "ok-vqa").facts["per_item"]["3"] == {
        "vqa_accuracy": 1.0
    }


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        ([*GIVEN, {"image_id": 3, "caption": "x"}], "1 predictions are for ids that the references do not hold (3)"),
        ([*GIVEN, {"image_id": "1", "caption": "x"}], "the image_id 1 is there twice"),
        (GIVEN[:1], "1 of 2 items have no prediction (1)"),
        ([{"image_id": 1}, GIVEN[0]], "entry 0: a prediction needs `image_id` and `caption`; it has image_id"),
        ([{"image_id": 1, "caption": None}, GIVEN[0]], "the caption of 1 should be a text and is NoneType"),
        ("{", "not valid JSON"),
        ({"1": "a man"}, "a prediction needs"),
    ],
)
def test_bad_predictions(write, predictions, words):
    with pytest.raises(DataError) as error:
        score_files(write("r.json", CAPTIONS), write("p.json", predictions), "caption")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("references", "task", "words"),
    [
        ({"annotations": [*CAPTIONS["annotations"], CAPTIONS["annotations"][0]]}, "caption", "annotation id 10"),
        ({"annotations": [{"image_id": 1}]}, "caption", "annotation 0 has no `caption`"),
        (VQA, "caption", "is not a COCO captions file"),
        (CAPTIONS, "vqa", "is not a VQA annotation file"),
        ({"annotations": [VQA["annotations"][0]] * 2}, "vqa", "question id 1 is there twice"),
        ({"annotations": [question(1)]}, "vqa", "question 1 has no list of answers"),
        ([], "vqa", "needs a list `annotations`"),
    ],
)
def test_bad_references(write, references, task, words):
    with pytest.raises(DataError) as error:
        score_files(write("r.json", references), write("p.json", GIVEN if task == "caption" else ANSWERS), task)
    assert words in str(error.value)


def test_a_subset_is_scored_only_when_asked_for_and_said(write):
    with pytest.warns(IsthmusWarning, match="with one picture all weights are 0, and so is CIDEr"):
        facts = score_files(write("r.json", CAPTIONS), write("p.json", GIVEN[:1]), "caption", subset=True).facts
    assert (facts["n"], facts["left_out"]) == (1, 1)
    with pytest.raises(DataError, match="no item has a prediction"):
        score_files(write("r.json", CAPTIONS), write("p.json", ""), "caption", subset=True)


def test_unknown_tasks_and_metrics(write):
    files = write("r.json", CAPTIONS), write("p.json", GIVEN)
    with pytest.raises(ConfigError, match="did you mean 'caption'"):
        score_files(*files, "captions")
    with pytest.raises(ConfigError, match="did you mean 'METEOR'"):
        score_files(*files, "caption", metrics=["METEORS"])
    with pytest.raises(ConfigError, match="SPICE scores captions"):
        score_files(*files, "vqa", metrics=["SPICE"])


@pytest.mark.parametrize(
    ("task", "references", "given"), [("caption", CAPTIONS, GIVEN), ("vqa", VQA, ANSWERS), ("ok-vqa", VQA, ANSWERS)]
)
def test_a_score_folder_is_scored_again_to_the_same(write, tmp_path, task, references, given):
    files = write("r.json", references), write("p.json", given)
    scores = score_files(*files, task)
    write_folder(tmp_path / "f", scores, *files)
    before = (tmp_path / "f/scores.json").read_bytes()
    again = rescore(tmp_path / "f")
    assert (tmp_path / "f/scores.json").read_bytes() == before
    facts = again.scores.to_dict()
    for name, value in scores.facts["corpus"].items():
        assert facts["accuracy" if name == "vqa_accuracy" else name] == pytest.approx(value)
    assert json.loads((tmp_path / "f/manifest.json").read_text())["scorer"]["version"] == 1
    assert [d.difference for d in compare(tmp_path / "f", tmp_path / "f")] == [0.0] * (6 if task == "caption" else 1)
    with pytest.raises(ConfigError, match="not empty"):
        write_folder(tmp_path / "f", scores, *files)


def test_ids_of_both_spellings_are_one(write):
    path = write("p.json", [{"image_id": "1", "caption": "x"}])
    assert official.predictions(path, "image_id", "caption") == {"1": "x"}


@pytest.mark.data
def test_files_of_the_fixtures(real_data, tmp_path):
    folder = real_data / "metrics/vqa_accuracy"
    expected = json.loads((folder / "expected.json").read_text())["accuracy"]
    facts = score_files(folder / "annotations.json", folder / "results.json", "vqa").facts
    assert round(100 * facts["corpus"]["vqa_accuracy"], 2) == expected["overall"]
    for ours, theirs in (("by_answer_type", "perAnswerType"), ("by_question_type", "perQuestionType")):
        assert {k: round(100 * v, 2) for k, v in facts[ours].items()} == expected[theirs]
    captions = real_data / "metrics/coco_human500"
    corpus = score_files(captions / "references.json", captions / "candidates.json", "caption").facts["corpus"]
    expected = json.loads((captions / "expected.json").read_text())["corpus"]
    assert all(value == pytest.approx(expected[name], abs=1e-4) for name, value in corpus.items())


def test_half_a_surrogate_pair_is_kept(write, tmp_path):
    """As JSON writes it: UTF-8 has no place for it."""
    files = write("r.json", CAPTIONS), write("p.json", [{**GIVEN[0], "caption": "a \ud83d sofa"}, GIVEN[1]])
    write_folder(tmp_path / "f", score_files(*files, "caption"), *files)
    assert [r.get("answer") for r in read_folder(tmp_path / "f").rows] == [GIVEN[1]["caption"], "a \ud83d sofa"]


def test_deep_nesting_is_said_in_words(write):
    deep = write("deep.json", "[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        score_files(deep, write("p.json", ANSWERS), "vqa")
    with pytest.raises(DataError, match="nested too deeply"):
        score_files(write("r.json", VQA), deep, "vqa")


@pytest.mark.parametrize("written", [["A surfer", "A man, riding"], "['A surfer', 'A man, riding']"])
def test_references_in_a_list_count_one_by_one(write, written):
    listed = {"annotations": [{"id": 1, "image_id": 1, "caption": written}, CAPTIONS["annotations"][2]]}
    assert official.caption_references(write("r.json", listed))["1"] == ["A surfer", "A man, riding"]
    alone = [{"image_id": 1, "caption": '["a man"]'}]
    assert official.predictions(write("p.json", alone), "image_id", "caption") == {"1": "a man"}
    with pytest.raises(DataError, match="the caption of 1 is a list of 2 texts; one is scored"):
        official.predictions(write("p.json", [{"image_id": 1, "caption": written}]), "image_id", "caption")
    with pytest.raises(DataError, match=r"r.json: caption of 1: bad list: .* cannot be read as one"):
        official.caption_references(write("r.json", {"annotations": [{"image_id": 1, "caption": "['a', 'b"}]}))


def test_vizwiz_and_textvqa_are_scored_in_their_own_forms(write):
    viz = [{"image": f"{n}.jpg", "question": "q", "answers": question(n, *["red"] * 10)["answers"]} for n in (1, 2)]
    given = [{"image": "1.jpg", "answer": "red"}, {"image": "2.jpg", "answer": "blue"}]
    facts = score_files(write("r.json", viz), write("p.json", given), "vqa").facts
    assert facts["per_item"] == {"1.jpg": {"vqa_accuracy": 1.0}, "2.jpg": {"vqa_accuracy": 0.0}}
    text = {"data": [{"question_id": 1, "image_id": "x", "question": "q", "answers": ["red"] * 10}]}
    facts = score_files(write("r.json", text), write("p.json", [{"question_id": 1, "answer": "red"}]), "vqa").facts
    assert facts["corpus"] == {"vqa_accuracy": 1.0}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            ["yes<|im_end|>\n<|endoftext|>", "no</s>", "no"],
            r"2 of 3 answers end in the text of a stop token \(<\|endof",
        ),
        (["", " ", ""], "All 3 answers are empty"),
    ],
)
def test_what_says_little_is_said_once(write, answers, words):
    given = [{"question_id": n, "answer": a} for n, a in enumerate(answers, start=1)]
    with pytest.warns(IsthmusWarning, match=words) as said:
        score_files(write("r.json", VQA), write("p.json", given), "vqa")
    assert len(said) == 1
