"""The gradient of one step, the same for any split of its samples into micro-batches.

Token terms add up: with ``total`` and ``count`` over the micro-batches m, the loss is sum_m total_m / sum_m count_m,
so each micro-batch contributes ``total_m / count`` with the step's whole count, never its own mean; several terms
add up with their weights. Terms of scope
``batch`` (contrastive, matching) need all samples at once: several micro-batches go through ``net.cached_loss``.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from isthmus.batch import IGNORE, Batch, Term
from isthmus.errors import StageError
from isthmus.training.protocols import Net, as_module


class NonFiniteLoss(Exception):
    """A term is NaN or infinite; ``micro`` is the micro-batch it was seen in (none: in the step as a whole)."""

    def __init__(self, term: str, value: float, micro: int | None) -> None:
        super().__init__(f"the loss {term!r} is {value}")
        self.micro = micro


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a step carries: samples, real (unpadded) tokens of all streams, and learnt tokens."""

    samples: int
    tokens: int
    supervised: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> "Traffic":
        return Traffic(
            samples=sum(len(b) for b in batches),
            tokens=sum(int(t.lengths.sum()) for b in batches for t in b.text.values()),
            supervised=sum(b.supervised() for b in batches),
        )


def backward(net: Net, batches: Sequence[Batch], autocast: AbstractContextManager[object]) -> dict[str, float]:
    """Add the step's gradient to the parameters; the mean of each term.

    Raises NonFiniteLoss, and StageError when terms cannot be split, nothing is learnt, or nothing open is reached.
    """
    if len(batches) > 1 and hasattr(net, "cached_loss"):
        with autocast:
            terms: Mapping[str, Term] = net.cached_loss(batches)  # type: ignore[attr-defined]
        return _finite_means(terms)
    if len(batches) == 1:
        with autocast:
            terms = net.loss(batches[0])
        means = _finite_means(terms, micro=0)
        for name, term in terms.items():
            _demand_learnt(name, term.count, batches)
        _reached(sum((term.weight * term.mean for term in terms.values()), start=0.0)).backward()
        return means
    return _accumulate(net, batches, autocast)


def _accumulate(net: Net, batches: Sequence[Batch], autocast: AbstractContextManager[object]) -> dict[str, float]:
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    expected: dict[str, int] = {}
    for index, batch in enumerate(batches):
        with autocast:
            terms = net.loss(batch)
        _finite_means(terms, micro=index)
        parts: list[Tensor] = []
        for name, term in terms.items():
            if term.scope != "token":
                raise StageError(
                    f"The term {name!r} belongs to the whole batch and cannot be split into "
                    f"{len(batches)} micro-batches: {type(net).__name__} has no exact gradient cache. "
                    "Use one micro-batch per step."
                )
            expected.setdefault(name, _learnt(batches, name))
            counts[name] = counts.get(name, 0) + term.count
            totals[name] = totals.get(name, 0.0) + float(term.total.detach())
            parts.append(term.weight * term.total / max(1, expected[name]))
        loss = sum(parts, start=0.0)
        # A micro-batch without a learnt token has a constant loss: nothing to add.
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    for name, count in counts.items():
        _demand_learnt(name, count, batches)
    _correct(net, counts, expected)
    return {name: totals[name] / counts[name] for name in totals}


def _learnt(batches: Sequence[Batch], name: str) -> int:
    """The step's learnt tokens of the stream ``name``, or of all streams when no stream is called so.

    Of ``stream/source`` only the rows of that source count.
    """
    stream, slash, source = name.partition("/")
    if slash:
        rows = [(b, [i for i, s in enumerate(b.sources) if s == source]) for b in batches if stream in b.text]
        found = [b.text[stream].labels[i] for b, i in rows if i and b.text[stream].labels is not None]  # type: ignore[index]
        return sum(int((labels[:, 1:] != IGNORE).sum()) for labels in found)
    streams = [b.text[name].labels for b in batches if name in b.text]
    if streams:
        return sum(int((labels[:, 1:] != IGNORE).sum()) for labels in streams if labels is not None)
    return sum(b.supervised() for b in batches)


def _correct(net: Net, counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Rescale when a term counted other than its labels say. Exact for one term, impossible for several."""
    wrong = [name for name in counts if counts[name] != max(1, expected[name])]
    if not wrong:
        return
    name = wrong[0]
    if len(counts) > 1:
        raise StageError(
            f"The term {name!r} counts {counts[name]} items, its labels {expected[name]}; with several "
            "terms and several micro-batches the step cannot be weighted. Use one micro-batch per step."
        )
    for parameter in as_module(net).parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(max(1, expected[name]) / counts[name])


def _finite_means(terms: Mapping[str, Term], micro: int | None = None) -> dict[str, float]:
    means = {name: float(term.mean.detach()) for name, term in terms.items()}
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(name, value, micro)
    return means


def _demand_learnt(name: str, count: int, batches: Sequence[Batch]) -> None:
    if count == 0:
        ids = ", ".join([i for b in batches for i in b.ids][:5])
        raise StageError(
            f"A step has nothing to learn from: its term {name!r} counts 0 items (samples {ids}, …). "
            "Check the template and the length limit: every sample needs at least one learnt token."
        )


def _reached(loss: "Tensor | float") -> Tensor:
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss
    raise StageError(
        "The loss does not depend on any open tensor. Check the stage's patterns: what they open is not "
        "used by this objective."
    )
