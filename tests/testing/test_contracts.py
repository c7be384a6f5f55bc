"""`isthmus verify` passes sound models of every kind, and each broken one fails in its own row."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from isthmus.batch import IGNORE, Term
from isthmus.cli.app import app
from isthmus.errors import ConfigError
from isthmus.testing.contracts import CONTRACTS, verify
from tests.interop import tiny_models


def verdicts(model: Any, *only: str) -> dict[str, str]:
    return {row.name: row.verdict for row in verify(model, only=only)}


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_sound_models_hold_every_contract(name: str) -> None:
    model = tiny_models.MODELS[name]()
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    rows = verify(model)
    assert [row.name for row in rows] == list(CONTRACTS)
    assert not [row for row in rows if row.verdict == "FAIL"]
    absent = {row.name for row in rows if row.verdict == "n/a"}
    expected = {"packed = padded"}
    expected |= {"picture matters"} if name.startswith(("lm", "text")) else set()
    vectors = ("clip", "siglip", "blip2 represent", "image encoder", "text encoder")
    expected |= {"cached = uncached", "nothing looks ahead", "loss = logits"} if name in vectors else set()
    expected |= {"frozen parts untouched"} if name.endswith("encoder") else set()
    expected |= {"left = right padding"} if name == "image encoder" else set()
    expected |= {"export = transformers"} if name == "flamingo" else set()
    expected |= set() if name in ("lm", "llava", "llava_next") else {"turns end"}
    assert absent == expected
    assert all(row.difference is not None for row in rows if row.verdict == "pass")
    assert all(callable(getattr(model, capability)) for capability in model.capabilities)
    # the model is left as it was
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
    assert all(p.requires_grad for p in model.net.parameters())
    assert not any(m.training for m in model.net.modules())


def broken_batch(model: Any) -> None:
    """Rows leak into each other: each embedding gets a little of the batch's mean."""
    embed = model.net.language.embed
    model.net.language.embed = lambda ids: embed(ids) + 0.1 * embed(ids).mean(0, keepdim=True)


def draws(model: Any) -> None:
    """Dropout that does not end with training."""
    embed = model.net.language.embed
    model.net.language.embed = lambda ids: nn.functional.dropout(embed(ids), 0.1)


