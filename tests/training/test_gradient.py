"""Any split of a step gives the same gradient; batch terms are exact or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.batch import IGNORE, Term, Tokens
from isthmus.errors import StageError
from isthmus.net import Net
from isthmus.stage import Group, Stage
from isthmus.training import gradient as gradients
from isthmus.training import train
from isthmus.training.engines import engine
from isthmus.training.gradient import NonFiniteLoss, Traffic, backward
from isthmus.training.precision import context
from tests.narrow import there

from .toys import ToyLoader, ToyNet, make_batch

FP32 = context("fp32", torch.device("cpu"))


def gradient(net, batches):
    net.zero_grad()
    means = backward(engine(net), batches, FP32)
    return means, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-10) for k in a)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=8), st.data())
def test_any_split_gives_the_same_gradient(samples, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(samples) - 1))))
    pieces = [samples[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    net = ToyNet(dtype=torch.float64).eval()
    whole_means, whole = gradient(net, [make_batch(samples)])
    means, split = gradient(net, [make_batch(piece) for piece in pieces])
    assert close(whole, split)
    assert means == pytest.approx(whole_means, abs=1e-10)


@pytest.mark.parametrize("split", [(1,) * 8, (3, 5)])
def test_training_is_the_same_for_1x8_8x1_and_3_and_5(tmp_path, split):
    weights = []
    for name, sizes in (("whole", (8,)), ("split", split)):
        net = ToyNet(dtype=torch.float64, dropout=0.0)
        train(net, ToyLoader(batch=8, split=sizes), stage(5), tmp_path / name, progress=False)
        weights.append(dict(net.state_dict()))
    assert close(*weights)


def stage(steps):
    return Stage(
        name="s", train=(Group("connector.*", lr=1e-2), Group("language.*", lr=1e-2)), steps=steps, precision="fp32"
    )


class Counting(ToyNet):
    """A net that counts other items than its labels (here: twice each)."""

    def loss(self, batch):
        term = super().loss(batch)["lm"]
        return {"mine": Term(2 * term.total, 2 * term.count)}


def test_one_term_with_a_count_of_its_own_is_rescaled():
    net = Counting(dtype=torch.float64).eval()
    whole = gradient(net, [make_batch([1, 2, 3, 4])])
    split = gradient(net, [make_batch([1]), make_batch([2, 3, 4])])
    assert close(whole[1], split[1])
    assert split[0] == pytest.approx(whole[0])


def test_two_streams_are_each_weighted_by_their_own_count():
    class Two(ToyNet):
        def loss(self, batch):
            terms = {}
            for name, stream in batch.text.items():
                lone = type(batch)(ids=batch.ids, sources=batch.sources, text={"lm": stream})
                terms[name] = super().loss(lone)["lm"]
            return terms

    def two(samples):
        batch = make_batch(samples)
        lm = batch.text["lm"]
        fewer = torch.where(torch.arange(lm.ids.shape[1]) < 4, there(lm.labels), IGNORE)
        return type(batch)(
            ids=batch.ids,
            sources=batch.sources,
            text={"lm": lm, "aux": Tokens(ids=lm.ids, lengths=lm.lengths, labels=fewer)},
        )

    net = Two(dtype=torch.float64).eval()
    assert close(gradient(net, [two([1, 2, 3])])[1], gradient(net, [two([1]), two([2, 3])])[1])


class Contrastive(Net):
    """Toy contrastive net: the loss of a row depends on all rows."""

    vision: nn.Embedding

    def __init__(self, cached=True):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = nn.Embedding(11, 4), nn.Embedding(11, 4)
        self.gradient_cache = cached

    def features(self, batch):
        ids = batch.text["lm"].ids
        return self.vision(ids[:, 0]), self.text(ids[:, 1])

    @staticmethod
    def term(a, b):
        return Term(nn.functional.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="sum"), len(a), "batch")

    def loss(self, batch):
        return {"itc": self.term(*self.features(batch))}

    def cached_loss(self, batches):
        with torch.no_grad():
            sides = [
                torch.cat(side).requires_grad_() for side in zip(*(self.features(b) for b in batches), strict=True)
            ]
        term = self.term(*sides)
        term.mean.backward()
        start = 0
        for batch in batches:
            pair = self.features(batch)
            torch.autograd.backward(pair, [there(side.grad)[start : start + len(batch)] for side in sides])
            start += len(batch)
        return {"itc": Term(term.total.detach(), term.count, "batch")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_terms_use_the_gradient_cache(precision):
    """Also under bf16 autocast, where weights cast under no_grad must not be reused with gradients."""
    own = context(precision, torch.device("cpu"))
    net = Contrastive().double() if precision == "fp32" else nn_linear_contrastive()
    grads = []
    for batches in ([make_batch([1, 2, 3, 4, 5])], [make_batch([1, 2]), make_batch([3]), make_batch([4, 5])]):
        net.zero_grad()
        backward(engine(net), batches, own)
        grads.append({n: there(p.grad).clone() for n, p in net.named_parameters()})
    tolerance = 1e-12 if precision == "fp32" else 2e-3
    for name, whole in grads[0].items():
        assert torch.allclose(whole, grads[1][name], atol=tolerance, rtol=0), name
        assert whole.any()


def nn_linear_contrastive():
    net = Contrastive()
    project = net.project = nn.Linear(4, 4)
    plain = net.features
    net.features = lambda batch: tuple(project(side).float() for side in plain(batch))
    return net


def test_a_contrast_of_a_part_of_the_rows_is_refused(monkeypatch):
    net = Contrastive()
    monkeypatch.setattr(gradients, "world_size", lambda: 2)
    with pytest.raises(StageError, match=r"'itc' belongs to the full batch, and each of 2 processes has a part of it"):
        backward(engine(net), [make_batch([1, 2])], FP32)
    net.contrasts = True
    assert backward(engine(net), [make_batch([1, 2])], FP32).keys() == {"itc"}


def test_a_gradient_cache_of_another_loss_is_refused():
    """Whoever changes the loss of a net that has one would else train the net's own."""

    class Changed(Contrastive):
        def loss(self, batch):
            return {"itc": self.term(*(2 * side for side in self.features(batch)))}

    backward(engine(Changed()), [make_batch([1, 2])], FP32)
    with pytest.raises(StageError, match="Changed has a loss of its own, and its gradient cache is of Contrastive's"):
        backward(engine(Changed()), [make_batch([1, 2]), make_batch([3])], FP32)


