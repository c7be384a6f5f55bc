"""What a model costs: parameters, visual tokens, floating-point operations, seconds and memory per answer.

Operations are those of matrix products, convolutions and attention by PyTorch's own formulas (``flop_registry``; a
multiplication and an addition are two). Training counts one real step of every stage, forward and backward, times the
steps.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isthmus.allocator import give_back
from isthmus.comparison.curves import part_lines, seconds
from isthmus.config import strict
from isthmus.data.record import Record
from isthmus.errors import IsthmusError
from isthmus.model import Model
from isthmus.recipes.build import build
from isthmus.recipes.facts import parts_of, steps_of, visual_tokens
from isthmus.recipes.run import make_loader
from isthmus.recipes.schema import Recipe
from isthmus.stage import apply_stage
from isthmus.training.protocols import ending

BATCHES = (1, 7, 64)
"""Batch sizes whose throughput is measured."""
_ALONE = 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What is not known (a model without its run folder, one that answers nothing) is None.

    ``flops_answer`` are those of reading one question with its picture and of the first new token; ``latency`` is the
    median of answers given alone, in seconds; ``throughput`` answers per second by batch size; ``memory`` the peak
    while answering above what was held before, in bytes.
    """

    parameters: int
    trained: int | None = None
    visual_tokens: int | None = None
    training_seconds: float | None = None
    training_flops: float | None = None
    flops_answer: float | None = None
    latency: float | None = None
    throughput: dict[int, float] | None = None
    memory: int | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: object) -> "Cost":
        return strict(cls, facts, "cost")


def cost_of(model: Model, folder: Path, recipe: Recipe | None, questions: Sequence[Record]) -> Cost:
    """Measured on ``questions`` (none: nothing is answered). Raises nothing that the model's own answers do not."""
    cost = Cost(parameters=sum(parts_of(model.net).values()), visual_tokens=visual_tokens(model.net))
    if recipe is not None and (folder / "stages").is_dir():
        cost = replace(
            cost,
            trained=trained_parameters(folder, recipe),
            training_seconds=seconds(folder, recipe),
            training_flops=training_flops(recipe),
        )
    return _answering(cost, model, questions) if questions and "answer" in model.capabilities else cost


class Operations(TorchDispatchMode):
    """Adds up the floating-point operations of what runs inside. (PyTorch's FlopCounterMode counts the same, and by
    module, which it cannot do in inference mode.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:
                made = func.decompose(*args, **kwargs)  # a linear layer becomes its matrix product
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def trained_parameters(folder: Path, recipe: Recipe) -> int:
    """Numbers that some stage trained, each part with the most that a stage opened of it."""
    most: dict[str, int] = {}
    for stage in recipe.stages:
        for row in part_lines(folder, stage.name):
            most[row["part"]] = max(most.get(row["part"], 0), row["trained"])
    return sum(most.values())


def training_flops(recipe: Recipe) -> float | None:
    """Of all stages; None where the parts or data that the recipe names are not there any more."""
    try:
        steps = step_flops(recipe)
    except (IsthmusError, OSError):
        return None
    return sum(steps[spec.name] * steps_of(spec) for spec in recipe.stages)


def step_flops(recipe: Recipe) -> dict[str, int]:
    """Stage -> operations of its first step, forward and backward. Raises what building and loading raise."""
    built, found = build(recipe), {}
    for spec in recipe.stages:
        built = built.enter(spec)
        with ending(make_loader(built, spec).steps()) as stream:
            _, batches = next(stream)
        apply_stage(built.net, spec.stage.train)
        with Operations() as counter:
            for batch in batches:
                torch.stack([term.mean for term in built.net.loss(batch).values()]).sum().backward()
        built.net.zero_grad(set_to_none=True)
        found[spec.name] = counter.total
    return found


def _answering(cost: Cost, model: Model, questions: Sequence[Record]) -> Cost:
    """With what answering costs beside it."""
    once = questions[:1]
    with Operations() as counter:
        model.answer_records(once, max_new_tokens=1)
    alone = []
    for question in questions[:_ALONE]:
        started = time.perf_counter()
        model.answer_records([question], max_new_tokens=8)
        alone.append(time.perf_counter() - started)
    held = _reset_peak(model.device)
    throughput = {size: _per_second(model, questions, size) for size in BATCHES}
    peak = _peak(model.device)
    return replace(
        cost,
        flops_answer=float(counter.total),
        latency=median(alone),
        throughput=throughput,
        memory=peak - held if peak is not None and held is not None else None,
    )


def _per_second(model: Model, questions: Sequence[Record], size: int) -> float:
    """Answers a second at one batch size, over at least one full batch; short ones are filled by repetition."""
    count = max(size, min(len(questions), 2 * _ALONE))
    batch = [questions[i % len(questions)] for i in range(count)]
    started = time.perf_counter()
    model.answer_records(batch, batch_size=size, max_new_tokens=8)
    return count / (time.perf_counter() - started)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes held now; from here on the peak counts. None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back()  # else the answers would live in what is free already
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else None
