"""The Q-Former's three uses and masks; what stays float32; BLIP-2's start from BERT."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from isthmus.batch import Tokens
from isthmus.errors import CheckpointError, ConfigError, DataError
from isthmus.interop.hf_bert import from_bert, read_bert_folder
from isthmus.nn.connectors import Connector
from isthmus.nn.connectors.qformer import QFormer, QFormerConnector, QFormerLayer
from tests.models.tiny_blip2 import DEC, QFORMER, QUERIES, TEXTS, WORDS, redraw, tokens


def connector(text: bool = True, out: int | None = None) -> QFormerConnector:
    return redraw(QFormerConnector(QFORMER, out, text=text))


def features(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 17, 24, generator=torch.Generator().manual_seed(seed))


def written(text: Tokens) -> Tokens:
    ids = text.ids.clone()
    ids[:, 0] = DEC
    return replace(text, ids=ids)


@torch.no_grad()
def test_the_causal_joint_pass_equals_text_on_a_cached_image_pass() -> None:
    net, text = connector(), written(tokens(TEXTS))
    vision = features(len(TEXTS))
    queries = net.queries.expand(len(TEXTS), -1, -1)
    joint = net.qformer(queries, text.ids, vision=vision, text_mask=text.mask, causal=True).hidden
    seen = net.encode_image(vision)
    after = net.qformer(None, text.ids, text_mask=text.mask, past=seen.past).hidden
    torch.testing.assert_close(joint[:, :QUERIES], seen.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(joint[:, QUERIES:][text.mask], after[text.mask], atol=1e-5, rtol=0)
    other = net.qformer(None, text.ids, text_mask=text.mask, past=net.encode_image(features(len(TEXTS), 2)).past).hidden
    assert (other - after)[text.mask].abs().max() > 0.05  # the picture matters to what is written


@torch.no_grad()
@pytest.mark.parametrize("read", [1, QUERIES, QUERIES + 2])
def test_rows_read_alone_are_those_of_the_whole(read: int) -> None:
    net, text = connector(), tokens(TEXTS)
    queries, vision = net.queries.expand(len(TEXTS), -1, -1), features(len(TEXTS))
    whole = net.qformer(queries, text.ids, vision=vision, text_mask=text.mask).hidden
    front = net.qformer(queries, text.ids, vision=vision, text_mask=text.mask, read=read).hidden
    torch.testing.assert_close(front, whole[:, :read], atol=1e-5, rtol=0)
    alone = net.qformer(None, text.ids, text_mask=text.mask).hidden[:, 0]
    torch.testing.assert_close(net.encode_text(text), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_writing_looks_back_only_and_goes_on_token_by_token() -> None:
    net, text = connector(), written(tokens(TEXTS[:1]))
    past = net.encode_image(features(1)).past
    whole = net.qformer(None, text.ids, past=past).hidden
    changed = text.ids.clone()
    changed[0, 4] = 30
    other = net.qformer(None, changed, past=past).hidden
    torch.testing.assert_close(other[:, :4], whole[:, :4], atol=1e-6, rtol=0)
    assert (other[:, 4:] - whole[:, 4:]).abs().min(0).values.max() > 0.01
    for place in range(text.ids.shape[1]):  # positions continue behind what was written
        step = net.qformer(None, text.ids[:, place : place + 1], past=past)
        torch.testing.assert_close(step.hidden[:, 0], whole[:, place], atol=1e-5, rtol=0)
        past = step.past


@torch.no_grad()
def test_matching_sees_both_ways_and_contrast_neither() -> None:
    net, text = connector(), tokens(TEXTS)
    vision = features(len(TEXTS))
    read = net.encode_pair(vision, text)
    other_text = net.encode_pair(vision, tokens(TEXTS[::-1]))
    other_image = net.encode_pair(features(len(TEXTS), 2), text)
    assert (read - other_text).abs().amax((1, 2)).min() > 0.01
    assert (read - other_image).abs().amax((1, 2)).min() > 0.01
    alone = net.qformer(None, text.ids, text_mask=text.mask).hidden
    assert (read - net.encode_image(vision).hidden).abs().max() > 0.01  # the text has changed what the queries found
    padded = Tokens(ids=torch.nn.functional.pad(text.ids, (0, 3), value=9), lengths=text.lengths)
    torch.testing.assert_close(net.encode_pair(vision, padded), read, atol=1e-5, rtol=0)
    again = net.qformer(None, padded.ids, text_mask=padded.mask).hidden[:, : text.ids.shape[1]]
    torch.testing.assert_close(again[text.mask], alone[text.mask], atol=1e-5, rtol=0)


def test_cross_attention_is_in_even_layers_and_queries_have_an_ffn() -> None:
    net = QFormer(QFORMER)
    layers = [layer for layer in net.layers if isinstance(layer, QFormerLayer)]
    assert [layer.cross is not None for layer in layers] == [True, False, True, False]
    cross = layers[0].cross
    assert cross is not None
    assert cross.k_proj.in_features == 24  # the vision width, not the Q-Former's
    assert net.ln.eps == layers[0].ln_attn.eps == layers[0].ffn_query.ln.eps == 1e-12
    text = {n for n, _ in net.named_parameters()} - {n for n, _ in QFormer(QFORMER, text=False).named_parameters()}
    assert {n.split(".")[2] if n.startswith("layers") else n.split(".")[0] for n in text} == {
        "ffn_text",
        "words",
        "positions",
    }


def test_dropout_is_live_in_training_only_and_the_cache_carries_its_draw() -> None:
    net, text = connector(), written(tokens(TEXTS))
    vision = features(len(TEXTS))
    torch.testing.assert_close(net.encode_image(vision).hidden, net.encode_image(vision).hidden)
    net.train()
    torch.manual_seed(0)
    first = net.encode_image(vision)
    second = net.encode_image(vision)
    assert (first.hidden - second.hidden).abs().max() > 0.01
    assert not torch.equal(first.past[1][0], second.past[1][0])
    assert net.qformer(None, text.ids, text_mask=text.mask, past=first.past).hidden.isfinite().all()


@torch.no_grad()
def test_a_connector_of_any_frames_whose_text_is_per_visual() -> None:
    net = connector(out=20)
    assert isinstance(net, Connector)
    given = torch.stack([features(2, 1), features(2, 2)])
    found = net(given)
    assert found.shape == (2, 2 * QUERIES, 20)
    assert net.num_tokens(2, (9, 9)) == 2 * QUERIES
    torch.testing.assert_close(found[1, QUERIES:], net(given[1:, 1:])[0])
    with_text = net(given, text=tokens(TEXTS[:2]))
    torch.testing.assert_close(with_text[1, QUERIES:], net(given[1:, 1:], text=tokens(TEXTS[1:2]))[0])
    assert (with_text - found).abs().max() > 0.01


def test_mistakes_are_named() -> None:
    net = connector(text=False)
    with pytest.raises(ConfigError, match="no text half"):
        net.encode_pair(features(4), tokens(TEXTS))
    with pytest.raises(ConfigError, match="attend to vision"):
        net.qformer(net.queries)
    with pytest.raises(DataError, match="40 positions"):
        connector().qformer(None, torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ConfigError, match="dec_id"):
        replace(QFORMER, dec_id=WORDS)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_no_cast_reaches_the_qformer(cast: str) -> None:
    net = connector(out=20)
    before = {name: p.clone() for name, p in net.named_parameters()}
    whole = torch.nn.ModuleDict({"connector": net, "other": torch.nn.Linear(2, 2)})
    whole.to(torch.float16) if cast == "to" else getattr(whole, cast)()
    assert next(whole["other"].parameters()).dtype != torch.float32
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert net(features(1)[:, None].half()).dtype == torch.float32
    assert net.double().queries.dtype == torch.float64


def bert(layers: int = 4) -> BertForPreTraining:
    config = BertConfig(
        vocab_size=WORDS - 1,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=40,
        type_vocab_size=2,
    )
    return redraw(BertForPreTraining(config))


@torch.no_grad()
def test_the_start_from_bert_reads_as_bert_and_copies_the_text_ffn(tmp_path) -> None:
    peer = bert()
    peer.save_pretrained(tmp_path)
    found = read_bert_folder(tmp_path, layers=4, rows=WORDS)
    net = connector()
    own = {n.removeprefix("connector."): t for n, t in found.items() if n.startswith("connector.")}
    missing, unexpected = net.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(".cross." in n or ".ln_cross." in n or n in ("queries", "norm.weight", "norm.bias") for n in missing)
    for layer in net.qformer.layers:
        assert isinstance(layer, QFormerLayer)
        assert layer.ffn_text is not None
        for name, tensor in layer.ffn_text.state_dict().items():
            assert torch.equal(tensor, layer.ffn_query.state_dict()[name])
    # Without token types the published Q-Former is BERT less that constant; take it out of the peer as well.
    peer.bert.embeddings.token_type_embeddings.weight.zero_()
    text = tokens(TEXTS)
    theirs = peer.bert(text.ids, attention_mask=text.mask.long()).last_hidden_state
    ours = net.qformer(None, text.ids, text_mask=text.mask).hidden
    torch.testing.assert_close(ours[text.mask], theirs[text.mask], atol=1e-4, rtol=0)
    assert found["heads.lm_bias"].shape == (WORDS,)
    assert torch.equal(found["connector.qformer.words.weight"][:-1], peer.bert.embeddings.word_embeddings.weight)


def test_a_bert_that_does_not_fit_is_refused() -> None:
    state = bert().state_dict()
    with pytest.raises(CheckpointError, match="fewer than the 6 layers"):
        from_bert(state, layers=6, rows=WORDS)
    with pytest.raises(CheckpointError, match="they differ"):
        from_bert(state, layers=4, rows=10)
    with pytest.raises(CheckpointError, match="BERT has not"):
        from_bert({**state, "encoder.layer.0.gate": torch.zeros(1)}, layers=4, rows=WORDS)


@torch.no_grad()
def test_patch_weights_are_those_of_the_last_cross_attention() -> None:
    net = redraw(QFormerConnector(replace(QFORMER, heads=1, layers=3), None, text=True)).eval()
    assert isinstance(net, QFormerConnector)
    last = net.qformer.layers[2]
    assert isinstance(last, QFormerLayer)
    assert last.cross is not None
    seen: list[torch.Tensor] = []
    last.cross.out_proj.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    for text in (None, tokens(TEXTS[:2])):
        seen.clear()
        found = net.patch_weights(features(2)[:, None], text)
        assert found.shape == (2, QUERIES, 1, 17)
        torch.testing.assert_close(found.sum((-1, -2)), torch.ones(2, QUERIES))
        net(features(2)[:, None], text=text)
        vision = net.vision_tokens(features(2))
        # With one head the weights times the values are what the layer hands to its last product.
        rows = net.queries.expand(2, -1, -1)
        if text is None:
            whole = net.qformer.patch_weights(rows, vision=vision)
        else:
            whole = net.qformer.patch_weights(rows, text.ids, vision=vision, text_mask=text.mask)
        torch.testing.assert_close(whole @ last.cross.v_proj(vision), seen[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(found[:, :, 0], whole)


@torch.no_grad()
def test_a_token_of_a_clip_is_made_of_its_own_frame() -> None:
    found = connector().patch_weights(torch.stack([features(3), features(3, 2)], dim=1))
    assert found.shape == (3, 2 * QUERIES, 2, 17)
    first, second = found.split(QUERIES, dim=1)
    assert not first[:, :, 1].any()
    assert not second[:, :, 0].any()
