"""What ranks all items, in two processes: each encodes a part, and the files are those of one process."""

from collections import Counter

import pytest

from isthmus.checkpoint import read_json
from tests.evaluation import sharing_ranks as ranks
from tests.spawning import free_port, spawn


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    spawn(ranks.run, 2, free_port(), str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, ranks.evaluations(folder)


@pytest.mark.parametrize("name", ranks.TASKS)
def test_two_processes_write_what_one_does(both, alone, name):
    for file in ("manifest.json", "outputs.jsonl", "scores.json"):
        assert (both / name / file).read_text() == (alone[0] / name / file).read_text(), file


@pytest.mark.parametrize("name", ranks.TASKS)
def test_each_process_encodes_a_part(both, alone, name):
    parts = [Counter(read_json(both / f"{number}.json")["made"][name]) for number in range(2)]
    whole = Counter(alone[1][name])
    for what in set(whole) - {"matched"}:  # a picture whose pairs are in both parts is read by both
        assert parts[0][what] + parts[1][what] == whole[what], what
        assert max(part[what] for part in parts) <= whole[what] // 2 + 2 * ranks.CHUNK, what
    if name == "rerank":
        assert parts[0]["matched"] + parts[1]["matched"] <= whole["matched"] + 4


def test_what_one_process_finds_wrong_is_raised_by_both(both):
    said = [read_json(both / f"{number}.json")["said"] for number in range(2)]
    assert said[0] == said[1]
    assert "number 0;" in said[0]["w1"]
    assert "number 4;" in said[0]["w6"]
    for what in ("rows", "scores"):
        assert f"its {what} hold what JSON cannot say" in said[0][what]


def test_other_batches_would_be_seen(alone, tmp_path):
    """The test above can fail: with other chunks the same model ranks otherwise."""
    ranks.evaluate(ranks.Batched(), ranks.task("retrieval"), tmp_path, chunk=ranks.CHUNK + 1)
    file = "retrieval/outputs.jsonl"
    assert (tmp_path / "outputs.jsonl").read_text() != (alone[0] / file).read_text()
