"""The gradient of one step, the same for any split of its samples into micro-batches and over processes.

Token terms add up: with ``total`` and ``count`` over the micro-batches m of all processes, the loss is
sum_m total_m / sum_m count_m, so each micro-batch contributes ``total_m / count`` with the count of the full step,
never its own mean; several terms add up with their weights, and gradients over the processes (parallel.py). Terms of
scope ``batch`` (contrastive, matching) need all samples at once: several micro-batches go through ``net.cached_loss``,
and the rows of other processes are gathered within the loss (nn/losses.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from isthmus.batch import IGNORE, Batch, Term
from isthmus.errors import StageError
from isthmus.net import Net
from isthmus.processes import all_gather, world_size
from isthmus.training.parallel import Engine


class NonFiniteLoss(Exception):
    """A term is NaN or infinite; ``micro`` is the micro-batch it was found in (none: in the step as a whole)."""

    def __init__(self, term: str, value: float, micro: int | None) -> None:
        super().__init__(f"the loss {term!r} is {value}")
        self.micro = micro


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a step carries: samples, real (unpadded) tokens of all streams, and learnt tokens, all summed over the
    processes; and the most and the fewest micro-batches that a process has."""

    samples: int
    tokens: int
    supervised: int
    most: int
    fewest: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> "Traffic":
        return Traffic(
            samples=sum(len(b) for b in batches),
            tokens=sum(int(t.lengths.sum()) for b in batches for t in b.text.values()),
            supervised=sum(b.supervised() for b in batches),
            most=len(batches),
            fewest=len(batches),
        )

    @staticmethod
    def sum(parts: Iterable["Traffic"]) -> "Traffic":
        parts = list(parts)
        return Traffic(
            samples=sum(t.samples for t in parts),
            tokens=sum(t.tokens for t in parts),
            supervised=sum(t.supervised for t in parts),
            most=max(t.most for t in parts),
            fewest=min(t.fewest for t in parts),
        )


def backward(
    engine: Engine,
    batches: Sequence[Batch],
    autocast: AbstractContextManager[object],
    *,
    traffic: Traffic | None = None,
) -> dict[str, float]:
    """Add the step's gradient to the parameters; the mean of each term. Several processes call it together, each with
    its share of the rows (none, maybe), and all end with the step's gradient and means. They gather from each other
    the step's ``traffic`` when it is left out.

    Raises NonFiniteLoss, and StageError when terms cannot be split, nothing is learnt, or nothing open is reached.
    """
    traffic = Traffic.sum(all_gather(Traffic.of(batches))) if traffic is None else traffic
    if traffic.most > 1 and engine.net.gradient_cache:
        _demand_one_objective(type(engine.net))
        with autocast:
            terms: Mapping[str, Term] = engine.cached_loss(batches)
        return _Sums.of(terms).agreed().means(batches)
    passes = engine.passes(batches, traffic.most, traffic.fewest)
    if traffic.most == 1:
        return _at_once(engine, passes, batches, autocast)
    return _accumulate(engine, passes, batches, autocast)


