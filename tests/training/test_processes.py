"""Several processes train as one does: gradients, weights, resume, signals, and what is not finite."""

import os
import re
import shutil
import socket
import time

import pytest
import torch

from isthmus import processes
from isthmus.errors import CheckpointError, ConfigError
from isthmus.processes import LostError
from isthmus.training import train
from isthmus.training.log import read_metrics
from isthmus.training.state import checkpoints
from tests.spawning import free_port, spawn

from . import process_ranks as ranks
from .toys import ToyLoader, make_batch

TIMES = ("seconds", "tokens_per_second", "data_wait")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder that two processes wrote into, and what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(ranks.run, 2, free_port(), str(folder))
    return folder, [torch.load(folder / f"rank{n}.pt") for n in range(2)]


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("case", range(len(ranks.SPLITS)))
def test_any_split_over_processes_gives_the_gradient_of_one(both, case):
    expected = ranks.gradient(ranks.net(), [make_batch([1, 2, 3, 4])])
    for found in both[1]:
        gradients = dict(found["gradients"][case])
        assert gradients.pop("means") == pytest.approx(expected["means"], abs=1e-12)
        assert gradients.keys() == expected.keys() - {"means"}
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=0)


def test_a_tensor_that_one_process_reaches_has_its_gradient_in_all(both):
    first, second = (found["one open"] for found in both[1])
    assert first["language.head.weight"].abs().max() > 0
    assert torch.equal(first["language.head.weight"], second["language.head.weight"])


def test_what_is_told_may_be_long(both):
    assert all(found["told"] == ["", "a" * 10_000] for found in both[1])


def test_training_ends_as_in_one_process_and_with_equal_bits_in_all(both, tmp_path):
    alone = ranks.net()
    train(alone, ToyLoader(), ranks.stage(), tmp_path, progress=False)
    first, second = (found["weights"] for found in both[1])
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-9, rtol=0)
    for one, two in zip(lines(tmp_path), lines(both[0] / "whole"), strict=True):
        assert {k: one[k] for k in ("step", "order", "samples", "supervised")} == {
            k: two[k] for k in ("step", "order", "samples", "supervised")
        }
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)


def test_a_signal_to_one_process_stops_all_and_the_same_call_goes_on(both):
    folder, found = both
    for each in found:
        assert len(set(each["stopped"])) == 1
        assert "after step 4" in each["stopped"][0]
    assert lines(folder / "stopped") == lines(folder / "whole")
    assert [p.name for p in checkpoints(folder / "stopped")] == [p.name for p in checkpoints(folder / "whole")]


