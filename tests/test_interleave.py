"""Gated blocks and new tokens in unmodified LMs of seven families."""

import copy
import itertools

import pytest
import torch
from transformers import PreTrainedModel

from isthmus.errors import ConfigError
from isthmus.interleave import InterleavedLanguageModel, MediaContext
from isthmus.language import Decoder, Decoding, LanguageModel
from isthmus.nn.beam import beam_search
from isthmus.nn.gated import GatedBlock, GatedConfig
from tests.models.tiny_flamingo import END, IMAGE, LANGUAGES, ROWS, V, batch, blocks_of, tiny
from tests.narrow import there

FAMILIES = tuple(LANGUAGES)
ENABLE = next(
    n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(PreTrainedModel, n)
)


def bare(net) -> LanguageModel:
    """The same language model without blocks and new tokens."""
    lm = LanguageModel.build(net.config.language).eval()
    lm.lm.load_state_dict(net.language.lm.state_dict())
    return lm


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_leave_the_lm_bit_equal(family):
    net, rows = tiny(family, gates=(0.0, 0.0), every=1), batch([ROWS["one"], ROWS["two"], ROWS["none"]])
    embeds, lengths = net.embed_prompt(rows), rows.text["lm"].lengths
    with torch.no_grad():
        assert torch.equal(net.logits(rows)[..., :V], bare(net).logits(embeds, lengths))
        for block in blocks_of(net):
            block.attn_gate.fill_(0.3)
        changed = (net.logits(rows)[..., :V] - bare(net).logits(embeds, lengths)).abs().amax(-1)
    assert changed[0, 2:7].min() > 1e-4
    assert changed[1, 0] > 1e-4
    assert not changed[2, :5].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_keys_stay_the_librarys_own(family):
    net = tiny(family)
    keys = list(net.language.lm.state_dict())
    assert keys == list(bare(net).lm.state_dict())
    assert not any("language" in n and "xattn" in n for n in net.state_dict())
    net.language.detach()
    assert keys == list(net.language.lm.state_dict())
    rows = batch([ROWS["one"]])
    torch.testing.assert_close(net.logits(rows)[..., :V], bare(net).logits(net.embed_prompt(rows)))


@pytest.mark.parametrize("family", ["llama", "opt", "mpt", "gpt2"])
@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=5), Decoding(max_new_tokens=4, num_beams=3)])
def test_generation_with_cache_equals_running_the_whole_row_again(family, decoding):
    net, names = tiny(family), ["one", "two", "none"]
    together = net.generate(batch([ROWS[n] for n in names]), decoding)
    assert together == [net.generate(batch([ROWS[n]]), decoding)[0] for n in names]
    swapped = batch([["z", *ROWS["two"][1:4], "y", *ROWS["two"][5:]]])
    assert (net.logits(swapped) - net.logits(batch([ROWS["two"]]))).abs().max() > 0.05
    for name, answer in zip(names, together, strict=True):

        def whole(written, row=ROWS[name]):
            """The next token's log-probabilities, every beam's row run from its first token on."""
            with torch.no_grad():
                rows = batch([[*row, *beam] for beam in written[:, 1:].tolist()])
                return net.logits(rows)[:, -1].log_softmax(-1)

        searched = beam_search(
            whole,
            torch.tensor([0]),  # a start that `whole` leaves out
            beams=decoding.num_beams,
            max_new=decoding.max_new_tokens,
            stop_ids=[END],
            forbidden_ids=[IMAGE],
        )
        assert searched == [answer]


def test_sampling_is_seeded_and_row_by_row():
    net, rows = tiny(), [ROWS["one"], ROWS["two"]]
    decoding = Decoding(max_new_tokens=8, temperature=1.5, seed=(1, 2))
    assert net.generate(batch(rows), decoding) == net.generate(batch(rows), decoding)
    alone = net.generate(batch(rows[1:]), Decoding(max_new_tokens=8, temperature=1.5, seed=2))
    assert net.generate(batch(rows), decoding)[1] == alone[0]


