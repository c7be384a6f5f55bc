"""The language adapter over tiny random LMs of seven families."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import ConfigError, DataError
from isthmus.language import Decoding, LanguageModel, known_fields
from isthmus.language import causal as module

V = 53
LLAMA_LIKE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 6},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "opt": {
        "vocab_size": V,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
    "gpt_neox": {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
CAPPED = {
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {**LLAMA_LIKE, "logit_scale": 0.3},
    "granite": {**LLAMA_LIKE, "logits_scaling": 4.0},
}


def build(name: str) -> LanguageModel:
    """A tiny LM whose weights are large enough that every part of it matters."""
    torch.manual_seed(0)
    lm = LanguageModel.build({"model_type": name, **(CONFIGS | CAPPED)[name]}).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return lm


def stream(lengths: list[int], *, seed: int = 1, labelled: float = 0.5) -> Tokens:
    """Right-padded random rows with about half of their tokens labelled."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, V, shape, generator=g)
    real = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    keep = real & (torch.rand(shape, generator=g) < labelled)
    return Tokens(ids=ids.where(real, 0), lengths=torch.tensor(lengths), labels=ids.where(keep, IGNORE))


every_family = pytest.mark.parametrize("name", CONFIGS)


@every_family
def test_build_gives_fp32_the_library_keys_and_the_sizes(name: str) -> None:
    lm = build(name)
    twin = AutoModelForCausalLM.from_config(lm.lm.config)
    assert {k.removeprefix("lm.") for k in lm.state_dict()} == set(twin.state_dict())
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert (lm.vocab_size, lm.width, lm.context) == (V, 16 if name == "opt" else 32, 64)
    assert LanguageModel.build(lm.config).config == lm.config


@every_family
def test_loss_and_its_gradient_equal_the_library_on_one_row(name: str) -> None:
    lm, tokens = build(name), stream([13])
    assert tokens.labels is not None
    total, count = lm.loss(lm.embed(tokens.ids), tokens)
    total.div(count).backward()
    ours = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    theirs = lm.lm(input_ids=tokens.ids, labels=tokens.labels)
    theirs.loss.backward()
    assert total.item() / count == pytest.approx(theirs.loss.item(), abs=1e-5)
    for n, p in lm.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, atol=1e-5, rtol=1e-4)


@every_family
def test_attention_stays_in_float32_under_autocast_on_a_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lm, tokens = build(name), stream([13, 7])
    exact, _ = lm.loss(lm.embed(tokens.ids), tokens)
    seen: set[tuple[torch.dtype, bool]] = set()
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        # Autocast casts within the kernel, so that full tensors are not enough: rotary positions make those of halves.
        seen.add((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = lm.loss(lm.embed(tokens.ids), tokens)
    assert seen == {(torch.float32, False)}
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


@every_family
def test_no_value_depends_on_padding_or_neighbours(name: str) -> None:
    lm, lengths = build(name), [13, 5, 9]
    tokens = stream(lengths)
    assert tokens.labels is not None
    embeds = lm.embed(tokens.ids)
    masked = lm.logits(embeds, tokens.lengths)
    scores, (total, count) = lm.score(embeds, tokens), lm.loss(embeds, tokens)
    alone = []
    for i, n in enumerate(lengths):
        row = tokens.rows(torch.tensor([i]))
        torch.testing.assert_close(lm.logits(embeds)[i, :n], masked[i, :n], atol=1e-5, rtol=1e-5)
        alone.append(lm.loss(lm.embed(row.ids), row))
        assert scores[i].item() == pytest.approx(-alone[-1][0].item(), abs=1e-4)
    assert total.item() == pytest.approx(sum(a[0].item() for a in alone), abs=1e-4)
    assert count == sum(a[1] for a in alone) == int((tokens.labels[:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("name", CAPPED)
def test_heads_that_cap_or_scale_are_noticed(name: str) -> None:
    lm, tokens = build(name), stream([12])
    before = torch.get_rng_state()
    total, count = lm.loss(lm.embed(tokens.ids), tokens)
    assert lm._plain_head is False
    assert torch.equal(torch.get_rng_state(), before)
    theirs = lm.lm(input_ids=tokens.ids, labels=tokens.labels).loss.item()
    assert total.item() / count == pytest.approx(theirs, abs=1e-5)


@every_family
def test_plain_heads_are_recognised_also_while_dropout_is_on(name: str) -> None:
    dropout = {"opt": {"dropout": 0.5}, "gpt2": {"resid_pdrop": 0.5}}.get(name, {"attention_dropout": 0.5})
    lm = LanguageModel.build({"model_type": name, **CONFIGS[name], **dropout}).train()
    before = torch.get_rng_state()
    assert lm._has_plain_head(torch.zeros(1, 1, lm.width))
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_exist_only_where_a_label_is_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tokens = build("llama"), stream([40, 31])
    whole, count = lm.loss(lm.embed(tokens.ids), tokens)
    whole.backward()
    expected = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    seen: list[int] = []
    lm.lm.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.numel()))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * V)
    chunked, same = lm.loss(lm.embed(tokens.ids), tokens)
    assert (max(seen), sum(seen), same) == (5 * V, count * V, count)
    chunked.backward()
    assert (max(seen), sum(seen)) == (5 * V, 2 * count * V)  # made again in the backward pass, not kept
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for n, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-4)


def test_no_label_is_a_zero_that_reaches_every_parameter() -> None:
    lm, tokens = build("llama"), stream([6], labelled=0.0)
    total, count = lm.loss(lm.embed(tokens.ids), tokens)
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in lm.parameters())


