"""A net's state as tensors by name, and back: each tied tensor once, and strictly."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus import load_report, mapped
from isthmus.errors import CheckpointError, nearest
from isthmus.load_report import Account


def state_tensors(net: nn.Module) -> dict[str, Tensor]:
    """The net's state, each tied tensor once under its first name: what :func:`load_into` takes back."""
    return {names[0]: tensor for names, tensor in _tied(net)}


def load_into(net: nn.Module, tensors: Mapping[str, Tensor], where: str | Path, account: Account | None = None) -> None:
    """Give the net these tensors, strictly: every name and shape must fit. ``where`` is for the message.

    Of the net's dtype they become its weights themselves, without a copy: pages of a mapped file are read when used.
    A hollow net (:func:`isthmus.mapped.hollow`) takes all of them so, in their own dtype.
    A tied tensor may be given under one or all of its names (then with equal values). Nothing is changed unless
    everything fits. Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    own = list(_tied(net))
    known = {name for names, _ in own for name in names}
    faults = [f"{name!r} is unexpected ({nearest(name, known)})" for name in tensors if name not in known]
    faults_missing: list[str] = []
    plan: list[tuple[Tensor, Tensor]] = []
    for names, target in own:
        given = [name for name in names if name in tensors]
        if not given:
            spare = [name for name in tensors if name not in known]
            near = nearest(names[0], spare) if spare else "nothing in the file is left over"
            faults_missing.append(f"{names[0]!r} is missing ({near})")
            continue
        source = tensors[given[0]]
        if target.is_meta and not mapped.is_hollow():
            raise CheckpointError(
                f"The net that should take {where} is on the meta device and holds no values: "
                "build it on a real device first."
            )
        if source.shape != target.shape:
            faults.append(f"{given[0]!r} has shape {tuple(source.shape)}, the net wants {tuple(target.shape)}")
        elif any(not torch.equal(source, tensors[name]) for name in given[1:]):
            faults.append(f"{', '.join(map(repr, given))} are one tensor in the net, but differ in the file")
        plan.append((target, source))
    faults = faults_missing + faults
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"{where} does not fit the net: {'; '.join(faults[:8])}{more}. "
            "Check that the configuration and the file belong together."
        )
    taken: set[int] = set()
    for target, source in plan:
        whole = source.dtype == target.dtype and source.device == target.device and source.is_contiguous()
        fresh = source.data_ptr() not in taken  # one tensor given twice must not tie two weights
        if target.is_meta or (whole and fresh):
            taken.add(source.data_ptr())
            mapped.given(target, source if fresh else source.clone())
        else:
            target.data.copy_(source)
    load_report.took(account, plan)


def _tied(net: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each tensor of the state once, with all its names."""
    names: dict[int, list[str]] = defaultdict(list)
    found: dict[int, Tensor] = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
        found[id(tensor)] = tensor
    return ((names[key], tensor) for key, tensor in found.items())
