"""Linear layers in 4 bits under adapters (QLoRA, Dettmers et al. 2023, section 3), by bitsandbytes.

A frozen weight W is stored as NF4, in blocks whose scales are quantised once more, and is put back for each product:
``y = W_q x + s B A x``. Nothing trains W_q, and what an adapter learns makes up for the rounding too.
"""

import importlib
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from isthmus.errors import ConfigError, MissingExtraError

BITS = 4

INSTEAD = (
    "Take `bits` out: LoRA over the base as it is needs peft alone, and `frozen_dtype: bf16` in the stage halves the "
    "memory of the base where bf16 autocast is at hand."
)


class Linear(Protocol):
    """A linear layer: torch's, or GPT-2's Conv1D."""

    training: bool

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


def demand(instead: str = INSTEAD) -> ModuleType:
    """bitsandbytes, tried on a layer of 64 x 64. Raises MissingExtraError without it, ConfigError where it does not
    compute in 4 bits; ``instead`` ends their message."""
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingExtraError(
            f"A base in 4 bits needs bitsandbytes, which is not installed: pip install 'isthmus[qlora]'. {instead}"
        ) from None
    try:
        with torch.no_grad():
            _rounded(library, nn.Linear(64, 64, device=_place()))(torch.zeros(1, 64, device=_place()))
    except (RuntimeError, AttributeError, TypeError, ValueError, OSError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"There is no base in 4 bits here, for bitsandbytes fails on this {_place().type}: {detail}. {instead}"
        ) from error
    return library


def _place() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quantise(net: nn.Module, names: Iterable[str], *, instead: str = INSTEAD) -> None:
    """Put the weights of these linear layers in 4 bits, one layer at a time; biases stay. A layer that is so already,
    or has no values (meta), is left. Raises as :func:`demand`."""
    layers = {name: cast(Linear, net.get_submodule(name)) for name in names}
    wanted = {n: m for n, m in layers.items() if not is_quantised(m.weight) and not m.weight.is_meta}
    if not wanted:
        return
    library = demand(instead)
    for name, layer in wanted.items():
        net.set_submodule(name, _rounded(library, layer))


def _rounded(library: ModuleType, layer: Linear) -> nn.Module:
    """The layer in 4 bits, rounded on the GPU where there is one, on the device where it was."""
    weight = layer.weight.data
    if not isinstance(layer, nn.Linear):  # Conv1D keeps it as (in, out)
        weight = weight.t().contiguous()
    kind = {"compress_statistics": True, "quant_type": "nf4"}
    compute = torch.bfloat16 if _place().type == "cuda" else torch.float32
    rounded = library.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, compute_dtype=compute, device="meta", **kind
    )
    value = library.nn.Params4bit(weight, requires_grad=False, module=rounded, **kind).to(_place())
    rounded.weight = value if value.device == weight.device else value.to(weight.device)
    rounded.bias = layer.bias
    # On some CPUs it would lay its weight out anew at the first answer, its scales in bf16: no frozen tensor any more.
    rounded.support_avx512bf16_for_cpu = False
    rounded.train(layer.training)
    return rounded


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held in 4 or 8 bits."""
    return not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params")


def names(net: nn.Module) -> list[str]:
    """The net's layers in 4 or 8 bits, by the names that they have without adapters."""
    return [
        name.removesuffix(".base_layer")
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    ]


def numel(parameter: Tensor) -> int:
    """How many numbers a tensor stands for: in 4 bits two of them share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
