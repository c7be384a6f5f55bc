"""A stand-in for bitsandbytes, as far as it is used here: 4 bits a weight, blocks of 64 with a scale each.

It says what it was asked for (``asked``), so that tests see what the real one would be told.
"""

import importlib.machinery
import sys
import types
from contextlib import contextmanager
from typing import Any, ClassVar

import peft.import_utils
import torch
import torch.nn.functional as F
from torch import nn

_parse_to: Any = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]

BLOCK = 64
LEVELS = torch.linspace(-1, 1, 16)


class Scales:
    def __init__(self, absmax, shape):
        self.absmax, self.shape = absmax, shape

    def as_dict(self, packed=False):
        return {"absmax": self.absmax}


class Params4bit(nn.Parameter):
    quant_state: Any
    compress_statistics: bool
    quant_type: str
    module: Any

    def __new__(
        cls, data, requires_grad=True, quant_state=None, compress_statistics=True, quant_type="fp4", module=None
    ):
        own: Any = torch.Tensor._make_subclass(cls, data, requires_grad)
        own.quant_state, own.compress_statistics, own.quant_type = quant_state, compress_statistics, quant_type
        own.module = module
        return own

    def to(self, *args, **kwargs):
        device, *_ = _parse_to(*args, **kwargs)
        if self.quant_state is None and device is not None and device.type != "meta":
            blocks = F.pad(self.data.reshape(-1), (0, -self.numel() % BLOCK)).view(-1, BLOCK)
            absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
            codes = ((blocks / absmax)[..., None] - LEVELS).abs().argmin(-1).to(torch.uint8)
            self.quant_state = Scales(absmax, self.shape)
            self.data = (codes[:, ::2] * 16 + codes[:, 1::2]).view(-1, 1)
            return self
        return Params4bit(
            super().to(*args, **kwargs), False, self.quant_state, self.compress_statistics, self.quant_type
        )

    def full(self):
        codes = torch.stack([self.data // 16, self.data % 16], -1).view(-1, BLOCK).long()
        flat = (LEVELS[codes] * self.quant_state.absmax).view(-1)
        return flat[: self.quant_state.shape.numel()].view(self.quant_state.shape)


class Linear4bit(nn.Linear):
    asked: ClassVar[list[dict[str, Any]]] = []
    weight: Any

    def __init__(self, inputs, outputs, bias=True, compute_dtype=None, device=None, **kind):
        super().__init__(inputs, outputs, bias, device)
        self.weight = Params4bit(self.weight.data, requires_grad=False, **kind)
        self.compute_dtype = compute_dtype
        self.asked.append({"shape": (outputs, inputs), "compute": compute_dtype, **kind})

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.weight.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = value

    def forward(self, x):
        return F.linear(x.to(self.compute_dtype), self.weight.full().to(self.compute_dtype), self.bias).to(x.dtype)


@contextmanager
def standing_in():
    """While inside, ``import bitsandbytes`` gives the stand-in, to peft too."""
    library: Any = types.ModuleType("bitsandbytes")
    library.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    library.nn = types.SimpleNamespace(
        Linear4bit=Linear4bit, Params4bit=Params4bit, Linear8bitLt=type("Linear8bitLt", (), {})
    )
    before = {name: sys.modules.pop(name, None) for name in ("bitsandbytes", "peft.tuners.lora.bnb")}
    sys.modules["bitsandbytes"] = library
    forget()
    try:
        yield library
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        forget()


def forget():
    peft.import_utils.is_bnb_available.cache_clear()
    peft.import_utils.is_bnb_4bit_available.cache_clear()
