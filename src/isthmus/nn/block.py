"""The pre-norm transformer block and its MLP, shared by every tower and connector.

Legend: B batch, T tokens, D width, H heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.errors import ConfigError, nearest
from isthmus.nn.attention import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x), the activation of OpenAI's CLIP weights."""
    # One kernel less than the formula, forwards and backwards.
    return F.silu(1.702 * x) * (1 / 1.702)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, the activation of SigLIP."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)², the activation of Flamingo's resampler and gated blocks."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; ``gelu`` is the exact (erf) one. Raises ConfigError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Mlp(nn.Module):
    """fc2(act(fc1(x))), width → hidden → width."""

    def __init__(self, width: int, hidden: int, activation_name: str = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        self.activation = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) without biases: SwiGLU when the activation is ``silu``."""

    def __init__(self, width: int, hidden: int, activation_name: str = "silu") -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)). ``hidden`` is the width inside the MLP, ``eps`` LayerNorm's."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str = "gelu", eps: float = 1e-5) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        mask: Bool[Tensor, "#B #H #T #T"] | None = None,
        causal: bool = False,
        read: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """(B, T, D) -> (B, T, D); ``mask`` and ``causal`` as in :class:`Attention`.

        With ``read`` (B,), one place per row, only what comes out there is computed, (B, 1, D): all that a pooling at
        one place needs of the last block.
        """
        if read is not None:
            return self._at(x, read, mask=mask, causal=causal)
        x = x + self.attn(self.ln_1(x), mask=mask, causal=causal)
        return x + self.mlp(self.ln_2(x))

    def _at(self, x: Tensor, place: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        normed = self.ln_1(x)
        if mask is not None:
            mask = mask.expand(len(x), -1, x.shape[1], -1)[rows, :, place][:, :, None]
        if causal:
            before = (torch.arange(x.shape[1], device=x.device) <= place[:, None])[:, None, None]
            mask = before if mask is None else mask & before
        own = x[rows, place][:, None]
        own = own + self.attn(normed[rows, place][:, None], normed, mask=mask)
        return own + self.mlp(self.ln_2(own))


def init_block(block: Block, depth: int) -> None:
    """OpenAI's start for one of ``depth`` blocks: both branches' last layers shrink with √(2·depth).

    With width w: q, k, v ~ N(0, 1/w), out and fc2 ~ N(0, 1/(2·depth·w)), fc1 ~ N(0, 1/(2w)); attention biases are
    zero, MLP biases keep PyTorch's start.
    """
    width = block.ln_1.normalized_shape[0]
    residual = (2 * depth * width) ** -0.5
    init_attention(block.attn, width**-0.5, residual)
    nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.mlp.fc2.weight, std=residual)


def init_attention(attention: Attention, inner: float, out: float) -> None:
    """q, k, v ~ N(0, inner²), output projection ~ N(0, out²), biases zero."""
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.normal_(layer.weight, std=inner)
    nn.init.normal_(attention.out_proj.weight, std=out)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
