"""The loop: exact resume, freezing proven, NaN before the update, one writer, signals."""

import json
import os
import shutil
import signal
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn

from isthmus import checkpoint
from isthmus.batch import Term
from isthmus.checkpoint import CheckpointError, tensor_sha256
from isthmus.errors import DataError, StageError
from isthmus.stage import Group, Stage
from isthmus.training import Interrupted, Preempted, loop, train
from isthmus.training.finite import NonFiniteError
from isthmus.training.gradient import Traffic
from isthmus.training.lock import RunBusyError, RunLock
from isthmus.training.log import read_metrics
from isthmus.training.state import checkpoints
from tests.narrow import must_be, there

from .toys import ToyLoader, ToyNet

GROUPS = (Group("connector.*", lr=2e-2, weight_decay=0.1), Group("language.*", lr=1e-2))
TIMES = ("seconds", "tokens_per_second", "data_wait")


def stage(**fields):
    usual = {"name": "align", "train": GROUPS, "steps": 12, "save_every": 4, "warmup": 3, "precision": "fp32"}
    return Stage(**{**usual, **fields})


def run(folder, net=None, loader=None, *, seed=3, progress: bool | Progress = False, the_stage=None, **options):
    net, loader = net or ToyNet(), loader or ToyLoader()
    result = train(net, loader, the_stage or stage(), folder, seed=seed, progress=progress, **options)
    return net, loader, result


