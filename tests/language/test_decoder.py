"""The decoding loop: token by token the library's, whoever joins and leaves; and what it tells of its choices."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as library

from isthmus.errors import CapabilityError, ConfigError, DataError, IsthmusWarning
from isthmus.language import Decoder, Decoding, LanguageModel, Prompt, Seq2SeqLM
from tests.language.test_causal import CONFIGS, LLAMA_LIKE, V, stream
from tests.models.tiny_blip2 import T5, redraw

FAMILIES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {
        **LLAMA_LIKE,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": LLAMA_LIKE,
    "mpt": {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "bloom": {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
}
"""Rotary, learned and alibi positions; masks of one kind, of two, and made by the library itself."""

LENGTHS = [11, 4, 7]


def build(name: str) -> LanguageModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return redraw(LanguageModel.build({"model_type": name, **FAMILIES[name], **ids})).eval()


def theirs(lm: LanguageModel, row: torch.Tensor, decoding: Decoding) -> list[int]:
    """What the library's own loop writes behind one row (T, D), its processors handed over as its users do."""
    steps = LogitsProcessorList()
    if decoding.min_new_tokens:
        steps.append(library.MinNewTokensLengthLogitsProcessor(0, decoding.min_new_tokens, list(decoding.stop_ids)))
    if decoding.repetition_penalty != 1:
        steps.append(library.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram:
        steps.append(library.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        suppress_tokens=list(decoding.forbidden_ids) or None,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=0,
    )
    found = lm.lm.generate(
        inputs_embeds=row[None],
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        generation_config=settings,
        logits_processor=steps,
    )[0].tolist()
    stops = [n for n, token in enumerate(found) if token in decoding.stop_ids]
    return found[: stops[0]] if stops else found


def prompt(lm: Any, lengths: list[int] = LENGTHS, seed: int = 1) -> Prompt:
    tokens = stream(lengths, seed=seed)
    return Prompt(lm.embed(tokens.ids).detach(), tokens.lengths)


def rows_of(given: Prompt) -> list[torch.Tensor]:
    return [given.embeds[n, :length] for n, length in enumerate(given.lengths.tolist())]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_and_beams_equal_the_librarys_loop(name: str) -> None:
    lm = build(name)
    given = prompt(lm)
    free = lm.continued(given, Decoding(max_new_tokens=9))
    stop = (free[0][4], free[1][6])
    for decoding in (
        Decoding(max_new_tokens=9, stop_ids=stop),
        Decoding(max_new_tokens=8, stop_ids=stop, num_beams=3, length_penalty=0.7),
    ):
        assert lm.writable is True
        assert lm.continued(given, decoding) == [theirs(lm, row, decoding) for row in rows_of(given)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.5},
        {"no_repeat_ngram": 2, "min_new_tokens": 4},
        {"forbidden_ids": tuple(range(20, V)), "repetition_penalty": 1.3, "length_penalty": -1.0},
    ],
)
def test_rules_for_tokens_equal_the_librarys(beams: int, options: dict) -> None:
    lm = build("llama")
    given = prompt(lm)
    stop = lm.continued(given, Decoding(max_new_tokens=9, **options))[1][2:4]
    decoding = Decoding(max_new_tokens=9, num_beams=beams, stop_ids=tuple(stop), **options)
    assert lm.continued(given, decoding) == [theirs(lm, row, decoding) for row in rows_of(given)]


def seq2seq() -> Seq2SeqLM:
    return redraw(Seq2SeqLM.build(T5)).eval()


MIXED = (
    Decoding(max_new_tokens=12),
    Decoding(max_new_tokens=5, num_beams=3, length_penalty=0.5),
    Decoding(max_new_tokens=9, temperature=1.5, top_k=20, seed=4),
    Decoding(max_new_tokens=7, repetition_penalty=2.0, no_repeat_ngram=2),
    Decoding(max_new_tokens=8, temperature=0.8, top_p=0.9, seed=9),
    Decoding(max_new_tokens=6, num_beams=2),
    Decoding(max_new_tokens=14),
)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "mpt", "t5"])
def test_rows_that_come_and_go_write_what_they_write_alone(name: str) -> None:
    lm = seq2seq() if name == "t5" else build(name)
    lengths = [5, 3, 17, 6, 2, 9, 30]  # longer ones join later, so that everything must move
    given = [prompt(lm, [n], seed=n) for n in lengths]
    alone = [lm.continued(p, d)[0] for p, d in zip(given, MIXED, strict=True)]
    alone[0] = alone[0][: (stop := 6)]
    ended = Decoding(max_new_tokens=12, stop_ids=(lm.continued(given[0], MIXED[0])[0][stop],))
    if ended.stop_ids[0] in alone[0]:
        alone[0] = alone[0][: alone[0].index(ended.stop_ids[0])]

    decoder = Decoder(lm)
    texts: dict[int, list[int]] = {}
    reasons: dict[int, str | None] = {}
    waiting = list(zip(given, (ended, *MIXED[1:]), strict=True))
    cancelled = []
    for turn in range(60):
        for _ in range(turn % 3):  # none, one, two at a time
            if waiting:
                (number,) = decoder.add(*waiting.pop(0))
                texts[number] = []
        if turn in (2, 5):
            (number,) = decoder.add(prompt(lm, [4], seed=turn), Decoding(max_new_tokens=30))
            cancelled.append(number)
        if turn in (6, 7):
            decoder.remove(cancelled[turn - 6])
        for new in decoder.step():
            if new.row in texts:
                texts[new.row] += new.ids
                reasons[new.row] = new.finish
        if not waiting and not decoder.rows:
            break
    assert list(texts.values()) == alone
    assert [reasons[n] for n in texts] == ["stop", *["length"] * 6]
    assert len(set(texts) | set(cancelled)) == 9  # no number twice


