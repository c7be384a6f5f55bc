"""Contrastive losses, exact on any number of processes.

Legend: B rows of this process, G rows of all processes, D width.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.processes import gather_rows, rank, sizes, talking, world_size

Similarity = Literal["cosine", "dot", "euclidean"]


def similarity(
    images: Float[Tensor, "n *queries D"], texts: Float[Tensor, "m D"], metric: Similarity = "cosine"
) -> Float[Tensor, "n m"]:
    """(B, C) from embeddings (B, D) and (C, D): cosine, dot product or negative squared Euclidean distance.

    Images of several vectors each, (B, Q, D), are as similar as the best of them (BLIP-2's queries). Computed in
    float32 at least, whatever the autocast.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = widen(images), widen(texts)
        if images.ndim == 3:
            return similarity(images.flatten(0, 1), texts, metric).unflatten(0, images.shape[:2]).amax(1)
        if metric == "cosine":
            return F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        products = images @ texts.T
        if metric == "dot":
            return products
        return 2 * products - images.square().sum(-1)[:, None] - texts.square().sum(-1)[None]


def info_nce(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
    *,
    metric: Similarity = "cosine",
    keys: Sequence[str] = (),
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al. 2021, fig. 3), mean over this process's B rows: a scalar.

    ``images`` and ``texts`` (B, D) are this process's pairs; rows of all other processes are gathered as negatives,
    so that the mean over all rows, and its gradient, are those of one process holding all G rows. Two rows with
    the same non-empty key show the same picture: neither is the other's negative, nor its positive.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts, scale = widen(images), widen(texts), widen(log_scale).exp()
        all_images, all_texts = gather(images), gather(texts)
        target = own_columns(len(images), images.device)
        left_out = same_picture(keys, target)
        total = images.new_zeros(())
        for own, others in ((images, all_texts), (texts, all_images)):
            logits = scale * similarity(own, others, metric)
            if left_out is not None:
                logits = logits.masked_fill(left_out, -torch.inf)
            total = total + F.cross_entropy(logits, target)
        return total / 2


def sigmoid_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    metric: Similarity = "cosine",
    keys: Sequence[str] = (),
) -> Float[Tensor, ""]:
    """SigLIP's loss (Zhai et al. 2023, eq. 1): -Σᵢⱼ log σ(zᵢⱼ (s·simᵢⱼ + b)) over B, z = 1 on pairs and -1 elsewhere.

    Arguments, processes and equal keys as in :func:`info_nce`.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = widen(images), widen(texts)
        all_texts = gather(texts)
        target = own_columns(len(images), images.device)
        logits = widen(log_scale).exp() * similarity(images, all_texts, metric) + widen(bias)
        sign = torch.full_like(logits, -1.0)
        sign[torch.arange(len(images), device=images.device), target] = 1.0
        terms = F.logsigmoid(sign * logits)
        left_out = same_picture(keys, target)
        if left_out is not None:
            terms = terms.masked_fill(left_out, 0.0)
        return -terms.sum() / len(images)


def own_columns(rows: int, device: torch.device) -> Int[Tensor, " {rows}"]:
    """(B,) where this process's rows stand among those of all."""
    return torch.arange(rows, device=device) + sum(sizes(rows, device)[: rank()])


def gather(x: Tensor) -> Tensor:
    """(G, D): the rows (B, D) of all processes in order of rank, with the exact gradient. B may differ."""
    return _Gather.apply(x) if world_size() > 1 else x  # type: ignore[return-value]


def gather_around(x: Tensor) -> Tensor:
    """(G, ...): the rows of all processes in order of rank; only this process's own rows carry a gradient."""
    if world_size() == 1:
        return x
    parts, _ = gather_rows(x)
    parts[rank()] = x
    return torch.cat(parts)


class _Kept(Protocol):
    """What the backward pass needs of the forward pass."""

    own: slice


class _Gather(torch.autograd.Function):
    """Forward concatenates over ranks; backward sums the gradients over ranks and keeps the own slice."""

    @staticmethod
    def forward(ctx: _Kept, x: Tensor) -> Tensor:
        parts, counts = gather_rows(x)
        ctx.own = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> Tensor:
        # All-reduce and slice rather than reduce-scatter: processes have unlike numbers of rows.
        gradient = gradients[0].contiguous().clone()
        with talking():
            dist.all_reduce(gradient)
        return gradient[ctx.own]


def same_picture(keys: Sequence[str], target: Int[Tensor, " B"]) -> Bool[Tensor, "B G"] | None:
    """(B, G) bool, true where a row meets another row of the same picture; none when all pictures differ."""
    if not keys:
        return None
    # 63-bit fingerprints travel between processes instead of strings; an empty key equals no other row's.
    marks = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1 if key else -1 for key in keys]
    own = torch.tensor(marks, device=target.device)
    others = gather_around(own)
    same = (own[:, None] == others[None]) & (own >= 0)[:, None]
    same[torch.arange(len(own), device=target.device), target] = False
    return same if bool(same.any()) else None


def widen(x: Tensor) -> Tensor:
    """In float32 at least: half precision is widened, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
