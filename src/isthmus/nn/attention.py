"""One multi-head attention for self- and cross-attention.

Legend: B batch, T query tokens, S key tokens, D width, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isthmus.errors import ConfigError
from isthmus.measured import measured_once
from isthmus.products import small_products


class Attention(nn.Module):
    """softmax(q kᵀ / √head_width) v over H heads (Vaswani et al. 2017, sec. 3.2).

    ``context_width`` is the width of the key and value tokens in cross-attention; ``head_width`` defaults to
    ``width / heads``. The kernel is PyTorch's SDPA (see :func:`attend`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if head_width is None:
            if width % heads:
                raise ConfigError(f"width {width} cannot be shared among {heads} heads; choose a divisor of {width}.")
            head_width = width // heads
        inner = heads * head_width
        self.heads, self.head_width = heads, head_width
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(context_width or width, inner, bias=bias)
        self.v_proj = nn.Linear(context_width or width, inner, bias=bias)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        context: Float[Tensor, "B S Dc"] | None = None,
        *,
        mask: Bool[Tensor, "#B #H #T #S"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D) from ``x`` (B, T, D), attending to ``context`` (B, S, Dc), or to itself when there is none.

        ``mask`` is bool, broadcastable to (B, H, T, S), true where a query may attend. ``causal`` hides keys to
        the right of a query. A query without a key gets the output bias alone.
        """
        if causal and context is not None:
            raise ConfigError(
                "causal attention has one sequence; with a context, pass `mask` to say what may be attended to."
            )
        x = cast_once(x)
        source = x if context is None else cast_once(context)
        q, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(source)), self._split(self.v_proj(source))
        if mask is not None and causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = attend(q, k, v, mask=mask, causal=causal and mask is None)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, H·head_width) -> (B, H, T, head_width)."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Cross-attention without biases whose keys and values can be computed once and used many times.

    ``width`` is the queries' and the output's, ``context_width`` the attended tokens'. ``qk_norm`` makes a norm over
    one head's width for queries and keys (IDEFICS); none leaves them as projected.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        *,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.v_proj = nn.Linear(context_width, heads * head_width, bias=False)
        self.out_proj = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = qk_norm(head_width) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_width) if qk_norm else nn.Identity()

    def keys_values(
        self, context: Float[Tensor, "B S Dc"]
    ) -> tuple[Float[Tensor, "B H S Dh"], Float[Tensor, "B H S Dh"]]:
        """Keys and values (B, H, S, head_width) of ``context`` (B, S, context_width)."""
        context = cast_once(context)
        return self.k_norm(self._split(self.k_proj(context))), self._split(self.v_proj(context))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Float[Tensor, "B H S Dh"],
        values: Float[Tensor, "B H S Dh"],
        *,
        mask: Bool[Tensor, "#B #H #T #S"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D) from ``x`` (B, T, D); ``mask`` as in :class:`Attention`."""
        y = attend(self._queries(x), keys, values, mask=mask, causal=False)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Float[Tensor, "B T D"],
        keys: Float[Tensor, "B H S Dh"],
        *,
        mask: Bool[Tensor, "#B #H #T #S"] | None = None,
    ) -> Float[Tensor, "B H T S"]:
        """The attention itself, (B, H, T, S); a query without a key has zeros. For maps, not for training."""
        scores = (self._queries(x) * self.head_width**-0.5) @ keys.transpose(-1, -2)
        if mask is None:
            return scores.softmax(-1)
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_norm(self._split(self.q_proj(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


def attend(
    q: Float[Tensor, "B H T Dh"],
    k: Float[Tensor, "B H S Dh"],
    v: Float[Tensor, "B H S Dh"],
    *,
    mask: Tensor | None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T Dh"]:
    """(B, H, T, head_width) from queries (B, H, T, head_width) and keys, values (B, H, S, head_width).

    ``dropout`` is the share of attention weights set to zero (the rest is scaled up).

    The kernel is PyTorch's SDPA, on a CPU in the precision of :func:`kernel_precision`.
    """
    with kernel_precision(q, k, v) as cast, small_products() as backward_too:
        y = F.scaled_dot_product_attention(
            cast(q), cast(k), cast(v), attn_mask=mask, is_causal=causal, dropout_p=dropout
        )
        backward_too(y)
    return y.to(q.dtype)


def cast_once(x: Tensor) -> Tensor:
    """``x`` in autocast's precision, where autocast is on: several projections would each cast it anew, and cast their
    gradients back."""
    device_type = x.device.type
    known = torch.amp.is_autocast_available(device_type)  # not for tensors of the meta device
    cast = known and x.dtype == torch.float32 and torch.is_autocast_enabled(device_type)
    return x.to(torch.get_autocast_dtype(device_type)) if cast else x


_FROZEN: ContextVar[bool] = ContextVar("frozen", default=False)


@contextmanager
def frozen() -> Iterator[None]:
    """Inside there is no gradient, nor will there be one in a later pass over the same."""
    before = _FROZEN.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _FROZEN.reset(before)


@contextmanager
def kernel_precision(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, attention on these may run in another precision where that is the faster way; yields how to cast its
    tensors.

    On a CPU half precision trains in float32: forward and backward the half-precision kernel takes 1.3 to 5.3 times as
    long. Plain products are up to twice as quick by themselves, but never in full training steps (torch 2.13, AMX bf16;
    benchmarks/attention.py, docs/notes/2026-12-trainings.md). What only answers goes the quicker way of this machine
    (:func:`half_is_quicker`): a model that was cast, and under autocast what is :func:`frozen`.

    Under autocast float32 holds for full-precision tensors, too: rotary positions turn half-precision queries into
    those, and autocast would turn them back; and for other passes without a gradient, since a later one with it must
    find the same (checkpoints, cached gradients).
    """
    half, autocast = q.dtype in (torch.bfloat16, torch.float16), torch.is_autocast_enabled("cpu")
    if q.device.type != "cpu" or not (half or autocast):
        yield lambda x: x
        return
    answers = _FROZEN.get() or not (autocast or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))))
    dtype = q.dtype if half else torch.get_autocast_dtype("cpu")
    if answers and half_is_quicker(dtype, single=q.shape[2] == 1):
        yield lambda x: x.to(dtype)
        return
    with torch.autocast("cpu", enabled=False):
        yield Tensor.float


@cache
def half_is_quicker(dtype: torch.dtype, *, single: bool) -> bool:
    """Whether this CPU's kernel of ``dtype`` answers sooner than float32's with the casts, for a ``single`` query over
    many keys (writing) or as many as keys (reading). Timed once a machine and kept beside the choice of precision."""
    facts = [torch.get_num_threads(), str(dtype), "attention", single]
    # Asked for under autocast, too, which would take float32 back to half.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        seconds = measured_once(facts, ("half", "full"), lambda: _both_ways(dtype, single))
    return seconds["half"] < seconds["full"]


def _both_ways(dtype: torch.dtype, single: bool) -> dict[str, Callable[[], Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows, keys = (4, 384) if single else (2, 256)
    q, k, v = (torch.randn(rows, 8, n, 64, generator=draw).to(dtype) for n in (1 if single else keys, keys, keys))
    kernel = partial(F.scaled_dot_product_attention, is_causal=not single)
    return {"half": lambda: kernel(q, k, v), "full": lambda: kernel(q.float(), k.float(), v.float()).to(dtype)}
