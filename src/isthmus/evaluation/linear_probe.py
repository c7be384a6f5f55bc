"""Linear probe: logistic regression on frozen features (Radford et al. 2021, section 3.2 and appendix A.3).

Minimises |W|² / 2 + C · Σ cross-entropy (the bias is not penalised) by L-BFGS, at most 1000 iterations, the features
as they are. C is found on a validation split over log-spaced values between 1e-6 and 1e6, eight per decade: first
every second decade, then ever finer around the best. The final fit uses training and validation samples together.

Shapes: N pictures, D width, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError

STRENGTHS = np.logspace(-6, 6, 97)
"""The values of C that can be chosen."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A fitted classifier: ``weight`` (K, D), ``bias`` (K,), both float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        return features.double() @ self.weight.T + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        return float((self.logits(features).argmax(dim=1) == labels).double().mean())


def fit(features: Tensor, labels: Tensor, classes: int, strength: float, start: Probe | None = None) -> Probe:
    """The minimiser for one C (``strength``), from zero or from an earlier solution.

    The objective is divided by C·N, which moves no minimum and keeps its gradients of one size for every C.
    """
    x = features.double()
    first = start or Probe(x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight = first.weight.clone().requires_grad_()
    bias = first.bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * strength * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return Probe(weight.detach(), bias.detach())


@dataclass(frozen=True, slots=True)
class Sweep:
    """The chosen C, its validation accuracy, and the accuracy of every C tried."""

    strength: float
    accuracy: float
    tried: dict[float, float]


def sweep(features: Tensor, labels: Tensor, classes: int, *, held_out: Tensor) -> Sweep:
    """C by validation accuracy; of equally good ones the smallest, which is the simplest model.

    ``held_out`` (N,) bool marks the validation samples.
    """
    tried: dict[int, float] = {}

    def attempt(index: int) -> None:
        if 0 <= index < len(STRENGTHS) and index not in tried:
            probe = fit(features[~held_out], labels[~held_out], classes, float(STRENGTHS[index]))
            tried[index] = probe.accuracy(features[held_out], labels[held_out])

    def best() -> int:
        return min(tried, key=lambda i: (-tried[i], i))

    step = 16
    for index in range(0, len(STRENGTHS), step):
        attempt(index)
    while step > 1:
        step //= 2
        peak = best()
        attempt(peak - step)
        attempt(peak + step)
    chosen = best()
    return Sweep(float(STRENGTHS[chosen]), tried[chosen], {float(STRENGTHS[i]): a for i, a in sorted(tried.items())})


def train_probe(
    features: Tensor, labels: Tensor, classes: int, *, seed: int = 0, share: float = 0.2
) -> tuple[Probe, Sweep]:
    """Sweep C with a ``share`` of every class held out, then fit on everything.

    Raises DataError when a class has fewer than two samples: it cannot stand on both sides of the split.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(classes):
        members = order[labels[order] == c]
        if len(members) < 2:
            raise DataError(
                f"Class number {c} has {len(members)} training samples; a linear probe needs at least 2 of each "
                "class, one to fit and one to choose the regularisation with."
            )
        held_out[members[: max(1, round(share * len(members)))]] = True
    found = sweep(features, labels, classes, held_out=held_out)
    return fit(features, labels, classes, found.strength), found
