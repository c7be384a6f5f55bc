import json

import pytest

from isthmus.errors import DataError
from isthmus.evaluation import Results
from isthmus.evaluation.retrieval import score as retrieval_score
from isthmus.evaluation.vqa import score as vqa_score
from tests.evaluation.fakes import changed, row

ROW = row(answer="yes", truth=["yes"], kind="k", blind="no", shuffled="yes", prior="no")


def test_results_are_fractions_by_model_with_what_is_needed_to_read_them(tmp_path):
    results = Results(seed=3, seconds={"clip": 1.5})
    results.add("llava", vqa_score([ROW, changed(ROW, shuffled="no")]))
    results.add("clip", retrieval_score([0, 1], [[0], [0]]))
    path = results.write(tmp_path / "deep" / "results.json")
    facts = json.loads(path.read_text())
    llava = facts["models"]["llava"]
    assert [llava[k] for k in ("accuracy", "blind", "shuffled", "prior", "gain")] == [1.0, 0.0, 0.5, 0.0, 0.5]
    assert llava["kinds"]["k"]["gain"] == 0.5
    assert facts["models"]["clip"]["recall_at_1"] == 0.5
    assert facts["seed"] == 3
    assert facts["seconds"] == {"clip": 1.5}
    assert "torch" in facts["versions"]
    assert facts["machine"]["cores"] >= 1
    assert Results.read(path) == results
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_two_tasks_do_not_overwrite_each_other():
    results = Results(seed=0)
    results.add("llava", vqa_score([ROW]))
    with pytest.raises(DataError, match="accuracy"):
        results.add("llava", vqa_score([ROW]))


@pytest.mark.parametrize("content", ["", "[]", '{"models": {}}'])
def test_what_is_no_results_file_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"results\.json"):
        Results.read(path)
    with pytest.raises(DataError, match="no results"):
        Results.read(tmp_path / "missing.json")
