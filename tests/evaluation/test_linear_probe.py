import pytest
import torch

from isthmus.errors import DataError
from isthmus.evaluation.linear_probe import STRENGTHS, fit, sweep, train_probe
from tests.narrow import there


def clusters(n=240, classes=3, width=5, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, width, generator=generator), labels


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_the_fit_is_the_minimum_of_the_stated_objective(strength):
    features, labels = clusters()
    probe = fit(features, labels, 3, strength)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum")
    (loss * strength + weight.square().sum() / 2).backward()
    scale = strength * len(labels)
    assert float(there(weight.grad).abs().max()) / scale < 1e-6
    assert float(there(bias.grad).abs().max()) / scale < 1e-6


def test_a_stronger_penalty_gives_smaller_weights():
    features, labels = clusters()
    norms = [float(fit(features, labels, 3, c).weight.norm()) for c in (1e-4, 1e-2, 1.0)]
    assert norms == sorted(norms)


def test_separated_clusters_are_learnt_and_held_out_ones_recognised():
    probe, found = train_probe(*clusters(spread=0.3), classes=3)
    assert probe.accuracy(*clusters(spread=0.3, seed=1)) > 0.98
    assert found.accuracy > 0.95


def test_the_sweep_goes_over_every_decade_and_refines_around_the_best():
    features, labels = clusters(n=60, spread=3.0)
    held_out = torch.arange(60) % 4 == 0
    found = sweep(features, labels, 3, held_out=held_out)
    assert {round(c, 12) for c in STRENGTHS[::16]} <= {round(c, 12) for c in found.tried}
    assert found.accuracy == max(found.tried.values())
    assert found.strength == min(c for c, a in found.tried.items() if a == found.accuracy)
    assert len(found.tried) <= 15
    again = fit(features[~held_out], labels[~held_out], 3, found.strength)
    assert again.accuracy(features[held_out], labels[held_out]) == found.accuracy


def test_a_class_of_one_sample_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        train_probe(torch.randn(3, 2), torch.tensor([0, 0, 1]), classes=2)
