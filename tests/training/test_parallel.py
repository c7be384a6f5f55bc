"""DDP and FSDP2: the gradient of one process, for every system and any split of the rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from isthmus.training.parallel import Engine, Parallel
from tests.models.blip2_ranks import likeliest
from tests.spawning import free_port, spawn

from . import parallel_ranks as ranks


def spawned(folder: Path, world: int) -> list[dict[Any, Any]]:
    """What the first and the last of so many processes found."""
    spawn(ranks.run, world, free_port(), str(folder))
    return [torch.load(folder / f"{world}-{number}.pt") for number in (0, world - 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("parallel"), 2)


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", likeliest)
        answers = {}
        for system in ranks.SYSTEMS:
            net, batch = ranks.build(system)
            means = backward(Engine(net), [batch], ranks.FP32)
            answers[system] = means, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        return answers


@pytest.mark.parametrize("system", ranks.SYSTEMS)
def test_every_split_has_the_gradient_of_one_process(found, alone, system):
    assert sum(case[0] == system for process in found for case in process) >= 4
    assert_equal(found, alone, system)


@pytest.mark.slow
def test_four_processes_have_the_gradient_of_one_process(tmp_path, alone):
    found = spawned(tmp_path, 4)
    assert len({case[0] for process in found for case in process}) > 1
    for system in ranks.SYSTEMS:
        assert_equal(found, alone, system)


def assert_equal(found, alone, system):
    """All that the processes found of a system is what one process finds."""
    means, gradients = alone[system]
    assert any(g.abs().max() > 1e-3 for g in gradients.values())
    for process in found:
        for case, answer in process.items():
            if case[0] != system or case == ranks.ROUNDED:
                continue
            assert answer["means"] == pytest.approx(means, abs=1e-10), case
            assert answer["gradients"].keys() == gradients.keys(), case
            for name, value in gradients.items():
                ours = answer["gradients"][name].view_as(value)
                torch.testing.assert_close(ours, value, atol=1e-10, rtol=1e-10, msg=f"{case}: {name}")


def test_gathering_in_bf16_rounds_and_sums_in_full(found, alone):
    means, gradients = alone["llava"]
    answer = found[0][ranks.ROUNDED]
    assert answer["means"] == pytest.approx(means, rel=0.02)
    for name, value in gradients.items():
        ours = answer["gradients"][name]
        assert ours.dtype == torch.float32
        if value.norm() > 1e-6:
            assert torch.cosine_similarity(ours.flatten().double(), value.flatten(), dim=0) > 0.9, name


def test_recomputed_blocks_keep_less_and_give_the_same_bits(tmp_path):
    """In one process; the net is itself again afterwards."""
    kept, gradients = {}, {}
    for recompute in (False, True):
        net, batch = ranks.build("flamingo")
        runs = engine(net, Parallel(recompute=recompute))
        numbers = []

        def pack(tensor, numbers=numbers):
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            term = runs.loss(batch, last=True)["lm"]
        runs.backward(term.mean)
        runs.close(tmp_path)
        assert not any("forward" in vars(block) for block in net.blocks())
        kept[recompute] = sum(numbers)
        gradients[recompute] = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert kept[True] < 0.8 * kept[False]
    assert gradients[True].keys() == gradients[False].keys()
    assert all(torch.equal(value, gradients[True][name]) for name, value in gradients[False].items())
