"""Freezing as data: first match wins, unnamed is frozen, and a pattern without effect is an error."""

import json
from fnmatch import fnmatchcase
from io import StringIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from isthmus import adapters
from isthmus.adapters import Lora
from isthmus.errors import ConfigError, StageError
from isthmus.stage import Group, Stage, StagedNet, apply_stage, canonical, named_parameters, opens, set_modes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(
                    nn.ModuleDict({"ln": nn.LayerNorm(4), "drop": nn.Dropout(0.5), "fc": nn.Linear(4, 4)})
                    for _ in range(3)
                )
            }
        )
        self.connector = nn.ModuleDict({"linear_1": nn.Linear(4, 6), "act": nn.GELU(), "linear_2": nn.Linear(6, 6)})
        self.language = nn.ModuleDict({"embed": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False)})


class Deep(Net, StagedNet):
    def unreachable(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.named_parameters() if n.startswith("vision.blocks.2."))


def open_names(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


def test_opens_exactly_what_is_named():
    net = Net()
    table = apply_stage(net, (Group("connector.*", lr=1e-3),))
    assert open_names(net) == {f"connector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert set(table.assigned) == open_names(net)
    by_part = {row.part: row for row in table.rows}
    assert by_part["connector"].trained == by_part["connector"].parameters == 4 * 6 + 6 + 6 * 6 + 6
    assert (by_part["vision"].trained, by_part["vision"].rates) == (0, ())
    assert table.parameters == sum(p.numel() for p in net.parameters())


def test_first_match_wins():
    net = Net()
    table = apply_stage(net, (Group("vision.blocks.0.*", lr=1e-5), Group("vision.*", lr=1e-4), Group("*", lr=1e-3)))
    rates = {name: table.groups[index].lr for name, index in table.assigned.items()}
    assert rates["vision.blocks.0.fc.weight"] == 1e-5
    assert rates["vision.blocks.1.fc.weight"] == 1e-4
    assert rates["language.head.weight"] == 1e-3
    assert next(r for r in table.rows if r.part == "vision").rates == (1e-5, 1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "*",
                "vision.*",
                "*.ln.*",
                "vision.blocks.1.*",
                "connector.*",
                "*.bias",
                "*.weight",
                "language.embed.*",
                "nothing.*",
            ]
        ),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_any_order_of_patterns_follows_the_rule(patterns):
    """Either a pattern has no effect (error), or each tensor belongs to the first pattern that matches it."""
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    first = {n: next((i for i, p in enumerate(patterns) if fnmatchcase(n, p)), None) for n in names}
    groups = tuple(Group(p, lr=10.0**-i) for i, p in enumerate(patterns))
    if set(range(len(patterns))) <= set(first.values()):
        assert apply_stage(net, groups).assigned == {n: i for n, i in first.items() if i is not None}
    else:
        with pytest.raises(StageError):
            apply_stage(net, groups)


def test_what_groups_would_open_is_known_without_a_change_to_the_net():
    groups = (Group("vision.*", lr=1.0), Group("connector.*", lora=Lora(rank=2)), Group("language.head.*", lr=1.0))
    net = Deep()
    found = opens(net, groups)
    assert open_names(net) == {name for name, _ in Deep().named_parameters()}
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in Deep().named_parameters()}
    assigned = apply_stage(net, groups).assigned
    assert set(found) == {adapters.layer_of(n) if adapters.MARK in n else n for n in assigned}
    for wrong in ((), (Group("conector.*", lr=1.0),), (Group("vision.blocks.2.*", lr=1.0),)):
        with pytest.raises(StageError) as late:
            apply_stage(Deep(), wrong)
        with pytest.raises(StageError) as early:
            opens(Deep(), wrong)
        assert str(early.value) == str(late.value)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(StageError, match=r"'conector\.\*' matches no parameter.*'connector\.\*'"):
        apply_stage(Net(), (Group("conector.*", lr=1.0),))


def test_a_wholly_shadowed_pattern_is_an_error():
    with pytest.raises(StageError, match=r"'connector\.linear_1\.\*' has no effect.*'connector\.\*'"):
        apply_stage(Net(), (Group("connector.*", lr=1.0), Group("connector.linear_1.*", lr=2.0)))


def test_a_stage_that_trains_nothing_is_an_error():
    with pytest.raises(StageError, match="names nothing to train"):
        apply_stage(Net(), ())


