"""Frozen matrices in bf16: the same steps, less memory, and the same tensors to the bit afterwards."""

import pytest
import torch

from isthmus.errors import ConfigError, StageError
from isthmus.stage import Group, Stage, apply_stage, defining_keys
from isthmus.training import optim, precision
from tests.models import tiny_llava
from tests.training.test_loop import bits, run, stage
from tests.training.toys import ToyNet

BF16 = {"precision": "bf16", "frozen_dtype": "bf16", "train": (Group("connector.*", lr=2e-2),)}


def rounded() -> ToyNet:
    """A net whose values are all of bf16, as published weights are."""
    net = ToyNet()
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return net


def test_the_steps_are_the_same_and_frozen_tensors_come_back(tmp_path):
    nets, widths = {}, []
    for name in ("fp32", "bf16"):
        net = rounded()
        net.language["head"].register_forward_hook(lambda m, a, o: widths.append(m.weight.dtype))
        run(tmp_path / name, net, the_stage=stage(**{**BF16, "frozen_dtype": name}))
        nets[name] = net
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert set(widths) == {torch.float32, torch.bfloat16}
    assert bits(nets["fp32"]) == bits(nets["bf16"])
    assert bits(nets["bf16"])["language.head.weight"] == bits(rounded())["language.head.weight"]


def test_values_that_bf16_cannot_hold_stay_as_they_are(tmp_path):
    net = ToyNet()
    before = bits(net)
    _, _, result = run(tmp_path / "a", net, the_stage=stage(**BF16))
    assert any("frozen matrices stay fp32, for their values are not of bf16" in w for w in result.warnings)
    frozen = [name for name in before if not name.startswith("connector")]
    assert all(bits(net)[name] == before[name] for name in frozen)


def test_a_run_goes_on_in_the_same_way(tmp_path):
    whole, half = rounded(), rounded()
    run(tmp_path / "whole", whole, the_stage=stage(**BF16))
    run(tmp_path / "half", half, the_stage=stage(**BF16))
    again = rounded()
    run(tmp_path / "half", again, the_stage=stage(**BF16))
    assert bits(again) == bits(whole)


def test_it_needs_bf16_autocast(tmp_path, monkeypatch):
    with pytest.raises(StageError, match="frozen_dtype bf16 needs bf16 autocast, and this run computes in fp32"):
        run(tmp_path / "a", rounded(), the_stage=stage(**{**BF16, "precision": "fp32"}))
    monkeypatch.setattr(precision, "choose", lambda *_, **__: precision.Choice("fp32", "bf16 takes 1.40 of its time"))
    with pytest.raises(StageError, match=r"takes 1.40 .* Set precision: bf16"):
        run(tmp_path / "b", rounded(), the_stage=stage(**{**BF16, "precision": "auto"}))
    with pytest.raises(ConfigError, match="frozen_dtype is 'fp16'"):
        stage(frozen_dtype="fp16")


def test_tables_and_vectors_stay_and_the_loss_is_that_of_full_matrices():
    net, batch = tiny_llava.tiny(), tiny_llava.batch([tiny_llava.ROWS["one"], tiny_llava.ROWS["two"]])
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16().float()
    apply_stage(net, (Group("connector.*", lr=1.0),))

    def loss() -> torch.Tensor:
        with precision.context("bf16", torch.device("cpu")):
            return net.loss(batch)["lm"].total

    before = loss()
    narrowed, others = optim.narrow_frozen(net)
    assert others == 0
    assert torch.equal(loss(), before)
    halves = {n for n, p in net.named_parameters() if p.dtype == torch.bfloat16}
    assert len(halves) == len(narrowed) > 10
    assert not any("embed_tokens" in n or "norm" in n or n.startswith("connector") for n in halves)


def test_an_older_run_is_still_the_same_stage():
    plain = Stage(name="x", train=(Group("*", lr=1.0),), steps=1)
    assert "frozen_dtype" not in defining_keys(plain.to_dict())
    other = Stage(name="x", train=(Group("*", lr=1.0),), steps=1, frozen_dtype="bf16")
    assert plain.fingerprint() != other.fingerprint()