def uncached_greedy(lm: LanguageModel, ids: torch.Tensor, new: int, stop: tuple[int, ...] = ()) -> list[int]:
    embeds, found = lm.embed(ids)[None], []
    for _ in range(new):
        token = int(lm.logits(embeds)[0, -1].argmax())
        if token in stop:
            break
        found.append(token)
        embeds = torch.cat([embeds, lm.embed(torch.tensor([[token]]))], dim=1)
    return found


@every_family
def test_greedy_batch_equals_single_equals_uncached(name: str) -> None:
    lm, lengths = build(name), [11, 4, 7]
    tokens = stream(lengths)
    rows = [tokens.ids[i, :n] for i, n in enumerate(lengths)]
    with torch.no_grad():
        expected = [uncached_greedy(lm, row, 10) for row in rows]
        stop = (expected[0][4], expected[1][6])
        stopped = [uncached_greedy(lm, row, 10, stop) for row in rows]
    free, ending = Decoding(max_new_tokens=10), Decoding(max_new_tokens=10, stop_ids=stop)
    assert lm.generate(lm.embed(tokens.ids), tokens.lengths, free) == expected
    assert lm.generate(lm.embed(tokens.ids), tokens.lengths, ending) == stopped
    for row, answer in zip(rows, expected, strict=True):
        assert lm.generate(lm.embed(row)[None], torch.tensor([len(row)]), free) == [answer]


def test_beam_equals_the_library_and_rows_alone() -> None:
    lm, lengths = build("llama"), [9, 5]
    tokens = stream(lengths)
    beam = Decoding(max_new_tokens=8, num_beams=3, length_penalty=0.7, stop_ids=(7, 8))
    together = lm.generate(lm.embed(tokens.ids), tokens.lengths, beam)
    for i, n in enumerate(lengths):
        ids = tokens.ids[i : i + 1, :n]
        assert lm.generate(lm.embed(ids), torch.tensor([n]), beam) == [together[i]]
        theirs = lm.lm.generate(
            ids, max_new_tokens=8, num_beams=3, length_penalty=0.7, eos_token_id=[7, 8], pad_token_id=0, do_sample=False
        )[0, n:].tolist()
        assert together[i] == [t for t in theirs if t not in (7, 8, 0)]


def test_drawing_is_seeded_local_and_blind_to_neighbours() -> None:
    lm, tokens = build("llama"), stream([9, 5])
    embeds = lm.embed(tokens.ids)
    draw = Decoding(max_new_tokens=12, temperature=1.3, top_p=0.95, top_k=40, seed=3)
    before = torch.get_rng_state()
    first = lm.generate(embeds, tokens.lengths, draw)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert lm.generate(embeds, tokens.lengths, draw) == first
    assert lm.generate(embeds[1:, :5], tokens.lengths[1:], draw) == first[1:]
    other = Decoding(max_new_tokens=12, temperature=1.3, seed=(3, 4))
    assert lm.generate(embeds, tokens.lengths, other) != first
    with pytest.raises(ConfigError, match="2 seeds for 1 rows"):
        lm.generate(embeds[:1], tokens.lengths[:1], other)


def test_draws_follow_the_distribution() -> None:
    lm, ids = build("llama"), stream([6]).ids
    n = 2000
    embeds = lm.embed(ids).expand(n, -1, -1)
    draw = Decoding(max_new_tokens=1, temperature=2.0, seed=tuple(range(n)))
    found = torch.tensor(lm.generate(embeds, torch.full((n,), 6), draw)).flatten()
    expected = (lm.logits(lm.embed(ids))[0, -1] / 2).softmax(0)
    assert (found.bincount(minlength=V) / n - expected).abs().max() < 0.04


