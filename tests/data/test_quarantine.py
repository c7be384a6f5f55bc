"""Quarantine: written once, counted by reason, and a stop when there is too much of it."""

import json

import pytest

from isthmus.data.quarantine import Quarantine
from isthmus.errors import DataError


def test_written_once_even_over_a_resume(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path)
    first.add("a", "s", "broken image: a.png is truncated")
    first.add("a", "s", "broken image: a.png is truncated")
    first.add("a", "t", "missing image: none")
    with open(path, "a") as file:
        file.write('{"id": "half')
    again = Quarantine(path)
    assert len(again) == 2
    again.add("a", "s", "broken image: a.png is truncated")
    again.add("b", "s", "broken image: half\ud83d pair")
    assert again.reasons() == {"broken image": 2, "missing image": 1}
    assert (first.failures, again.failures) == (3, 2)
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(r)["id"] for r in rows][:2] == ["a", "a"]
    assert len(Quarantine(path)) == 3


def test_two_samples_of_one_id_are_told_apart_by_their_reasons(tmp_path):
    """As LLaVA's own file has them, several conversations to a picture."""
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.add("a", "s", "empty answer: turn 2")
    quarantine.add("a", "s", "missing image: none")
    quarantine.add("a", "s", "missing image: none")  # the next epoch, or another sample
    assert (len(quarantine), len(Quarantine(tmp_path / "q.jsonl"))) == (2, 2)
    assert quarantine.summary().startswith("2 bad samples were left out (empty answer 1, missing image 1)")
    for reason in ("empty answer: x", "missing image: x", "bad pair: x", "bad pair: y", "bad list: x", "bad text: x"):
        quarantine.add("b", "s", reason)
    summary = "8 bad samples were left out (empty answer 2, missing image 2, bad pair 2, others 2)"
    assert quarantine.summary().startswith(summary)


def test_stops_above_the_threshold_but_not_before_enough_was_seen(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", threshold=0.02, after=100)
    for n in range(3):
        quarantine.add(str(n), "s", f"broken image: {n}.png is truncated")
    quarantine.count_read(99)
    with pytest.raises(DataError, match=r"3 of 100 samples are bad.*2\.0%.*broken image \(3\).*0\.png.*q\.jsonl"):
        quarantine.count_read(1)
    fine = Quarantine(threshold=0.02, after=100)
    for n in range(2):
        fine.add(str(n), "s", "x")
    fine.count_read(100)
    assert fine.samples == 100


def test_ends_of_lines_within_a_text_are_none(tmp_path):
    Quarantine(tmp_path / "q.jsonl").add("a\u2028b", "s", "bad text: \x85 and \x0b")
    again = Quarantine(tmp_path / "q.jsonl")
    again.add("a\u2028b", "s", "bad text: \x85 and \x0b")
    assert len(again) == 1
    assert (tmp_path / "q.jsonl").read_text(encoding="utf-8").count("\n") == 1