def lines(folder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


def bits(net):
    return {name: tensor_sha256(tensor) for name, tensor in net.state_dict().items()}


def same_bits(a, b):
    return bits(a) == bits(b)


class StopAfter(ToyLoader):
    """Sends a signal while the step after ``steps`` steps is being fetched: it is noticed at the next boundary."""

    def __init__(self, steps, number=signal.SIGTERM, **fields):
        super().__init__(**fields)
        self.left, self.number = steps, number

    def steps(self, start):
        for item in super().steps(start):
            if self.left == 0:
                os.kill(os.getpid(), self.number)
            self.left -= 1
            yield item


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resume_is_bit_identical(tmp_path, stop_at, precision):
    whole_net, whole_loader, whole = run(tmp_path / "whole", the_stage=stage(precision=precision))
    first = StopAfter(stop_at - 1)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", loader=first, the_stage=stage(precision=precision))
    net, second, result = run(tmp_path / "parts", None, the_stage=stage(precision=precision))
    assert result.resumed == stop_at
    assert same_bits(net, whole_net)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert result.losses == whole.losses
    assert first.seen[: 4 * stop_at] + second.seen == whole_loader.seen


def test_a_finished_stage_comes_back_without_training(tmp_path):
    net, _, first = run(tmp_path)
    again, loader, second = run(tmp_path)
    assert loader.seen == []
    assert same_bits(net, again)
    assert (second.step, second.losses, second.resumed) == (12, first.losses, 12)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000008", "step-000012"]


def test_the_budget_may_be_in_samples(tmp_path):
    _, loader, result = run(tmp_path, the_stage=stage(steps=None, samples=18, warmup=0.5))
    assert (result.step, result.samples, len(loader.seen)) == (5, 20, 20)
    rates = [line["lr"]["connector.*"] for line in lines(tmp_path)]
    assert rates[:3] == pytest.approx([2e-2 * 4 / 9, 2e-2 * 8 / 9, 2e-2])


def test_training_learns_and_logs(tmp_path):
    _, _, result = run(tmp_path, the_stage=stage(steps=60, warmup=5, log_every=7))
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [*range(7, 60, 7), 60]
    assert logged[-1]["loss"]["lm"] < 0.9 * logged[0]["loss"]["lm"]
    assert set(logged[0]["grad_norm"]) == {"all", "connector", "language"}
    assert 0 < logged[0]["supervised"] < 1
    assert logged[-1]["epoch"] == 11
    saved = json.loads((tmp_path / "stage.json").read_text())
    assert saved["table"]["trained"] == result.table.trained
    assert saved["stage"]["steps"] == 60


# ------------------------------------------------------------------------------------------------- freezing


def test_frozen_parts_stay_bit_identical_and_open_ones_move(tmp_path):
    before = bits(ToyNet())
    net, _, _ = run(tmp_path)
    moved = {name for name, digest in bits(net).items() if digest != before[name]}
    assert moved == {n for n in before if not n.startswith("vision.")}
    assert not net.vision.training


def test_a_frozen_tensor_that_moves_stops_the_run(tmp_path):
    class Leaky(ToyNet):
        def after_step(self):
            self.vision[0].weight.data[3, 0] += 1e-4

    with pytest.raises(StageError, match=r"frozen tensor 'vision\.0\.weight' changed during the stage"):
        run(tmp_path, Leaky())


@pytest.mark.parametrize(("steps", "found_at"), [(8, 8), (60, 50)])
def test_a_dead_parameter_is_found(tmp_path, steps, found_at):
    net = ToyNet()
    net.connector.spare = nn.Parameter(torch.ones(3))
    with pytest.raises(StageError, match=rf"After {found_at} steps.*connector\.spare"):
        run(tmp_path, net, the_stage=stage(steps=steps))


def test_a_gradient_that_comes_late_is_enough(tmp_path):
    """A zero-initialised layer keeps the one before it without gradient for a step (as in gates and adapters)."""
    net = ToyNet()
    nn.init.zeros_(must_be(nn.Linear, net.language["head"]).weight)
    _, _, result = run(tmp_path, net)
    assert result.step == 12


def test_running_statistics_of_open_modules_are_part_of_the_checkpoint(tmp_path):
    class Normed(ToyNet):
        def __init__(self):
            super().__init__()
            self.language["batch"] = nn.BatchNorm1d(8)
            self.vision.append(nn.BatchNorm1d(8))

        def logits(self, ids):
            hidden = self.vision[0](ids).transpose(1, 2)
            hidden = self.language["batch"](self.vision[2](hidden)).transpose(1, 2)
            return self.language["head"](self.language["norm"](self.connector(hidden)))

    whole, _, _ = run(tmp_path / "whole", Normed())
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", Normed(), StopAfter(5))
    parts, _, _ = run(tmp_path / "parts", Normed())
    assert same_bits(whole, parts)
    assert there(must_be(nn.BatchNorm1d, whole.language["batch"]).running_mean).any()
    assert not whole.vision[2].running_mean.any()


def test_after_step_is_called(tmp_path):
    class Clamped(ToyNet):
        def after_step(self):
            self.connector.bias.data.clamp_(-0.01, 0.01)

    net, _, _ = run(tmp_path, Clamped())
    assert net.connector.bias.abs().max() <= 0.01


# ------------------------------------------------------------------------------------------------- what a run refuses


def test_another_stage_seed_identity_or_frozen_part_is_refused(tmp_path):
    run(tmp_path, identity={"data": "abc"})
    with pytest.raises(StageError, match="another definition of this stage"):
        run(tmp_path, the_stage=stage(steps=13), identity={"data": "abc"})
    with pytest.raises(StageError, match="seed 3, not 4"):
        run(tmp_path, seed=4, identity={"data": "abc"})
    with pytest.raises(StageError, match="data = 'abc', not 'xyz'"):
        run(tmp_path, identity={"data": "xyz"})
    other = ToyNet()
    other.vision[0].weight.data[0, 0] += 1
    with pytest.raises(StageError, match=r"'vision\.0\.weight' is not the one this run was begun with"):
        run(tmp_path, other, identity={"data": "abc"})
    run(tmp_path, the_stage=stage(log_every=3, save_every=5), identity={"data": "abc"})


def test_a_changed_thread_count_is_recorded(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        run(tmp_path, loader=StopAfter(5))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    _, _, result = run(tmp_path)
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("step 6: resumed with thread count 7 instead of 1;")
    saved = json.loads((tmp_path / "checkpoints" / "step-000012" / "state.json").read_text())
    assert saved["warnings"] == list(result.warnings)


def test_damage_in_any_file_of_a_checkpoint_is_refused_and_named(tmp_path):
    run(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    names = sorted(p.name for p in newest.iterdir())
    assert names == ["manifest.json", "optimizer.safetensors", "rng.json", "state.json", "trained.safetensors"]
    for name in names:
        original = (newest / name).read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            content = bytearray(original)
            content[place] ^= 4
            (newest / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=rf"{name}.*goes on from step-000008"):
                run(tmp_path)
        (newest / name).write_bytes(original)
    reference = ToyNet()
    run(tmp_path, reference)
    # Without the damaged one the run goes on from the one before, to the same bits.
    shutil.rmtree(newest)
    net, _, result = run(tmp_path)
    assert result.resumed == 8
    assert same_bits(net, reference)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    reference, _, _ = run(tmp_path / "whole")
    real, written = checkpoint._write_file, []

    def write(path, content):
        written.append(path.name)
        if len(written) > 7:
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_file", write)
        with pytest.raises(CheckpointError, match=r"step-000008: [\d,]+ bytes are needed, [\d,]+ are free"):
            run(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-000004"]
    net, _, result = run(tmp_path / "full")
    assert result.resumed == 4
    assert same_bits(net, reference)
    assert lines(tmp_path / "full") == lines(tmp_path / "whole")


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunBusyError, match=str(os.getpid())):
        run(tmp_path)


def test_a_contrast_with_a_process_that_has_no_sample_is_an_error_in_all(tmp_path, monkeypatch):
    net = ToyNet()
    net.contrasts = True
    monkeypatch.setattr(loop, "all_gather", lambda value: [value, ({}, Traffic(0, 0, 0, 0, 0), [])])
    with pytest.raises(DataError, match=r"^Process 1 of .* has no sample in the step after 0.*raise batch_size"):
        run(tmp_path, net)


def test_data_that_ends_is_an_error(tmp_path):
    class Short(ToyLoader):
        def steps(self, start):
            for _, item in zip(range(3), super().steps(start), strict=False):
                yield item

    with pytest.raises(StageError, match="ended after step 3"):
        run(tmp_path, loader=Short())


# ------------------------------------------------------------------------------------------------- NaN


class PoisonedNorm(nn.LayerNorm):
    bad = False

    def forward(self, x):
        return super().forward(x) * (float("nan") if self.bad else 1.0)


class Poisoned(ToyNet):
    """Its module ``language.norm`` answers NaN for any batch that holds one of the named samples."""

    def __init__(self, *ids):
        super().__init__()
        self.ids = set(ids)
        self.language["norm"] = PoisonedNorm(8)

    def loss(self, batch):
        must_be(PoisonedNorm, self.language["norm"]).bad = bool(self.ids & set(batch.ids))
        return super().loss(batch)


def steps_with(*ids, steps=12):
    loader = ToyLoader()
    stream = loader.steps(loader.position({"epoch": 0, "index": 0}))
    return [step for step in range(1, steps + 1) if set(ids) & set(next(stream)[1][0].ids)]


def test_a_nan_stops_before_the_update_at_exactly_that_step(tmp_path):
    first = steps_with("s7")[0]
    steady = {"warmup": 0, "decay": "constant"}
    clean, _, _ = run(tmp_path / "clean", the_stage=stage(steps=first - 1, **steady))
    net = Poisoned("s7")
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "nan", net, the_stage=stage(steps=1000, **steady))
    text = str(caught.value)
    assert f"step {first}: the loss 'lm' is nan" in text
    assert "output of module 'language.norm' (float32)" in text
    assert "s7" in text
    assert same_bits(net, clean)
    assert [line["step"] for line in lines(tmp_path / "nan")] == list(range(1, first))


def test_only_the_samples_of_the_bad_micro_batch_are_named(tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, Poisoned("s7"), ToyLoader(split=(1, 1, 1, 1)))
    assert "Samples: s7. " in str(caught.value)


def test_a_nan_gradient_names_its_parameter(tmp_path):
    class Kinked(ToyNet):
        def loss(self, batch):
            term = super().loss(batch)["lm"]
            # sqrt(0) is finite, its gradient is not.
            return {"lm": Term(term.total + (self.connector.weight.sum() * 0).sqrt(), term.count)}

    net = Kinked()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"gradient norm.*the gradient of 'connector\.weight' \(float32\)"):
        run(tmp_path, net)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_nan_parameter_is_named(tmp_path):
    net = ToyNet()
    net.vision[0].weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"the parameter 'vision\.0\.weight'"):
        run(tmp_path, net)


