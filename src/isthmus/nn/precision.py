"""Parts that stay in float32 whatever the rest of a net is cast to."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class KeptFloat32(nn.Module):
    """A module whose float32 tensors follow ``.to(device)`` but not ``.half()``, ``.bfloat16()`` or ``.to(dtype)``.

    Not a rounding and back: the cast is never made.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def guarded(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.float32:
                return fn(tensor)
            probe = fn(tensor.new_empty(0))
            return tensor.to(probe.device) if probe.dtype in HALF else fn(tensor)

        return super()._apply(guarded, recurse)


def cast_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and stored buffers to ``dtype``. What is computed from the configuration keeps its precision: rotary
    frequencies rounded to bf16 would turn the position 1,000 by several radians too far."""
    computed = [
        (module, name, buffer)
        for module in net.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    net.to(dtype)
    for module, name, buffer in computed:
        module._buffers[name] = buffer
