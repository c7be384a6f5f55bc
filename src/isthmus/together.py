"""Many prompts answered together: in batches, and what several of them begin with read once.

Prompts about one picture share what stands before their questions, few-shot prompts their examples. A group of them
joins the decoder after one pass over its beginning, whose keys and values all its rows go on from.
"""

from collections.abc import Hashable, Mapping, Sequence

import torch

from isthmus.batch import CAUSAL
from isthmus.data.collate import collate
from isthmus.data.record import Example
from isthmus.data.shared import Cut, cut
from isthmus.language import Decoder, Decoding
from isthmus.net import Net


def together(
    net: Net, examples: Sequence[Example], decoding: Decoding, *, batch_size: int, device: torch.device
) -> list[list[int]]:
    """The new tokens of each example, at most ``batch_size`` rows at a time, the longest first."""
    answers: list[list[int]] = [[]] * len(examples)
    alone = list(range(len(examples)))
    if _shares(net, decoding):
        groups = _groups(examples)
        alone = sorted(set(alone) - {n for numbers, _ in groups for n in numbers})
        _write_groups(net, groups, decoding, answers, batch_size, device)
    order = sorted(alone, key=lambda i: -examples[i].length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([examples[i] for i in rows]).to(device)
        for i, ids in zip(rows, net.generate(batch, decoding), strict=True):
            answers[i] = ids
    return answers


def _shares(net: Net, decoding: Decoding) -> bool:
    """Whether rows of this net can go on from a beginning that was read apart. A seed per row belongs to its place in
    the batch."""
    causal = net.shares_beginning and net.prompt_stream == CAUSAL
    return causal and net.language.writable is True and not isinstance(decoding.seed, tuple)


_Group = tuple[list[int], Cut]


def _groups(examples: Sequence[Example]) -> list[_Group]:
    """Numbers of examples that begin alike, and their cut: those with the same first picture, or all without one."""
    found: dict[Hashable, list[int]] = {}
    for number, example in enumerate(examples):
        first = example.visuals[0].identity() if example.visuals else ""
        found.setdefault(first, []).append(number)
    cuts = ((numbers, cut([examples[n] for n in numbers])) for numbers in found.values())
    return [(numbers, parts) for numbers, parts in cuts if parts is not None]


def _write_groups(
    net: Net,
    groups: Sequence[_Group],
    decoding: Decoding,
    answers: list[list[int]],
    batch_size: int,
    device: torch.device,
) -> None:
    if not groups:
        return
    decoder, numbered = Decoder(net.language), {}
    for numbers, parts in groups:
        past = net.language.read(net.prompt(collate([parts.beginning]).to(device)))
        order = sorted(range(len(numbers)), key=lambda i: -parts.endings[i].length)
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            if len(decoder) + len(own) > batch_size:
                _finish(decoder, numbered, answers)
            prompt = net.prompt(collate([parts.endings[i] for i in own]).to(device), past)
            numbered |= dict(zip(decoder.add(prompt, decoding), [numbers[i] for i in own], strict=True))
    _finish(decoder, numbered, answers)


def _finish(decoder: Decoder, numbered: Mapping[int, int], answers: list[list[int]]) -> None:
    for new in decoder.write():
        answers[numbered[new.row]] = [*answers[numbered[new.row]], *new.ids]
