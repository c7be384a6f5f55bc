"""The side-by-side benchmark in small sizes: both sides must agree before anything is timed."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks.side_by_side import __main__ as bench
from benchmarks.side_by_side import roofline
from benchmarks.side_by_side.models import TINY
from benchmarks.side_by_side.rows import ROWS


@pytest.mark.parametrize("name", ["llava2", "blip2_gen", "flamingo_idefics", "flamingo_idefics_gen", "rank32"])
def test_both_sides_of_a_row_agree(name):
    ours, theirs = ROWS[name].make(TINY, 2)
    assert bench.equal(ours(), theirs()) is None


def test_a_run_writes_figures_and_names_what_it_cannot_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    words = ["--tiny", "--rows", "2", "--pairs", "2", "--only", "blip2_gen", "flamingo_of", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench", *words])
    monkeypatch.setattr(bench, "PEERS", tmp_path / "nobody")
    bench.main()
    facts = json.loads(file.read_text())
    row = facts["rows"]["blip2_gen"]
    assert row["ratio"] > 0
    assert {"peer", "ours", "peer_name"} <= set(row)
    assert "skipped" in facts["rows"]["flamingo_of"]
    assert "| blip2_gen | transformers |" in file.with_suffix(".md").read_text()
    assert {"cpu", "flags", "threads", "versions", "rates", "peer_rates", "our_products"} <= set(facts["machine"])
    assert row["work"]["ours"]["gflop"] > 0
    assert set(row["memory"]) == {"peer", "ours"}


def test_work_counts_products_and_what_is_read_and_written():
    left, right = torch.randn(30, 20), torch.randn(20, 50)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), roofline.WorkCounter() as counted:
            torch.nn.functional.linear(left, right.T).view(-1)
        assert counted.flops == 2 * 30 * 20 * 50
        assert counted.bytes == 4 * (30 * 20 + 20 * 50 + 30 * 50)
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    with roofline.WorkCounter() as counted:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counted.flops == 2 * (2 * 8 * 8 * 16) * 2 * (1 + 2.5)  # the backward pass makes the weights anew
    machine = {"gflops": 100.0, "gbs": 10.0}
    assert roofline.bound({"gflop": 200.0, "gb": 1.0}, machine) == (2.0, "products")
    assert roofline.bound({"gflop": 1.0, "gb": 20.0}, machine) == (2.0, "bytes")


@pytest.mark.skipif(not roofline.CLEAR.exists(), reason="the peak of memory is read where Linux tells it")
def test_the_peak_is_what_a_side_adds_and_frees_again():
    assert 90 < (roofline.peak_mib(lambda: torch.ones(25 * 2**20).sum()) or 0) < 130


def test_sides_that_differ_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(ROWS, "rank32", bench.Row("x", lambda sizes, rows: (lambda: [1.0], lambda: [1.1])))
    monkeypatch.setattr("sys.argv", ["bench", "--tiny", "--only", "rank32"])
    with pytest.raises(SystemExit, match="rank32: the two sides do not agree"):
        bench.main()
    assert bench.equal([[1, 2], [3]], [[1, 2], [4]]) == "1 of 2 texts are equal"
    assert bench.equal([1.0], [1.0, 2.0]) == "1 against 2 results"


def test_in_bf16_losses_and_scores_are_near_and_texts_are_free():
    half = replace(TINY, dtype=torch.bfloat16)
    for name in ("llava2", "blip2", "rank32", "blip2_gen", "llava2"):  # the nets are float32 again when they train
        ours, theirs = ROWS[name].make(half, 2)
        assert bench.equal(ours(), theirs(), half.dtype) is None
    whole = [side() for side in ROWS["llava2"].make(TINY, 2)]
    assert all(0 < abs(side() - loss) < 0.1 for side, loss in zip((ours, theirs), whole, strict=True))
    assert bench.equal([1.0], [1.1], half.dtype) == "they differ by 9.1e-02"
    assert bench.equal([[1, 2]], [[1, 3]], half.dtype) is None