@torch.no_grad()
def test_end_of_chunk_ends_an_answer_and_image_is_never_generated():
    net = tiny()
    rows = batch([ROWS["one"], ROWS["none"]])
    with net.language.attending_to(net.media_context(rows)):
        hidden = net.language.hidden(net.embed_prompt(rows))
    last, other = hidden[0, 6], hidden[1, 4]
    end, image = there(net.language.new_rows.output)
    end.zero_()
    image.copy_(9 * last)
    assert net.logits(rows)[0, 6].argmax() == IMAGE
    for decoding in (Decoding(max_new_tokens=5), Decoding(max_new_tokens=5, num_beams=2)):
        assert all(IMAGE not in answer and len(answer) == 5 for answer in net.generate(rows, decoding))
    end.copy_(9 * (last - other * (last @ other) / (other @ other)))
    first, second = net.generate(rows, Decoding(max_new_tokens=5))  # an ended row goes on beside an open one
    assert first == []
    assert second
    assert END not in second


def test_keys_and_values_of_the_media_are_made_once_per_generation():
    net, calls = tiny(), []
    for block in blocks_of(net):
        block.attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    net.vision.register_forward_hook(lambda *_: calls.append("vision"))
    net.generate(batch([ROWS["one"]]), Decoding(max_new_tokens=8))
    assert calls == ["vision", 1, 1]
    calls.clear()
    net.generate(batch([ROWS["one"]]), Decoding(max_new_tokens=8, num_beams=2))
    assert calls == ["vision", 1, 1]


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_rows_that_join_later_write_what_they_write_alone(family):
    net = tiny(family)
    rows, decoding = {name: batch([ROWS[name]]) for name in ("none", "two", "one", "clip")}, Decoding(max_new_tokens=5)
    alone = {name: net.generate(row, decoding)[0] for name, row in rows.items()}
    decoder, texts, names = Decoder(net.language), {}, {}
    waiting = list(rows)
    while waiting or decoder.rows:
        if waiting:
            name = waiting.pop(0)
            (number,) = decoder.add(net.prompt(rows[name]), decoding)
            names[number], texts[name] = name, []
        for new in decoder.step():
            texts[names[new.row]] += new.ids
    assert texts == alone


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "mpt"])
@torch.no_grad()
def test_a_conversation_in_chunks_equals_one_pass(family):
    net = tiny(family)
    whole = batch([ROWS["two"]])
    expected, embeds, context = net.logits(whole), net.embed_prompt(whole), net.media_context(whole)
    for cuts in ((4,), (1, 4, 5)):
        bounds, cache, found = [0, *cuts, embeds.shape[1]], None, []
        for a, b in itertools.pairwise(bounds):
            images = int(context.media_index[0, :b].max())
            with net.language.attending_to(
                MediaContext(media=context.media[:, : max(images, 1)], media_index=context.media_index[:, :b])
            ):
                logits, cache = net.language.chunk(embeds[:, a:b], cache)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_without_media_raises_and_stale_media_do_too(gradients):
    net = tiny()
    with torch.set_grad_enabled(gradients):
        loss = net.loss(batch([ROWS["one"]]))["lm"].mean
    if gradients:
        loss.backward()
    with pytest.raises(ConfigError, match="run without media"):
        net.language.lm(torch.tensor([[1, 2, 3]]))
    with net.language.blind():
        net.language.lm(torch.tensor([[1, 2, 3]]))
    context = net.media_context(batch([ROWS["one"], ROWS["two"]]))
    with net.language.attending_to(context), pytest.raises(ConfigError, match=r"runs 3 rows, the media .* of 2"):
        net.language.hidden(torch.zeros(3, 4, 32))