def test_shards_stop_go_on_and_come_out_as_one_whole_net(both, tmp_path):
    """Written by two processes that hold half of every tensor, the state is as one process writes it."""
    alone = ranks.net()
    train(alone, ToyLoader(), ranks.stage(), tmp_path, progress=False)
    for each in both[1]:
        heard, weights = each["sharded"]
        assert "after step 4" in heard[0]
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-9, rtol=0)
    for one, two in zip(lines(tmp_path), lines(both[0] / "sharded"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)


def test_one_process_goes_on_from_the_shards_of_two(both, tmp_path):
    shutil.copytree(both[0] / "sharded", tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    net = ranks.net()
    assert train(net, ToyLoader(), ranks.stage(), tmp_path / "run", progress=False).resumed == 4
    for name, value in net.state_dict().items():
        torch.testing.assert_close(both[1][0]["sharded"][1][name], value, atol=1e-9, rtol=0)


@pytest.mark.slow  # nine processes are started
def test_a_sharded_run_goes_on_in_another_number_of_processes(tmp_path):
    """Four, two, three, and at last one that holds all: the samples' order and the net of one process throughout."""
    alone, last = ranks.net(), ranks.net()
    train(alone, ToyLoader(), ranks.stage(8), tmp_path / "alone", progress=False)
    place = tmp_path / "elastic"
    for world, stop_at in ((4, 2), (2, 4), (3, 6)):
        spawn(ranks.run_a_while, world, free_port(), str(place), stop_at)
        newest = checkpoints(place)[-1]
        assert newest.name == f"step-00000{stop_at}"
        assert len(list(newest.glob("shard-*.safetensors"))) == world
        assert {file.suffix for file in newest.iterdir()} == {".safetensors", ".json"}  # nothing to unpickle
    assert train(last, ToyLoader(), ranks.stage(8), place, progress=False).resumed == 6
    for one, two in zip(lines(tmp_path / "alone"), lines(place), strict=True):
        assert one["order"] == two["order"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_damaged_shard_is_named(both, tmp_path, damage):
    shutil.copytree(both[0] / "sharded", tmp_path / "run")
    shard = sorted(checkpoints(tmp_path / "run")[-1].glob("shard-*"))[1]
    if damage == "lost":
        shard.unlink()
    else:
        written = bytearray(shard.read_bytes())
        written[-3] ^= 1
        shard.write_bytes(written)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is (missing|damaged).*goes on from step-000004"):
        train(ranks.net(), ToyLoader(), ranks.stage(), tmp_path / "run", progress=False)


def test_a_nan_in_one_process_stops_all(both):
    for each in both[1]:
        for case in each["non-finite"]:
            assert all(said == "the loss 'lm' is nan" for said in case)


def test_frozen_matrices_in_bf16_come_back_as_they_were(both):
    for each in both[1]:
        for before, widths, after in each["half"]:
            assert widths == {torch.bfloat16}
            for name, value in after.items():
                assert value.dtype == torch.float32
                assert torch.equal(value, before[name]) != name.startswith("connector")
        for value, other in zip(*(after.values() for _, _, after in each["half"]), strict=True):
            torch.testing.assert_close(value, other, atol=1e-3, rtol=0)


def test_a_full_disk_of_one_process_is_reported_by_all_and_loses_nothing(both):
    folder, found = both
    for each in found:
        for said in each["full"]:
            assert "step-000004: process 1: " in said
            assert "No space left on device" in said
            assert "What was saved before is intact" in said
    assert [p.name for p in (folder / "full" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_folder_that_cannot_be_written_is_told_by_all(both):
    for each in both[1]:
        assert all("Cannot write in" in said and "closed/checkpoints" in said for said in each["closed"])


def test_a_run_goes_on_in_another_number_of_processes_and_says_so(both, tmp_path):
    shutil.copytree(both[0] / "whole", tmp_path / "run")
    for step in checkpoints(tmp_path / "run")[-1:]:
        shutil.rmtree(step)
    net = ranks.net()
    result = train(net, ToyLoader(), ranks.stage(), tmp_path / "run", progress=False)
    assert result.resumed == 4
    assert any("process count 1 instead of 2" in warning for warning in result.warnings)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(both[1][0]["weights"][name], value, atol=1e-9, rtol=0)


@pytest.mark.slow  # most of it is waiting
def test_a_process_that_hangs_is_named_with_what_it_did(tmp_path):
    began = time.monotonic()
    spawn(ranks.run_late, 2, free_port(), str(tmp_path))
    assert time.monotonic() - began < 60
    said = (tmp_path / "said-0").read_text()
    assert "Process 1 of this run has not come within 2 s (parallel.timeout), so process 0 gives up" in said
    assert re.search(r"Process 1 was last seen at step 3 of stage 's', reading its rows, \d s ago", said)
    assert "process" in (tmp_path / "said-1").read_text()  # it woke up alone


def test_alone_nothing_is_asked_of_others():
    processes.join()
    assert processes.world_size() == 1
    assert processes.first()
    assert processes.all_gather("x") == ["x"]
    assert processes.sizes(3, torch.device("cpu")) == [3]


@pytest.mark.parametrize("size", ["two", "0", "-1"])
def test_a_world_that_is_no_number_is_refused(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match="WORLD_SIZE is"):
        processes.join()


SLURM = {"JOB_ID": "71234567", "STEP_NUM_TASKS": "8", "PROCID": "5", "LOCALID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"), [("node7", "node7"), ("gpu-[003-005,9],x1", "gpu-003"), ("a12,b1", "a12"), ("n[4,7]", "n4")]
)
def test_what_srun_says_is_read(monkeypatch, nodes, first):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back at the end, whatever is set
        monkeypatch.delenv(name)
    for name, value in {**SLURM, "STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes.launched_world_size() == 8
    assert {n: os.environ[n] for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": first,
    }
    assert 1024 < int(os.environ["MASTER_PORT"]) < 2**16


def test_processes_of_srun_meet(tmp_path):
    spawn(ranks.run_under_slurm, 2, free_port(), str(tmp_path))
    assert [(tmp_path / name).read_text() for name in "01"] == ["[0, 1]", "[0, 1]"]


def test_torchruns_word_goes_before_sruns(monkeypatch):
    for name, value in {**SLURM, "STEP_NODELIST": "node7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.launched_world_size() == 1


def test_a_batch_script_of_several_tasks_is_one_process(monkeypatch):
    """SLURM tells it of them too; only srun starts them."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.launched_world_size() == 1


@pytest.mark.parametrize(("taken", "why"), [(True, "address already in use"), (False, "Timed out|timed out")])
def test_processes_that_do_not_meet_say_where(monkeypatch, taken, why):
    """The port is another's, or the second process was never started."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if taken:
            other.listen()
            port = other.getsockname()[1]
        else:
            port = free_port()
        for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            LostError, match=rf"(?s)Process 0 of 2 did not meet the others at 127.0.0.1:{port}.*({why})"
        ):
            processes.join(timeout=1)
    assert processes.world_size() == 1


def test_a_world_without_a_meeting_place_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT not set"):
        processes.join()