def test_unreachable_tensors_stay_frozen_and_are_listed():
    net = Deep()
    table = apply_stage(net, (Group("vision.*", lr=1.0),))
    assert table.unused == Deep().unreachable()
    assert not any(name.startswith("vision.blocks.2.") for name in open_names(net))
    assert next(r for r in table.rows if r.part == "vision").unused == 4 + 4 + 16 + 4
    with pytest.raises(StageError, match="cannot reach"):
        apply_stage(Deep(), (Group("connector.*", lr=1.0), Group("vision.blocks.2.*", lr=1.0)))


def test_tied_tensors_need_one_answer():
    net = Net()
    net.language["head"].weight = nn.Parameter(torch.zeros(7, 6))
    net.language["embed"].weight = net.language["head"].weight
    with pytest.raises(StageError, match="one tensor"):
        apply_stage(net, (Group("language.head.*", lr=1.0),))
    assert apply_stage(net, (Group("language.*", lr=1.0),)).trained == 42


def test_frozen_modules_stay_in_eval_mode():
    net = Net()
    apply_stage(net, (Group("vision.blocks.1.*", lr=1.0), Group("connector.linear_2.*", lr=1.0)))
    for _ in range(2):
        modes = {name: m.training for name, m in net.named_modules()}
        assert modes["vision.blocks.1.drop"]
        assert modes["connector.linear_2"]
        assert modes["connector.act"]
        assert not modes["vision.blocks.0.drop"]
        assert not modes["connector.linear_1"]
        assert not modes["language"]
        net.train()
        set_modes(net)


def test_train_mode_of_the_librarys_own_nets_leaves_frozen_parts_alone():
    class Own(StagedNet, Net):
        pass

    net = Own()
    assert all(m.training for m in net.train().modules())  # all is open yet
    apply_stage(net, (Group("vision.blocks.1.*", lr=1.0),))
    modes = {name: m.training for name, m in net.eval().train().named_modules()}
    assert modes["vision.blocks.1.drop"]
    assert not modes["vision.blocks.0.drop"]
    assert not modes["language"]
    assert not any(m.training for m in net.eval().modules())


def test_wrapper_prefixes_are_not_part_of_a_name():
    assert canonical("module._orig_mod.vision.blocks.0.fc.weight") == "vision.blocks.0.fc.weight"
    wrapped = nn.ModuleDict({"module": Net()})
    assert dict(named_parameters(wrapped)).keys() == dict(Net().named_parameters()).keys()
    assert apply_stage(wrapped, (Group("connector.*", lr=1.0),)).trained == 72


def test_table_renders_and_is_json():
    table = apply_stage(Deep(), (Group("vision.*", lr=2e-5, weight_decay=0.1), Group("connector.*", lr=1e-3)))
    facts = json.loads(json.dumps(table.to_dict()))
    assert facts["groups"][1] == {"pattern": "connector.*", "lr": 1e-3, "weight_decay": 0.0, "tensors": 4}
    printed = StringIO()
    Console(file=printed, width=100).print(table.render("stage align"))
    text = printed.getvalue()
    assert all(word in text for word in ("stage align", "frozen", "2e-05", "unused"))


def test_stage_round_trips_and_fingerprints():
    stage = Stage(name="a", train=(Group("x.*", lr=1e-3),), steps=10)
    assert stage.to_dict()["train"] == [{"pattern": "x.*", "lr": 1e-3, "weight_decay": 0.0}]
    same = Stage(name="a", train=(Group("x.*", lr=1e-3),), steps=10, log_every=5, save_every=7, nan_policy="skip")
    other = Stage(name="a", train=(Group("x.*", lr=1e-3),), steps=11)
    assert stage.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "exactly one"),
        ({"samples": 5}, "exactly one"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "whole number"),
        ({"warmup": 1.5}, "fraction below 1"),
        ({"warmup": 11}, "longer than the budget"),
        ({"warmup": -1}, "warmup"),
        ({"floor": 1.5}, "floor"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"decay": "cosin"}, "cosine"),
        ({"precision": "fp16"}, "bf16"),
        ({"nan_policy": "ignore"}, "skip"),
        ({"save_every": 0}, "save_every"),
    ],
)
def test_values_that_do_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        Stage(**{"name": "a", "train": (Group("x", lr=1.0),), "steps": 10, **change})


def test_a_negative_rate_is_refused():
    with pytest.raises(ConfigError, match="lr of pattern 'x'"):
        Group("x", lr=-1.0)
