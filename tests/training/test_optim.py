"""Schedules, groups, norms and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import StageError
from isthmus.stage import Group, Stage, apply_stage
from isthmus.training import optim
from isthmus.training.optim import lr_at

from .toys import ToyNet


def stage(**fields):
    return Stage(**{"name": "s", "train": (Group("*", lr=1.0),), "steps": 100, **fields})


def test_the_published_warm_up_and_half_cosine():
    """CLIP, section 7: lr (step + 1) / warmup, then a half cosine to zero."""
    s = stage(warmup=10)
    assert [lr_at(s, n) for n in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_at(s, 10) == 1.0
    assert lr_at(s, 55) == pytest.approx(0.5)
    assert lr_at(s, 99) == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 89 / 90)).item()), abs=1e-6)


def test_warm_up_as_a_fraction_and_other_decays():
    assert stage(warmup=0.25).warmup_count == 25
    assert lr_at(stage(decay="linear", floor=0.2), 50) == pytest.approx(0.6)
    assert lr_at(stage(decay="constant"), 99) == 1.0
    assert lr_at(stage(floor=0.1), 100) == pytest.approx(0.1)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(1, 500),
    warmup=st.floats(0, 0.99),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    floor=st.floats(0, 1),
    size=st.integers(1, 50),
)
def test_rates_rise_then_fall_within_bounds(budget, warmup, decay, floor, size):
    s = stage(steps=None, samples=budget, warmup=warmup, decay=decay, floor=floor)
    rates = [lr_at(s, done, size) for done in range(0, budget, size)]
    # With at least one step, the first rate is never zero: no step is wasted.
    assert all(0 < rate <= 1 + 1e-9 for rate in rates[:1])
    assert all(0 <= rate <= 1 + 1e-9 for rate in rates)
    risen = [r for done, r in zip(range(0, budget, size), rates, strict=True) if done < s.warmup_count]
    fallen = rates[len(risen) :]
    assert risen == sorted(risen)
    assert fallen == sorted(fallen, reverse=True)
    assert all(rate >= floor - 1e-9 for rate in fallen)


def test_groups_split_by_decay_and_hold_exactly_the_open_tensors():
    net = ToyNet()
    table = apply_stage(
        net, (Group("connector.*", lr=1e-3, weight_decay=0.2), Group("language.*", lr=1e-4, weight_decay=0.1))
    )
    parameters = optim.open_parameters(net, table)
    optimizer = optim.build_optimizer(parameters, table, stage())
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: decay[id(p)] for name, p in parameters.items()}
    assert by_name == {
        "connector.weight": 0.2,
        "connector.bias": 0.0,
        "language.norm.weight": 0.0,
        "language.norm.bias": 0.0,
        "language.head.weight": 0.1,
        "language.head.bias": 0.0,
    }
    optim.check_holds_exactly(optimizer, net)
    assert optim.set_rates(optimizer, 0.5) == {"connector.*": 5e-4, "language.*": 5e-5}
    net.connector.bias.requires_grad_(False)
    with pytest.raises(StageError, match=r"'connector\.bias' is frozen, but in the optimizer"):
        optim.check_holds_exactly(optimizer, net)
    net.requires_grad_(True)
    with pytest.raises(StageError, match="open, but not in the optimizer"):
        optim.check_holds_exactly(optimizer, net)


def test_norms_per_part_and_clipping():
    net = ToyNet()
    table = apply_stage(net, (Group("*", lr=1.0),))
    parameters = optim.open_parameters(net, table)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    total, parts = optim.gradient_norms(parameters)
    sizes = {part: sum(p.numel() for n, p in parameters.items() if n.startswith(part)) for part in parts}
    assert parts == pytest.approx({part: size**0.5 for part, size in sizes.items()})
    assert float(total) == pytest.approx(sum(sizes.values()) ** 0.5)
    optim.clip_gradients(parameters, total, None)
    assert float(optim.gradient_norms(parameters)[0]) == pytest.approx(float(total))
    optim.clip_gradients(parameters, total, 0.5)
    assert float(optim.gradient_norms(parameters)[0]) == pytest.approx(0.5, rel=1e-4)


def test_half_precision_tensors_that_train_become_fp32():
    net = ToyNet(dtype=torch.bfloat16)
    table = apply_stage(net, (Group("connector.*", lr=1.0),))
    assert set(optim.to_master_weights(optim.open_parameters(net, table))) == {"connector.weight", "connector.bias"}
    assert net.connector.weight.dtype == torch.float32
    assert net.vision[0].weight.dtype == torch.bfloat16