class _Sums:
    """Sum and count of each term over the batches so far; ``bad`` is the first that was not finite."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.bad: NonFiniteLoss | None = None

    @staticmethod
    def of(terms: Mapping[str, Term], micro: int | None = None) -> "_Sums":
        sums = _Sums()
        sums.add(terms, micro)
        return sums

    def add(self, terms: Mapping[str, Term], micro: int | None = None) -> None:
        """Raises StageError for what a net of the user's own gives in place of terms."""
        _demand_terms(terms)
        for name, term in terms.items():
            total = float(term.total.detach())
            self.totals[name] = self.totals.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + term.count
            if self.bad is None and not math.isfinite(total):
                self.bad = NonFiniteLoss(name, float(term.mean.detach()), micro)

    def agreed(self) -> "_Sums":
        """The sums of all processes. Raises NonFiniteLoss in every process when one met such a value."""
        totals_of_all = _Sums()
        for totals, counts in all_gather((self.totals, self.counts)):
            for name, total in totals.items():
                totals_of_all.totals[name] = totals_of_all.totals.get(name, 0.0) + total
                totals_of_all.counts[name] = totals_of_all.counts.get(name, 0) + counts[name]
        if self.bad is not None:
            raise self.bad
        for name, total in totals_of_all.totals.items():
            if not math.isfinite(total):
                raise NonFiniteLoss(name, total / max(1, totals_of_all.counts[name]), None)
        return totals_of_all

    def means(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Raises StageError for a term that counts nothing."""
        for name, count in self.counts.items():
            _demand_learnt(name, count, batches)
        return {name: total / self.counts[name] for name, total in self.totals.items()}


def _at_once(
    engine: Engine,
    passes: Sequence[Batch | None],
    batches: Sequence[Batch],
    autocast: AbstractContextManager[object],
) -> dict[str, float]:
    """At most one micro-batch in each process: what the terms count is known before the first gradient."""
    terms: Mapping[str, Term] = {}
    for batch in passes:
        with autocast:
            terms = engine.loss(batch, last=True)
    sums = _Sums.of(terms, micro=0)
    _demand_all_rows(engine.net, terms)
    sums = sums.agreed()
    means = sums.means(batches)
    loss = sum((term.weight * (term.total / sums.counts[name]) for name, term in terms.items()), start=0.0)
    # One process of several may hold nothing that is learnt; alone, that is a mistake.
    engine.backward(loss if world_size() > 1 else _reached(loss))
    return means


def _accumulate(
    engine: Engine,
    passes: Sequence[Batch | None],
    batches: Sequence[Batch],
    autocast: AbstractContextManager[object],
) -> dict[str, float]:
    sums = _Sums()
    table = Counter[str]()
    for part in all_gather(_learnt(batches)):
        table.update(part)
    for index, batch in enumerate(passes):
        with autocast:
            terms = engine.loss(batch, last=index == len(passes) - 1)
        sums.add(terms, index)
        if (
            sums.bad is not None and world_size() == 1
        ):  # with several processes, the others wait for every pass of this one
            break
        parts: list[Tensor] = []
        for name, term in terms.items():
            if term.scope != "token":
                raise StageError(
                    f"The term {name!r} belongs to the full batch and cannot be split into "
                    f"{len(batches)} micro-batches: {type(engine.net).__name__} has no exact gradient cache. "
                    "Use one micro-batch per step."
                )
            parts.append(term.weight * term.total / max(1, _expected(table, name)))
        engine.backward(sum(parts, start=0.0))
    totals_of_all = sums.agreed()
    means = totals_of_all.means(batches)
    _correct(engine.net, totals_of_all.counts, {name: _expected(table, name) for name in totals_of_all.counts})
    return means


def _learnt(batches: Sequence[Batch]) -> dict[str, int]:
    """Learnt tokens of each stream, of each ``stream/source`` (the rows of that source), and of all (no name)."""
    table: Counter[str] = Counter()
    for batch in batches:
        table[""] += batch.supervised()
        for stream, tokens in batch.text.items():
            rows = [0] * len(batch) if tokens.labels is None else (tokens.labels[:, 1:] != IGNORE).sum(1).tolist()
            table[stream] += sum(rows)
            for source, count in zip(batch.sources, rows, strict=True):
                table[f"{stream}/{source}"] += count
    return dict(table)


def _expected(table: Mapping[str, int], name: str) -> int:
    """What a term should count: its stream's learnt tokens, or those of all streams when none is called so."""
    return table.get(name, 0 if "/" in name else table[""])


def _correct(net: nn.Module, counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
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
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(max(1, expected[name]) / counts[name])


def _demand_one_objective(net: type) -> None:
    """Raises StageError for a class whose loss is its own and whose gradient cache is of another class's loss."""
    loss, cached = (next(c for c in net.__mro__ if name in vars(c)) for name in ("loss", "cached_loss"))
    if loss is not cached and issubclass(loss, cached):
        raise StageError(
            f"{loss.__name__} has a loss of its own, and its gradient cache is of {cached.__name__}'s: several "
            "micro-batches a step would train that one. Give it cached_loss, or gradient_cache = False, or take "
            "accumulate out of the stage."
        )


def _demand_all_rows(net: Net, terms: Mapping[str, Term]) -> None:
    """Raises StageError for a term of the full batch that each of several processes would make of its own rows."""
    alone = [name for name, term in terms.items() if term.scope == "batch"]
    if alone and world_size() > 1 and not net.contrasts:
        raise StageError(
            f"The term {alone[0]!r} belongs to the full batch, and each of {world_size()} processes has a part of it: "
            f"gather the rows within the loss (isthmus.nn.losses.gather) and say so in {type(net).__name__}, "
            "contrasts = True; or train in one process."
        )


def _demand_terms(terms: object) -> None:
    if not isinstance(terms, Mapping):
        raise StageError(
            f"The net's loss gave a {type(terms).__name__} and not terms by name: return {{'lm': Term(sum, count)}}, "
            "the sum over what is learnt and how much that is (isthmus.batch.Term)."
        )
    for name, term in terms.items():
        if not isinstance(term, Term) or not isinstance(term.total, Tensor) or not isinstance(term.count, int):
            raise StageError(
                f"The term {name!r} of the net's loss must be a Term(sum, count) of a tensor and a whole number "
                f"(isthmus.batch.Term), and is {term!r:.80}."
            )


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
