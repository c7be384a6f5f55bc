"""What is told of a run's folder: its stages, counts, losses and score tables, whatever state its files are in."""

import json
from pathlib import Path

import pytest

from isthmus.cli.serve import folder
from isthmus.pretrained import FOLDER
from isthmus.serving.run_facts import MOST_POINTS, scores, training


def run(place, lines, *names):
    stages = [{"stage": {"name": name}} for name in names]
    (place / "run.json").write_text(json.dumps({"recipe": {"stages": stages}}))
    stage = place / "stages" / names[0]
    stage.mkdir(parents=True)
    rows = [{"part": "connector", "parameters": 12, "trained": 8, "rates": []}]
    (stage / "stage.json").write_text(json.dumps({"table": {"rows": rows}}))
    (stage / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 9, "lo')
    return stage


def test_stages_tell_counts_steps_and_losses(tmp_path):
    lines = [{"step": n, "loss": {"lm": 5.0 - n, "itc": 1.0}, "seconds": 2.5 * n} for n in (1, 2, 3)]
    lines[2]["loss"]["itc"] = float("nan")
    run(tmp_path, lines, "align", "instruct")
    align, instruct = training(tmp_path)
    assert align == {
        "name": "align",
        "steps": 3,
        "seconds": 7.5,
        "parts": [{"part": "connector", "parameters": 12, "trained": 8}],
        "curves": {"lm": [(1, 4.0), (2, 3.0), (3, 2.0)], "itc": [(1, 1.0), (2, 1.0)]},
        "problem": "",
    }
    assert (instruct["name"], instruct["steps"], instruct["curves"]) == ("instruct", 0, {})
    assert training(tmp_path / "nowhere") == []


def test_a_long_curve_is_thinned_by_means(tmp_path):
    run(tmp_path, [{"step": n, "loss": {"lm": float(n % 2)}} for n in range(1, 1001)], "align")
    (points,) = training(tmp_path)[0]["curves"].values()
    assert len(points) == MOST_POINTS
    assert points[-1][0] == 1000
    assert sum(loss for _, loss in points) / len(points) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"recipe": 3}', '{"recipe": {"stages": [{}]}}', '{"table": {"rows": [3]}}']
)
def test_damaged_files_are_a_problem_in_words(tmp_path, text):
    stage = run(tmp_path, [], "align")
    (stage / "stage.json").write_text(text)
    assert training(tmp_path)[0]["problem"]
    (tmp_path / "run.json").write_text(text)
    assert training(tmp_path)[0]["problem"] == "its run.json cannot be read"
    (tmp_path / "results.json").write_text(text)
    assert all(table["problem"] for table in scores(tmp_path / "llava"))


def test_models_of_the_package_tell_their_scores():
    told = {name: scores(FOLDER / name) for name in ("clip", "blip2", "llava", "flamingo")}
    results = json.loads((FOLDER / "results.json").read_text())["models"]
    assert [table["task"] for table in told["flamingo"]] == ["flamingo", "flamingo-clips"]
    retrieval, answers, _ = told["blip2"]  # the last: zero-shot
    assert retrieval["columns"][0] == "direction"
    assert answers["columns"][0] == "questions"
    whole = told["llava"][0]["rows"][-1]
    assert whole[:3] == ["all", "2400", f"{100 * results['llava']['accuracy']:.1f}"]
    assert told["clip"][0]["rows"][0][0] == "image to text"


def test_the_folder_of_a_model_is_that_of_its_run(tmp_path):
    (tmp_path / "model").mkdir()
    assert folder(str(tmp_path / "model")) == tmp_path / "model"
    (tmp_path / "run.json").write_text("{}")
    assert folder(str(tmp_path / "model")) == tmp_path
    assert folder("isthmus:clip") == FOLDER / "clip"
    assert folder("some/model") == Path("some/model")