def test_skipping_passes_over_a_few_and_reports_them(tmp_path):
    told = []
    bad = steps_with("s7")
    skip = stage(nan_policy="skip", nan_limit=1)
    _, _, result = run(tmp_path, Poisoned("s7"), the_stage=skip, on_quarantine=lambda ids, why: told.append((ids, why)))
    assert [line["step"] for line in lines(tmp_path) if line.get("skipped")] == bad
    assert len(told) == len(bad) == len(result.warnings)
    assert all("s7" in ids and "language.norm" in why for ids, why in told)
    assert all(line["loss"] is None for line in lines(tmp_path) if line.get("skipped"))


def test_too_many_in_a_row_stop_even_when_skipping(tmp_path):
    net = Poisoned(*(f"s{i}" for i in range(20)))
    with pytest.raises(NonFiniteError, match=r"step 3: .*\(3 in a row\)"):
        run(tmp_path, net, the_stage=stage(nan_policy="skip", nan_limit=2))


# ------------------------------------------------------------------------------------------------- signals, display


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_signal_ends_at_a_step_boundary_with_a_checkpoint(tmp_path, number, code):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match=rf"{number.name} after step 6 of stage 'align'.*goes on there") as caught:
        run(tmp_path, loader=StopAfter(5, number))
    assert caught.value.exit_code == code
    assert checkpoints(tmp_path)[-1].name == "step-000006"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_stop_at_leaves_after_that_step_and_the_run_is_the_same(tmp_path):
    with pytest.raises(Preempted, match="after step 5"):
        run(tmp_path / "stopped", stop_at=5)
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-000005"
    assert same_bits(run(tmp_path / "stopped")[0], run(tmp_path / "whole")[0])


def test_the_newest_checkpoints_stay_and_every_so_many(tmp_path):
    run(tmp_path, the_stage=stage(save_every=2, keep_last=1, keep_every=4))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000004", "step-000008", "step-000012"]


def test_a_signal_during_the_last_step_is_not_lost(tmp_path):
    with pytest.raises(Interrupted, match="after step 12"):
        run(tmp_path, loader=StopAfter(11))
    assert run(tmp_path)[2].resumed == 12


def test_progress_in_a_display_of_the_caller(tmp_path):
    with Progress(disable=True) as display:
        run(tmp_path, progress=display)
        assert (display.tasks[0].completed, display.tasks[0].total, display.tasks[0].description) == (12, 12, "align")


def test_progress_and_table_of_its_own(tmp_path, capfd):
    run(tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "connector" in shown
    assert "frozen" in shown


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, report_to=["tensorboard"])
    assert list((tmp_path / "tensorboard").iterdir())