def broken_padding(model: Any) -> None:
    """Attention in both directions, so that padding on the right is seen."""
    language = model.net.language

    def both_ways(embeds: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        mask = torch.zeros(len(embeds), 1, embeds.shape[1], embeds.shape[1])
        return language.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits

    language.logits = both_ways


def broken_left(model: Any) -> None:
    """Generation forgets the mask of what lies left of a shorter row."""
    make = model.net.language._window

    def blind() -> Any:
        window = make()
        mask = window.mask
        window.mask = lambda: None if (found := mask()) is None else torch.ones_like(found)
        return window

    model.net.language._window = blind


def broken_cache(model: Any) -> None:
    """Cached keys are those of another position."""
    attention = model.net.language.lm.model.layers[0].self_attn
    forward = attention.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.layers[0].keys = cache.layers[0].keys.roll(1, dims=2)
        return found

    attention.forward = shifted


def ignored_picture(model: Any) -> None:
    """The connector gives the same for all pictures."""
    forward = model.net.connector.forward
    model.net.connector.forward = lambda features, *a, **k: forward(torch.ones_like(features), *a, **k)


def blank_only(model: Any) -> None:
    """All pictures but the blank one look alike: shuffling them changes nothing."""
    model.processor.image = _Flat(model.processor.image)


class _Flat:
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.__dict__.update({k: getattr(inner, k) for k in ("size", "mode", "mean", "std", "resample")})

    def __call__(self, picture: Any) -> torch.Tensor:
        pixels = self.inner(picture)
        return torch.ones_like(pixels) if pixels.std() > 0.3 else pixels

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()


def closed_gates(model: Any) -> None:
    for block in model.net.xattn:
        block.attn_gate.data.zero_()


def moving_frozen(model: Any) -> None:
    """After a step a frozen tensor is rounded."""
    net = model.net
    net.after_step = lambda: net.vision.positions.data.add_(1e-3)


def nothing_learnt(model: Any) -> None:
    """The loss does not reach the part that is to be trained."""
    forward = model.net.connector.forward
    model.net.connector.forward = lambda *a, **k: forward(*a, **k).detach()


def not_a_number(model: Any) -> None:
    model.net.vision.positions.data[0, 0] = float("nan")


def one_too_many(model: Any) -> None:
    model.net.vision.surprise = nn.Parameter(torch.zeros(2))


def not_saved(model: Any) -> None:
    """What is saved is rounded."""
    save, weight = model.save, next(model.net.connector.parameters())

    def rounded(*args: Any, **kwargs: Any) -> Any:
        kept = weight.data
        weight.data = kept.half().float()
        try:
            return save(*args, **kwargs)
        finally:
            weight.data = kept

    model.save = rounded


def looks_ahead(model: Any) -> None:
    """Attention in both directions over the row's own tokens: no neighbour and no padding is seen."""
    language = model.net.language

    def both_ways(embeds: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        mask = torch.zeros(len(embeds), 1, embeds.shape[1], embeds.shape[1])
        return language.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits

    language.logits = both_ways


def shifted_labels(model: Any) -> None:
    """Each token is learnt at its own place, where it is what is read."""

    def loss(batch: Any) -> dict[str, Term]:
        labels = batch.text["lm"].labels
        logits = model.net.logits(batch).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE)
        return {"lm": Term(total, int((labels != IGNORE).sum()))}

    model.net.loss = loss


def mean_for_sum(model: Any) -> None:
    """A term whose sum is a mean already learns too slowly."""
    loss = model.net.loss
    model.net.loss = lambda batch: {name: replace(term, total=term.mean) for name, term in loss(batch).items()}


def score_of_rows(model: Any) -> None:
    """A score per token, where sums are due."""
    score = model.net.score
    model.net.score = lambda batch: score(batch) / batch.text["lm"].lengths


def tensor_aside(model: Any) -> None:
    """What the net computes with is neither a parameter nor a buffer."""
    forward, aside = model.net.connector.forward, torch.linspace(-1, 1, 32)
    model.net.connector.forward = lambda *a, **k: forward(*a, **k) + aside


def another_activation(model: Any) -> None:
    """A net that does not do what its configuration says is another one in transformers."""
    for block in model.net.vision.blocks:
        block.mlp.activation = torch.relu


SABOTAGE = [
    (tiny_models.llava, draws, "again = before"),
    (tiny_models.lm, broken_batch, "batch = single"),
    (tiny_models.llava, broken_padding, "left = right padding"),
    (tiny_models.llava, broken_left, "left = right padding"),
    (tiny_models.lm, broken_cache, "cached = uncached"),
    (tiny_models.llava, ignored_picture, "picture matters"),
    (tiny_models.flamingo, ignored_picture, "picture matters"),
    (tiny_models.blip2, ignored_picture, "picture matters"),
    (tiny_models.clip, blank_only, "picture matters"),
    (tiny_models.flamingo, closed_gates, "picture matters"),
    (tiny_models.llava, moving_frozen, "frozen parts untouched"),
    (tiny_models.llava, nothing_learnt, "frozen parts untouched"),
    (tiny_models.clip, not_a_number, "tensors accounted for"),
    (tiny_models.clip, one_too_many, "tensors accounted for"),
    (tiny_models.llava, not_saved, "save = load"),
    (tiny_models.llava, tensor_aside, "save = load"),
    (tiny_models.llava, looks_ahead, "nothing looks ahead"),
    (tiny_models.lm, looks_ahead, "nothing looks ahead"),
    (tiny_models.llava, shifted_labels, "loss = logits"),
    (tiny_models.flamingo, mean_for_sum, "loss = logits"),
    (tiny_models.blip2, mean_for_sum, "loss = logits"),
    (tiny_models.lm, score_of_rows, "loss = logits"),
    (tiny_models.llava, another_activation, "export = transformers"),
]


@pytest.mark.parametrize(
    ("make", "breaks", "row"), SABOTAGE, ids=[b.__name__ + " " + m.__name__ for m, b, _ in SABOTAGE]
)
def test_a_broken_model_fails_in_its_row(make: Any, breaks: Any, row: str) -> None:
    model = make()
    assert verdicts(model, row) == {row: "pass"}
    breaks(model)
    (found,) = verify(model, only=[row])
    assert found.verdict == "FAIL", found
    if found.difference is not None and row not in ("frozen parts untouched", "picture matters"):
        assert not found.difference <= (found.tolerance or 0.0)


def test_half_precision_has_its_own_tolerance() -> None:
    model = tiny_models.llava()
    model.net.to(torch.bfloat16)
    rows = verify(model, only=["batch = single", "save = load", "cached = uncached"])
    assert [row.verdict for row in rows] == ["pass"] * 3, rows
    assert rows[0].tolerance is not None
    assert rows[0].tolerance > 1e-2


def test_a_name_that_is_no_contract() -> None:
    with pytest.raises(ConfigError, match="did you mean 'save = load'"):
        verify(tiny_models.clip(), only=["save = lode"])


def test_the_command_prints_a_table_and_fails_by_its_exit_code(tmp_path: Any) -> None:
    sound, shut = tiny_models.llava(), tiny_models.flamingo()
    closed_gates(shut)
    sound.save(tmp_path / "sound")
    shut.save(tmp_path / "shut")
    run = CliRunner()
    good = run.invoke(app, ["verify", str(tmp_path / "sound"), "--json", str(tmp_path / "facts.json")])
    assert good.exit_code == 0, good.output
    assert "All hold." in good.output
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [row["name"] for row in facts["contracts"]] == list(CONTRACTS)
    bad = run.invoke(app, ["verify", str(tmp_path / "shut"), "--only", "picture matters"])
    assert bad.exit_code == 1
    assert "FAIL" in bad.output


def test_convert_from_the_command_line(tmp_path: Any) -> None:
    tiny_models.llava().save(tmp_path / "ours")
    run = CliRunner()
    words = ["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", "--shard-size", "100KB"]
    done = run.invoke(app, [*words, "--json", str(tmp_path / "facts.json")])
    assert done.exit_code == 0, done.output
    assert "model-00001-of-" in (tmp_path / "facts.json").read_text()
    again = run.invoke(app, words)
    assert "--replace" in str(again.exception)
    assert run.invoke(app, [*words, "--replace"]).exit_code == 0
    assert "is no size" in str(run.invoke(app, [*words[:-1], "big"]).exception)