def test_batch_terms_without_a_cache_are_refused():
    with pytest.raises(StageError, match="'itc' belongs to the full batch"):
        backward(engine(Contrastive(cached=False)), [make_batch([1, 2]), make_batch([3])], FP32)


def test_a_micro_batch_without_learnt_tokens_adds_nothing():
    net = ToyNet(dtype=torch.float64).eval()
    silent = make_batch([7])
    there(silent.text["lm"].labels).fill_(IGNORE)
    assert close(gradient(net, [make_batch([1, 2])])[1], gradient(net, [silent, make_batch([1]), make_batch([2])])[1])
    for batches in ([silent], [silent, silent]):
        with pytest.raises(StageError, match=r"nothing to learn from.*s7"):
            backward(engine(net), batches, FP32)


def test_a_loss_without_open_tensors_is_an_error():
    net = ToyNet().requires_grad_(False)
    with pytest.raises(StageError, match="does not depend on any open tensor"):
        backward(engine(net), [make_batch([1])], FP32)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (lambda terms: terms["lm"].mean, "gave a Tensor and not terms by name"),
        (lambda terms: {"lm": terms["lm"].mean}, "'lm' of the net's loss must be a Term"),
        *(
            (lambda terms, count=count: {"lm": Term(terms["lm"].total, count)}, "a whole number")  # type: ignore[arg-type]
            for count in (torch.tensor(2.5), torch.tensor([3, 4]), float("nan"), "3", None)
        ),
    ],
)
def test_a_loss_that_gives_no_terms_is_told_what_to_give(given, fault):
    net = ToyNet()
    real = net.loss
    net.loss = lambda batch: given(real(batch))
    with pytest.raises(StageError, match=fault):
        backward(engine(net), [make_batch([1])], FP32)


@pytest.mark.parametrize("kind", [torch.tensor, np.int64, float])
@pytest.mark.parametrize("batches", [[[1, 2]], [[1], [2]]])
def test_a_count_is_any_whole_number(kind, batches):
    net, batches = ToyNet().eval(), [make_batch(ids) for ids in batches]
    real = net.loss
    due = gradient(net, batches)
    net.loss = lambda batch: {name: Term(term.total, kind(term.count)) for name, term in real(batch).items()}
    assert close(gradient(net, batches)[1], due[1])
    assert gradient(net, batches)[0] == due[0]


def test_a_nan_names_its_micro_batch():
    net = ToyNet()
    real = net.loss
    net.loss = lambda batch: {"lm": Term(real(batch)["lm"].total * (float("nan") if "s3" in batch.ids else 1), 1)}
    with pytest.raises(NonFiniteLoss) as caught:
        backward(engine(net), [make_batch([1]), make_batch([2]), make_batch([3, 4])], FP32)
    assert caught.value.micro == 2


def test_traffic_counts_real_tokens():
    batch = make_batch([1, 2])
    lengths = batch.text["lm"].lengths.tolist()
    traffic = Traffic.of([batch, batch])
    assert traffic == Traffic(
        samples=4, tokens=2 * sum(lengths), supervised=2 * sum(n - 2 for n in lengths), most=2, fewest=2
    )