def test_a_batch_with_a_seed_per_row_draws_as_its_rows_do() -> None:
    lm = build("llama")
    given, draw = prompt(lm), {"max_new_tokens": 10, "temperature": 1.4, "top_p": 0.95}
    before = torch.get_rng_state()
    together = lm.continued(given, Decoding(**draw, seed=(5, 6, 7)))
    assert torch.equal(torch.get_rng_state(), before)
    for row, seed, text in zip(rows_of(given), (5, 6, 7), together, strict=True):
        assert lm.continued(Prompt(row[None], torch.tensor([len(row)])), Decoding(**draw, seed=seed)) == [text]


def test_one_tensor_per_layer_serves_a_generation() -> None:
    lm = build("llama")
    decoder = Decoder(lm)
    decoder.add(prompt(lm), Decoding(max_new_tokens=10))
    window = decoder._window
    places = {id(layer.keys): layer.keys.data_ptr() for layer in window.cache.layers}  # type: ignore[union-attr]
    visible = window.visible.data_ptr()
    for _ in range(9):
        decoder.step()
        assert {id(layer.keys): layer.keys.data_ptr() for layer in window.cache.layers} == places  # type: ignore[union-attr]
        window.running = 3
        mask = window.mask()
        assert isinstance(mask, torch.Tensor)
        assert mask.untyped_storage().data_ptr() == visible
    assert window.capacity == (3, 11 + 10)


def test_logprobs_are_the_models_own() -> None:
    lm = build("llama")
    given = prompt(lm, [6])
    decoder = Decoder(lm)
    decoder.add(prompt(lm, [3]), Decoding(max_new_tokens=9))  # a neighbour that asks for nothing
    draw = Decoding(max_new_tokens=4, temperature=1.5, top_k=5, forbidden_ids=(3, 4), seed=1)
    (row,) = decoder.add(given, draw, logprobs=3)
    found = [new for _ in range(4) for new in decoder.step() if new.row == row]
    embeds = given.embeds
    for new in found:
        expected = lm.logits(embeds)[0, -1].log_softmax(-1)
        (one,) = new.logprobs
        assert one.id == new.ids[0]
        assert one.logprob == pytest.approx(expected[one.id].item(), abs=1e-4)
        best = expected.topk(3)
        assert [i for i, _ in one.top] == best.indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        embeds = torch.cat([embeds, lm.embed(torch.tensor([[one.id]]))], dim=1)


def test_half_precision_writes_what_the_library_writes() -> None:
    lm = build("llama")
    lm.lm.to(torch.bfloat16)
    given = prompt(lm)
    decoding = Decoding(max_new_tokens=6)
    assert [t.dtype for t in (given.embeds, lm.read(given).logits)] == [torch.bfloat16] * 2
    assert lm.continued(given, decoding) == [theirs(lm, row, decoding) for row in rows_of(given)]


@pytest.mark.filterwarnings("ignore:.*sequential implementation.*")
def test_an_lm_with_another_state_is_left_to_the_librarys_loop_aloud() -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    lm = LanguageModel.build({"model_type": "mamba", **fields, "bos_token_id": 1, "eos_token_id": 2}).eval()
    given = prompt(lm, [5])
    with pytest.warns(IsthmusWarning, match=r"MambaForCausalLM keeps more than keys and values .* library's own loop"):
        found = lm.continued(given, Decoding(max_new_tokens=5))
    assert found == [theirs(lm, given.embeds[0], Decoding(max_new_tokens=5))]
    with pytest.raises(CapabilityError, match="MambaForCausalLM keeps more"):
        Decoder(lm)


def test_an_lm_that_goes_on_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("llama")
    whole = lm.next
    monkeypatch.setattr(lm, "next", lambda ids, positions, *rest: whole(ids, positions + 1, *rest))
    assert "goes on otherwise" in str(lm.writable)


def test_what_cannot_be_written_is_named() -> None:
    lm = build("llama")
    decoder = Decoder(lm)
    assert decoder.step() == []
    with pytest.raises(DataError, match=r"row 1 .* empty prompt"):
        decoder.add(Prompt(torch.zeros(2, 3, 32), torch.tensor([3, 0])), Decoding())
    with pytest.raises(ConfigError, match="context of 64"):
        decoder.add(prompt(lm, [60]), Decoding(max_new_tokens=5))
    with pytest.raises(ConfigError, match="2 seeds for 3 rows"):
        decoder.add(prompt(lm), Decoding(max_new_tokens=5, temperature=1.0, seed=(1, 2)))
    with pytest.raises(ConfigError, match="logprobs 1 with 2 beams"):
        decoder.add(prompt(lm), Decoding(max_new_tokens=5, num_beams=2), logprobs=1)
    with pytest.raises(DataError, match="row 7 is not being written"):
        decoder.remove(7)
    assert decoder.rows == ()
