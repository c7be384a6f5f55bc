"""What a process is told to hold under an engine."""

import torch
from torch import nn

from isthmus.models.llava import Llava, LlavaConfig
from isthmus.stage import Group, apply_stage
from isthmus.training.layout import layout
from isthmus.training.parallel import Parallel

FSDP = Parallel(engine="fsdp")


def llava(*patterns: str) -> Llava:
    with torch.device("meta"):
        net = Llava(LlavaConfig.tiny())
    apply_stage(net, [Group(pattern, 1e-3) for pattern in patterns])
    return net


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_units_are_blocks_towers_and_the_rest():
    net = llava("connector.*", "language.*")
    found = layout(net, FSDP, 2, passes=3)
    blocks = net.blocks()
    assert len(blocks) == len(net.language.lm.model.layers)
    assert [(u.name, u.count) for u in found.units] == [("vision", 1), ("blocks", len(blocks)), ("the rest", 1)]
    assert [u.parameters for u in found.units[:2]] == [numbers(net.vision), numbers(blocks[0])]
    assert sum(u.count * u.parameters for u in found.units) == numbers(net)
    # The frozen tower is gathered, blocks twice and summed, the rest gathered and summed.
    assert found.collectives == 3 * (1 + 3 * len(blocks) + 2)


def test_shares_add_up_to_the_whole_and_frozen_ones_may_be_replicated():
    net = llava("connector.*")
    frozen = numbers(net.vision) + numbers(net.language)
    one = 4 * frozen + 16 * numbers(net.connector)
    assert layout(net, Parallel(), 4).held == one
    assert one <= 4 * layout(net, FSDP, 4).held <= 1.01 * one
    replicated = layout(net, Parallel(engine="fsdp", frozen="replicated"), 4)
    assert replicated.held == 4 * frozen + 4 * numbers(net.connector)
    assert replicated.collectives == 2