@pytest.mark.parametrize("family", ["llama", "opt", "mpt"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    net, rows = tiny(family), batch([ROWS["one"], ROWS["two"]])

    def gradients():
        net.zero_grad()
        net.loss(rows)["lm"].mean.backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    plain = gradients()
    net.language.lm.train()
    getattr(net.language.lm, ENABLE)()
    runs = []
    net.xattn[0].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients()
    assert len(runs) == 2
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_have_rows_of_their_own(tied):
    net = tiny(lm={"tie_word_embeddings": tied})
    language = net.language
    assert (language.new_rows.output is None) == tied
    ids = torch.tensor([[3, END, IMAGE, 5]])
    embeds = language.embed(ids)
    assert torch.equal(embeds[0, 1:3], language.new_rows.input)
    assert torch.equal(embeds[:, [0, 3]], language.lm.get_input_embeddings()(ids[:, [0, 3]]))
    with language.blind(), torch.no_grad():
        logits, hidden = language.logits(embeds), language.hidden(embeds)
    rows = language.new_rows.input if tied else there(language.new_rows.output)
    torch.testing.assert_close(logits[..., V:], hidden @ rows.T)
    assert language.vocab_size == logits.shape[-1] == V + 2


def test_new_tokens_within_a_padded_table():
    torch.manual_seed(0)
    lm = LanguageModel.build({"model_type": "llama", **LANGUAGES["llama"]}).lm
    language = InterleavedLanguageModel(lm, (50, 51)).eval()
    assert language.vocab_size == V
    embeds = language.embed(torch.tensor([[50, 51, 52]]))
    assert torch.equal(embeds[0, :2], language.new_rows.input)
    hidden, logits = language.hidden(embeds), language.logits(embeds)
    torch.testing.assert_close(logits[..., 50:52], hidden @ there(language.new_rows.output).T)
    torch.testing.assert_close(logits[..., 52], hidden @ lm.lm_head.weight[52])
    for ids in ((53, 53), (53, 55)):
        with pytest.raises(ConfigError, match="without a gap"):
            InterleavedLanguageModel(lm, ids)


@pytest.mark.parametrize("rows", [V, V + 2])
def test_new_rows_have_the_heads_bias(rows):
    """An LM whose head has a bias (GPT-J): as the library's own table, enlarged by its mean, or padded at once."""
    config = {"vocab_size": rows, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 8}
    torch.manual_seed(0)
    lm = LanguageModel.build({"model_type": "gptj", **config}).lm.eval()
    torch.nn.init.normal_(lm.lm_head.bias, 3.0, 1.0)
    peer = copy.deepcopy(lm)
    peer.resize_token_embeddings(V + 2, mean_resizing=True)
    language = InterleavedLanguageModel(lm, (END, IMAGE)).eval()
    with torch.no_grad():
        language.new_rows.input.copy_(peer.get_input_embeddings().weight[-2:])
        there(language.new_rows.output).copy_(peer.lm_head.weight[-2:])
        ids = torch.tensor([[3, END, 7, IMAGE, 5]])
        expected = peer(input_ids=ids).logits
        torch.testing.assert_close(language.logits(language.embed(ids)), expected, atol=1e-5, rtol=0)
    assert expected[..., -2:].mean() > 2


def test_a_copied_net_has_hooks_of_its_own():
    net, rows = tiny(), batch([ROWS["one"]])
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for block in blocks_of(twin):
            block.attn_gate.zero_()
            block.mlp_gate.zero_()
        assert (twin.logits(rows) - net.logits(rows)).abs().max() > 0.1
        torch.testing.assert_close(twin.logits(rows)[..., :V], bare(net).logits(net.embed_prompt(rows)))


def test_an_lm_without_a_list_of_decoder_layers_is_explained():
    config = {"vocab_size": V, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    language = InterleavedLanguageModel.build({"model_type": "xlm", **config})
    with pytest.raises(ConfigError, match=r"has \d module lists of its 2 hidden layers.*take another language model"):
        language.insert({0: GatedBlock(32, 24, GatedConfig())})
    llama = InterleavedLanguageModel.build({"model_type": "llama", **LANGUAGES["llama"]})
    with pytest.raises(ConfigError, match="before layer 9: the LM has 4"):
        llama.insert({9: GatedBlock(32, 24, GatedConfig())})
