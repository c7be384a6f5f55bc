"""The edge to encoder-decoders: loss, score, generation, tied and untied heads, folders, dtype."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from isthmus.errors import ConfigError, DataError
from isthmus.interop.hf_language import read_seq2seq_folder
from isthmus.language import Decoding, LanguageModel, Seq2SeqLM, build_language, safe_dtype
from tests.models.tiny_blip2 import OPT, T5, V, redraw, tokens

SOURCES = [[5, 6, 7, 8, 1], [9, 1], [10, 11, 1]]
TARGETS = [[0, 20, 21, 1], [0, 22, 1], [0, 23, 24, 25, 26, 1]]


def tiny(**changes) -> Seq2SeqLM:
    return redraw(Seq2SeqLM.build({**T5, **changes}))


def test_loss_and_score_equal_the_librarys_own_on_ragged_rows() -> None:
    net, source, target = tiny(), tokens(SOURCES), tokens(TARGETS, 1)
    embeds = net.embed(source.ids)
    total, count = net.loss(embeds, source.lengths, target)
    scores = net.score(embeds, source.lengths, target)
    expected = []
    for ids, answer in zip(SOURCES, TARGETS, strict=True):
        logits = net.lm(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([answer[:-1]])).logits[0]
        expected.append(logits.log_softmax(-1)[torch.arange(len(answer) - 1), torch.tensor(answer[1:])].sum())
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, -torch.stack(expected).sum(), atol=1e-4, rtol=1e-4)
    assert count == sum(len(t) - 1 for t in TARGETS)


def test_generation_equals_the_librarys_and_a_row_alone() -> None:
    net, source = tiny(), tokens(SOURCES)
    embeds = net.embed(source.ids)
    for beams in (1, 3):
        ours = net.generate(embeds, source.lengths, Decoding(max_new_tokens=6, num_beams=beams, stop_ids=(1,)))
        theirs = net.lm.generate(
            input_ids=source.ids,
            attention_mask=source.mask.long(),
            max_new_tokens=6,
            num_beams=beams,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
            decoder_start_token_id=0,
        ).tolist()
        assert ours == [row[1 : row.index(1)] if 1 in row else row[1:7] for row in theirs]
        for row in range(3):
            alone = net.generate(
                embeds[row : row + 1, : int(source.lengths[row])],
                source.lengths[row : row + 1],
                Decoding(max_new_tokens=6, num_beams=beams, stop_ids=(1,)),
            )
            assert alone == [ours[row]]
    stop = ours[0][0]
    late = net.generate(embeds, source.lengths, Decoding(max_new_tokens=6, min_new_tokens=3, stop_ids=(stop,)))
    assert all(len(text) >= 3 for text in late)
    assert len(net.generate(embeds, source.lengths, Decoding(max_new_tokens=6, stop_ids=(ours[2][2],)))[2]) <= 2


def test_the_head_is_tied_only_where_the_configuration_says_so() -> None:
    tied = {k: v for k, v in T5.items() if k != "tie_word_embeddings"}
    one, two = Seq2SeqLM.build(tied), tiny()
    assert one.lm.lm_head.weight is one.lm.shared.weight
    assert two.lm.lm_head.weight is not two.lm.shared.weight
    assert (one.lm.config.scale_decoder_outputs, two.lm.config.scale_decoder_outputs) == (True, False)
    assert two.lm.config.dense_act_fn == "gelu"
    assert (one.start_id, one.context, one.width, one.vocab_size) == (0, None, 32, V)


@pytest.mark.parametrize("tied", [True, False])
def test_folders_are_read_strictly(tied: bool, tmp_path) -> None:
    config = T5Config(**{k: v for k, v in T5.items() if k not in ("model_type", "tie_word_embeddings")})
    if not tied:
        config.scale_decoder_outputs = False
    peer = redraw(T5ForConditionalGeneration(config))
    if not tied:
        peer.lm_head.weight = torch.nn.Parameter(peer.lm_head.weight.detach() + 0.1)
    peer.save_pretrained(tmp_path)
    read, state = read_seq2seq_folder(tmp_path)
    net = Seq2SeqLM.build(read)
    net.lm.load_state_dict(state)
    source, target = tokens(SOURCES[:1]), tokens(TARGETS[:1], 1)
    theirs = peer(input_ids=source.ids, decoder_input_ids=target.ids).logits
    torch.testing.assert_close(net.eval().logits(net.embed(source.ids), source.lengths, target), theirs)
    assert (net.lm.lm_head.weight is net.lm.shared.weight) == tied


def test_what_does_not_fit_is_named() -> None:
    assert isinstance(build_language(OPT), LanguageModel)
    assert isinstance(build_language(T5), Seq2SeqLM)
    with pytest.raises(ConfigError, match="did you mean 'd_model'"):
        Seq2SeqLM.build({**T5, "d_modle": 3})
    net, source = tiny(), tokens(SOURCES)
    with pytest.raises(DataError, match="vocabulary of 61"):
        net.embed(torch.tensor([[V]]))
    with pytest.raises(DataError, match="no labels"):
        net.loss(net.embed(source.ids), source.lengths, tokens(TARGETS))
    with pytest.raises(DataError, match="empty prompt"):
        net.generate(net.embed(source.ids), torch.tensor([0, 1, 2]), Decoding(max_new_tokens=2))
    assert safe_dtype(T5, torch.float16) == torch.bfloat16
    assert safe_dtype(OPT, torch.float16) == torch.float16
