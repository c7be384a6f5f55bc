"""Rates, optimizer groups and gradient norms: the arithmetic around one update."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from isthmus.errors import StageError
from isthmus.stage import Stage, StageTable, named_parameters
from isthmus.training.shards import full_tensor


def lr_at(stage: Stage, done: int, size: int = 1) -> float:
    """The factor on every group's peak rate for the step that begins when ``done`` of the budget is used.

    ``done`` counts in the budget's unit, ``size`` is what this step uses of it (1 for steps). Linear warm-up reaches
    the peak at its end (``(done + size) / warmup``, never zero); then cosine, linear or no decay to ``floor``.
    """
    warmup, budget = stage.warmup_count, stage.budget
    if done < warmup:
        return min(1.0, (done + size) / warmup)
    if stage.decay == "constant":
        return 1.0
    progress = min(1.0, (done - warmup) / max(1, budget - warmup))
    shape = 1.0 - progress if stage.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return stage.floor + (1.0 - stage.floor) * shape


def open_parameters(net: nn.Module, table: StageTable) -> dict[str, nn.Parameter]:
    """The tensors that train, by canonical name, in the net's order."""
    return {name: parameter for name, parameter in named_parameters(net) if name in table.assigned}


def to_master_weights(parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Half-precision tensors that train become fp32, so that small updates are not rounded away; their names."""
    changed = []
    for name, parameter in parameters.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
            changed.append(name)
    return tuple(changed)


Halves = Iterator[tuple[str, Tensor]]


def narrow_frozen(
    net: nn.Module, keep: Callable[[Halves], Mapping[str, Tensor]] | None = None
) -> tuple[list[nn.Parameter], int]:
    """Frozen matrices of linear layers and convolutions to bf16, where that changes no value: those that were narrowed,
    and how many others stay as they are. Tables stay too: what is looked up there would make the sums of a transformer
    half-precision ones. ``keep`` takes the new values one by one to where they are to stay, such as a file."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ == "Conv1D"]
    weights = [weight for m in layers if isinstance(weight := m.weight, nn.Parameter)]
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    frozen = {id(w): w for w in weights if not w.requires_grad and id(w) not in tables and w.dtype == torch.float32}
    named = {str(number): weight for number, weight in enumerate(frozen.values())}

    def halves() -> Halves:
        for name, weight in named.items():
            half = weight.data.bfloat16()
            if torch.equal(half.float(), weight.data):
                yield name, half

    narrowed = []
    for name, half in halves() if keep is None else keep(halves()).items():
        named[name].data = half
        narrowed.append(named[name])
    return narrowed, len(frozen) - len(narrowed)


def build_optimizer(parameters: Mapping[str, nn.Parameter], table: StageTable, stage: Stage) -> torch.optim.AdamW:
    """AdamW with one group per (pattern, decayed or not); each group carries ``pattern``, ``peak`` and its rate.

    Tensors with fewer than two dimensions are never decayed, whatever their group says.
    """
    members: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        members[table.assigned[name], parameter.ndim >= 2].append(parameter)
    groups = []
    for (index, decayed), tensors in sorted(members.items()):
        group = table.groups[index]
        groups.append(
            {
                "params": tensors,
                "lr": group.lr,
                "peak": group.lr,
                "pattern": group.pattern,
                "weight_decay": group.weight_decay if decayed else 0.0,
            }
        )
    # One fused pass over the state: the same bits every time for a given thread count, and far fewer kernels.
    return torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=True)


def check_holds_exactly(optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
    """The optimizer holds every open tensor and no frozen one. Raises StageError naming the first that differs."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named_parameters(net):
        if parameter.requires_grad != (id(parameter) in held):
            state = "open, but not in the optimizer" if parameter.requires_grad else "frozen, but in the optimizer"
            raise StageError(f"{name!r} is {state}: something changed requires_grad after the stage was applied.")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to ``peak * factor``; pattern -> rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {group["pattern"]: group["lr"] for group in optimizer.param_groups}


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> tuple[Tensor, dict[str, float]]:
    """The global 2-norm of all gradients (a scalar tensor) and the norm of each part (first name component)."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parts[name.split(".")[0]].append(parameter.grad)
    norms = {part: full_tensor(torch.nn.utils.get_total_norm(gradients)) for part, gradients in parts.items()}
    if not norms:
        return torch.zeros(()), {}
    total = torch.nn.utils.get_total_norm(list(norms.values()))
    return total, {part: float(norm) for part, norm in norms.items()}


def clip_gradients(parameters: Mapping[str, nn.Parameter], total: Tensor, limit: float | None) -> None:
    """Scale all gradients so that their global norm is at most ``limit``."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), limit, total)