def test_forbidden_and_repeated_tokens_are_kept_out() -> None:
    lm, tokens = build("llama"), stream([9, 5])
    embeds = lm.embed(tokens.ids)
    free = lm.generate(embeds, tokens.lengths, Decoding(max_new_tokens=10))
    barred = tuple(sorted({t for row in free for t in row}))
    kept = lm.generate(embeds, tokens.lengths, Decoding(max_new_tokens=10, forbidden_ids=barred))
    assert all(len(row) == 10 and not set(row) & set(barred) for row in kept)
    unique = lm.generate(embeds, tokens.lengths, Decoding(max_new_tokens=10, no_repeat_ngram=1))
    assert all(len(set(row)) == 10 for row in unique)
    penalised = Decoding(max_new_tokens=10, repetition_penalty=3.0)
    together = lm.generate(embeds, tokens.lengths, penalised)
    assert together != free
    assert lm.generate(embeds[1:, :5], tokens.lengths[1:], penalised) == together[1:]


def test_errors_name_what_is_wrong() -> None:
    lm = build("llama")
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        LanguageModel.build({"model_type": "lama"})
    with pytest.raises(ConfigError, match=r"hiden_size.*did you mean 'hidden_size'"):
        LanguageModel.build({"model_type": "llama", "hiden_size": 3})
    with pytest.raises(ConfigError, match="transformers refuses"):
        LanguageModel.build({"model_type": "llama", "hidden_size": "wide"})
    with pytest.raises(ConfigError, match="context of 64"):
        lm.generate(torch.zeros(1, 60, 32), torch.tensor([60]), Decoding(max_new_tokens=5))
    with pytest.raises(ConfigError, match="context of 64"):
        lm.logits(torch.zeros(1, 65, 32))
    with pytest.raises(DataError, match="token id 53"):
        lm.embed(torch.tensor([[53]]))
    with pytest.raises(DataError, match=r"row 1 .* empty prompt"):
        lm.generate(torch.zeros(2, 3, 32), torch.tensor([3, 0]), Decoding())
    with pytest.raises(DataError, match="no labels"):
        lm.loss(torch.zeros(1, 2, 32), Tokens(ids=torch.zeros(1, 2).long(), lengths=torch.tensor([2])))
    with pytest.raises(ConfigError, match="top_p is 0"):
        Decoding(top_p=0)
    with pytest.raises(ConfigError, match="beam search does not draw"):
        Decoding(num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match=r"\[99\]"):
        lm.generate(torch.zeros(1, 3, 32), torch.tensor([3]), Decoding(max_new_tokens=5, stop_ids=(99,)))


def test_a_configuration_costs_the_import_of_its_own_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(*_: Any) -> None:
        raise AssertionError("walking the library's configurations imports every one of them")

    for name in ("items", "values", "__iter__"):
        monkeypatch.setattr(type(CONFIG_MAPPING), name, all_of_them)
    assert LanguageModel.build({"model_type": "llama", **LLAMA_LIKE}).config["model_type"] == "llama"
    with pytest.raises(ConfigError, match="did you mean 'qwen2'"):
        LanguageModel.build({"model_type": "qwen2q"})


def test_decoding_from_options_names_the_nearest_field() -> None:
    assert Decoding.of({"num_beams": 3}) == Decoding(num_beams=3)
    with pytest.raises(ConfigError, match="no field 'beams'; did you mean 'num_beams'"):
        Decoding.of({"beams": 3})


UNDECLARED = {
    "gemma3_text": {"sliding_window_pattern": 2, "rope_local_base_freq": 500.0, "sliding_window": 4, "head_dim": 8},
    "cohere2": {"sliding_window_pattern": 2, "sliding_window": 4, "head_dim": 8},
    "qwen2": {"head_dim": 16},
    "bloom": {"n_embed": 16, "n_head": 2, "n_layer": 2, "vocab_size": V, "hidden_size": None},
    "falcon": {"n_embed": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": V, "hidden_size": None},
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_a_field_that_is_read_and_not_declared_counts_as_in_the_library(name: str) -> None:
    """Published files have them; without them another model would be built, or none."""
    fields = {**({} if name in ("bloom", "falcon") else LLAMA_LIKE), **UNDECLARED[name]}
    written = {key: value for key, value in fields.items() if value is not None}
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name].from_dict(written)).eval()
    ours = LanguageModel.build(known_fields({"model_type": name, "torch_dtype": "float32", **written})).eval()
    ours.lm.load_state_dict(theirs.state_dict())
    ids = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.embed(ids)), theirs(input_ids=ids).logits)
    assert LanguageModel.build(ours.config).config == ours.config
