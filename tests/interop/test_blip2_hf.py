"""BLIP-2 and InstructBLIP against transformers' classes, all weights redrawn (trap 16)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from safetensors.torch import load_file
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from isthmus.batch import Batch
from isthmus.checkpoint import write_folder
from isthmus.data.blip2 import PromptProcessor, newline_id
from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.hf_blip2 import from_hf, read_blip2_folder, to_hf
from isthmus.interop.hf_blip2_config import config_from_hf, config_to_hf
from isthmus.interop.hf_towers import vision_from_hf
from isthmus.language import Decoding, LanguageModel, Seq2SeqLM
from isthmus.load_report import Account
from isthmus.model import Model
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.opening import load
from isthmus.weights import load_into, state_tensors
from tests.interop import tiny_models
from tests.models.tiny_blip2 import (
    CLS,
    LLAMA,
    OPT,
    QUERIES,
    SEP,
    SIZE,
    T5,
    TEXTS,
    V,
    generation_peer,
    pairs,
    peer_config,
    prompts,
    redraw,
    retrieval_peer,
    tokens,
)
from tests.narrow import must_be, there

ROWS = [[2, 5, 6, 7, 8, 9], [2, 10, 11], [2, 12, 13, 14]]
QUESTIONS = [[CLS, 7, 8, SEP], [CLS, 9, SEP], [CLS, 10, 11, 12, 13, SEP]]


def pixels(batch: Batch) -> torch.Tensor:
    found = batch.visuals[0].pixels
    assert found is not None
    return found[:, 0]


@torch.no_grad()
def test_matching_and_both_embeddings_equal_the_retrieval_model() -> None:
    peer, net = retrieval_peer()
    batch = pairs()
    text = batch.text["qformer"]
    given = {"pixel_values": pixels(batch), "input_ids": text.ids, "attention_mask": text.mask.long()}
    matched = peer(**given, use_image_text_matching_head=True).logits_per_image
    ours = net.match_logits(net.normed(pixels(batch)), text)
    torch.testing.assert_close(ours, matched, atol=1e-5, rtol=0)
    assert (matched[0] - matched[1]).abs().max() > 0.02
    compared = peer(**given, use_image_text_matching_head=False)
    images = F.normalize(net.embed_images(pixels(batch)), dim=-1)
    texts = F.normalize(net.embed_texts(text), dim=-1)
    torch.testing.assert_close(images, compared.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, compared.text_embeds, atol=1e-5, rtol=0)
    similarity = (images @ texts.T).amax(1)
    torch.testing.assert_close(similarity, compared.logits_per_image, atol=1e-5, rtol=0)
    assert (similarity - similarity.mean(0)).abs().max() > 1e-3  # the picture matters


@torch.no_grad()
def test_the_encoder_equals_the_peers_before_its_norm() -> None:
    peer, net = retrieval_peer()
    batch = pairs()
    theirs = peer.vision_model(pixels(batch), output_hidden_states=True).last_hidden_state
    torch.testing.assert_close(net.normed(pixels(batch)), theirs, atol=1e-5, rtol=0)
    raw = net.visual_features(pixels(batch)[:, None])[:, 0]
    torch.testing.assert_close(peer.vision_model.post_layernorm(raw), theirs, atol=1e-5, rtol=0)
    assert raw.shape[1] == 17  # the class token is kept


def shrunk(preset: VisionConfig, layers: int) -> VisionConfig:
    """A published encoder's variant in a test's sizes."""
    return replace(preset, image_size=SIZE, patch_size=4, width=24, heads=4, mlp_width=36, layers=layers)


PEER_SIZES: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 4,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 36,
}


@torch.no_grad()
def test_the_preset_of_vit_g_is_the_peers_encoder_before_its_norm() -> None:
    peer = redraw(Blip2VisionModel(Blip2VisionConfig(**PEER_SIZES, num_hidden_layers=3)))
    ours = VisionTransformer(shrunk(Blip2Config.vit_g_opt_2_7b().vision, 3))
    state = from_hf({f"vision_model.{name}": tensor for name, tensor in peer.state_dict().items()})
    ours.load_state_dict({n.removeprefix("vision."): t for n, t in state.items() if n.startswith("vision.")})
    seen = pixels(pairs())
    found = ours(seen, layers=(-1,), pooled=False).layers[0]
    theirs = peer(seen)
    torch.testing.assert_close(peer.post_layernorm(found), theirs.last_hidden_state, atol=1e-5, rtol=0)
    hidden = peer(seen, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_preset_of_vit_l_is_clips_encoder_before_its_last_block() -> None:
    preset = Blip2Config.vit_l_opt_2_7b().vision
    assert (preset.layers, preset.activation, preset.pre_norm, preset.post_norm) == (23, "quick_gelu", True, "none")
    peer = redraw(CLIPVisionModel(CLIPVisionConfig(**PEER_SIZES, num_hidden_layers=4)))
    whole = shrunk(VisionConfig.vit_l_14(), 4)
    ours = VisionTransformer(shrunk(preset, 3))
    left_out = ours.load_state_dict(vision_from_hf(peer.state_dict(), whole), strict=False)
    assert not left_out.missing_keys
    assert all(name.startswith(("blocks.3.", "ln_post.")) for name in left_out.unexpected_keys)
    seen = pixels(pairs())
    theirs = peer(seen, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours(seen, layers=(-1,), pooled=False).layers[0], theirs, atol=1e-5, rtol=1e-5)


def theirs_and_ours(kind: dict, batch: Batch, decoder: list[list[int]] | None, instruct: bool):
    peer, net = generation_peer(kind, instruct=instruct)
    stream = batch.text[net.prompt_stream]
    ids = stream.ids.clone()
    ids[:, :QUERIES] = V - 1
    given = {"pixel_values": pixels(batch), "input_ids": ids, "attention_mask": stream.mask.long()}
    if instruct:
        question = batch.text["qformer"]
        given |= {"qformer_input_ids": question.ids, "qformer_attention_mask": question.mask.long()}
    if decoder is not None:
        given |= {"decoder_input_ids": batch.text["decoder"].ids}
    return peer, net, given


@torch.no_grad()
@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("kind", [OPT, T5, LLAMA], ids=["opt", "t5", "llama"])
def test_generating_models_give_the_same_logits(kind: dict, instruct: bool) -> None:
    seq2seq = kind is T5
    decoder = [[0, 20, 21, 1], [0, 22, 1], [0, 23, 24, 25, 1]] if seq2seq else None
    stream = "encoder" if seq2seq else "lm"
    batch = prompts(ROWS, stream=stream, decoder=decoder, question=QUESTIONS if instruct else None)
    peer, net, given = theirs_and_ours(kind, batch, decoder, instruct)
    expected = peer(**given).logits
    embeds, lengths = net.embed_prompt(batch), batch.text[stream].lengths
    if isinstance(net.language, Seq2SeqLM):
        found, real = net.language.logits(embeds, lengths, batch.text["decoder"]), batch.text["decoder"].mask
    else:
        assert net.language is not None
        found, real = net.language.logits(embeds, lengths), batch.text[stream].mask
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)
    other = peer(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits
    assert (other - expected)[real].abs().max() > 0.01  # the picture matters


@torch.no_grad()
def test_only_the_qformers_question_changes_the_soft_prompt() -> None:
    _, net = generation_peer(OPT, instruct=True)
    first, second = (
        torch.stack(net.visual_tokens(prompts(ROWS, question=q))) for q in (QUESTIONS, [[CLS, 9, SEP]] * 3)
    )
    torch.testing.assert_close(first[1], second[1])
    assert (first[0] - second[0]).abs().max() > 0.01
    assert (first[2] - second[2]).abs().max() > 0.01


def looked_up(table: torch.nn.Module) -> tuple[list[list[int]], Any]:
    """A list that gets the rows of OPT's position table that a call reads, found again by their numbers; the hook."""
    found: list[list[int]] = []

    def hook(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        weight = must_be(torch.Tensor, module.weight)
        found.append([int((weight - row).abs().sum(1).argmin()) for row in output[0]])

    return found, table.register_forward_hook(hook)


@torch.no_grad()
def test_positions_of_opt_with_padding_between_prompt_and_text() -> None:
    """transformers pads on the left of the text, behind the visual tokens; we pad the whole row. Equal outputs."""
    peer, net = generation_peer(OPT)
    batch = prompts(ROWS)
    embeds, lengths = net.embed_prompt(batch), batch.text["lm"].lengths
    ours = must_be(LanguageModel, net.language).logits(embeds, lengths)
    width = max(map(len, ROWS))
    for row, text in enumerate(ROWS):
        pad = width - len(text)
        ids = torch.tensor([[V - 1] * QUERIES + [1] * pad + text])
        mask = torch.tensor([[1] * QUERIES + [0] * pad + [1] * len(text)])
        rows, hook = looked_up(peer.language_model.model.decoder.embed_positions)
        theirs = peer(pixel_values=pixels(batch)[row : row + 1], input_ids=ids, attention_mask=mask).logits[0, -1]
        hook.remove()
        real = [*range(2, 2 + QUERIES), *range(2 + QUERIES, 2 + QUERIES + len(text))]
        assert [place for place, seen in zip(rows.pop(), mask[0].tolist(), strict=True) if seen] == real
        torch.testing.assert_close(ours[row, QUERIES + len(text) - 1], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [OPT, T5], ids=["opt", "t5"])
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (5, 1.0), (5, -1.0)])
def test_generation_equals_theirs_token_by_token(kind: dict, beams: int, penalty: float) -> None:
    batch = prompts([row[:3] for row in ROWS], stream="encoder" if kind is T5 else "lm")
    peer, net, given = theirs_and_ours(kind, batch, None, False)
    stop = 40 if kind is T5 else 55
    found = peer.generate(
        **given,
        max_new_tokens=6,
        num_beams=beams,
        length_penalty=penalty,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        bos_token_id=2,
        decoder_start_token_id=0,
    )
    given_ids = 1 if kind is T5 else given["input_ids"].shape[1]
    theirs = [row[given_ids:] for row in found.tolist()]  # decoders give back the prompt too (trap 3)
    expected = [row[: row.index(stop)] if stop in row else row[:6] for row in theirs]
    ours = net.generate(batch, Decoding(max_new_tokens=6, num_beams=beams, length_penalty=penalty, stop_ids=(stop,)))
    assert ours == expected
    if beams > 1:  # a negative penalty favours short answers, a high one long ones
        lengths = {}
        for other in (-1.0, 4.0):
            decoding = Decoding(max_new_tokens=6, num_beams=beams, length_penalty=other, stop_ids=(stop,))
            lengths[other] = sum(map(len, net.generate(batch, decoding)))
        assert lengths[-1.0] < lengths[4.0]


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("kind", [OPT, T5], ids=["opt", "t5"])
def test_a_saved_folder_is_read_back(kind: dict, instruct: bool, tmp_path) -> None:
    peer, net = generation_peer(kind, instruct=instruct)
    peer.save_pretrained(tmp_path)
    config, state = read_blip2_folder(tmp_path)
    read = Blip2(config).eval()
    load_into(read, state, where=tmp_path)
    question = QUESTIONS if instruct else None
    decoder = [[0, 20, 21, 1]] * 3 if kind is T5 else None
    batch = prompts(ROWS, stream=net.prompt_stream, decoder=decoder, question=question, learn_from=1)
    torch.testing.assert_close(read.score(batch), net.score(batch))


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_a_tied_t5_comes_back_tied_and_scaled_as_it_was(scaled: bool, tmp_path) -> None:
    """The library ties every T5 and takes the flag for "do not scale": the file holds one table."""
    peer, _ = generation_peer({**T5, "tie_word_embeddings": scaled})
    peer.save_pretrained(tmp_path / "theirs")
    config, state = read_blip2_folder(tmp_path / "theirs")
    net = Blip2(config).eval()
    load_into(net, state, where=tmp_path)
    files = {
        "config.json": config_to_hf(config, image_token_id=V - 1),
        "model.safetensors": to_hf(state_tensors(net), config),
    }
    write_folder(tmp_path / "ours", files)
    stored, written = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("theirs", "ours"))
    assert {n for n in written if "language_model" in n} == {n for n in stored if "language_model" in n}
    assert not any("lm_head" in n for n in written)
    again = type(peer).from_pretrained(tmp_path / "ours").eval()
    assert again.language_model.lm_head.weight is again.language_model.shared.weight
    decoder = [[0, 20, 21, 1]] * 3
    batch = prompts(ROWS, stream="encoder", decoder=decoder)
    _, _, given = theirs_and_ours(T5, batch, decoder, instruct=False)
    expected = peer(**given).logits
    found = must_be(Seq2SeqLM, net.language).logits(
        net.embed_prompt(batch), batch.text["encoder"].lengths, batch.text["decoder"]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(again(**given).logits, expected, atol=1e-4, rtol=0)


def test_a_rate_of_dropout_that_has_no_place_is_noted() -> None:
    values = peer_config(OPT, qformer={"attention_probs_dropout_prob": 0.3}).to_dict()
    account = Account()
    assert config_from_hf(values, account).qformer.dropout == 0.1
    (note,) = account.report().notes
    assert note.startswith("qformer_config.attention_probs_dropout_prob 0.3: in training attention drops 0.1")


def test_a_retrieval_folder_goes_back_as_it_came(tmp_path) -> None:
    """Nothing is lost of what was never there: no leave is needed, and every tensor is the same to the bit."""
    peer, _ = retrieval_peer()
    peer.save_pretrained(tmp_path / "theirs")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", *map(str, range(43))]
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(words) + "\n")
    done = write_model(load(tmp_path / "theirs"), tmp_path / "ours", "hf")
    assert done.losses == ()
    again = type(peer).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(t, again[name]) for name, t in peer.state_dict().items())


def test_a_strange_tensor_is_refused() -> None:
    peer, _ = retrieval_peer()
    with pytest.raises(CheckpointError, match="belongs to no part"):
        from_hf({**peer.state_dict(), "qformer.encoder.layer.0.gate.weight": torch.zeros(1)})
    assert len(TEXTS) == len(tokens(TEXTS).ids)


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("kind", [OPT, T5], ids=["opt", "t5"])
def test_a_folder_opens_as_a_model(kind: dict, instruct: bool, tmp_path) -> None:
    peer, _ = generation_peer({**kind, "vocab_size": 300}, instruct=instruct)
    peer.save_pretrained(tmp_path)
    Tokenizer.train(["what is it? a photo of a cat"] * 3, 300).save(tmp_path)
    if instruct:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", *map(str, range(43))]
        (tmp_path / "qformer_tokenizer").mkdir()
        (tmp_path / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    model = load(tmp_path)
    expected = {"generate", "caption", "answer", "chat", "score", *(["attend"] if kind is not T5 else [])}
    assert set(model.capabilities) == expected
    assert model.forbidden == (V - 1,)
    image = PilImage.effect_noise((16, 16), 90).convert("RGB")
    record = Record("q", (as_image(image), Text("What is it?", role="user")))
    streams = model.processor.prompt(record).streams
    ending = {(False, "opt"): "Answer:", (False, "t5"): "Short answer:"}.get(
        (instruct, kind["model_type"]), "What is it?"
    )
    text = next(iter(streams.values())).ids
    assert model.processor.tokenizer.decode(text).endswith(ending)
    assert ("qformer" in streams) == instruct
    assert isinstance(model.answer(image, "What is it?", max_new_tokens=3, num_beams=2, length_penalty=-1), str)
    assert isinstance(model.caption(image, max_new_tokens=3), str)


@torch.no_grad()
def test_a_tokenizer_without_a_newline_is_written_and_opened_again(tmp_path: Path) -> None:
    """A text ends at the end of sequence there: a stop that the tokenizer does not have is none."""
    words, peer = tiny_models.words(), tiny_models.blip2()
    assert newline_id(words) is None
    model = Model(peer.net, PromptProcessor(words, there(peer.processor.image), num_tokens=4, prompt="a photo of"))
    record = Record("1", (as_image(PilImage.new("RGB", (20, 30), "red")), Text("is a red cube?", role="user")))
    expected = model.answer_records([record], max_new_tokens=6)
    for to in ("hf", "isthmus"):
        write_model(model, tmp_path / to, to)
        again = load(tmp_path / to)
        assert again.processor.to_dict()["end"] == "eos"
        assert again.processor.stop_ids == ()
        assert again.answer_records([record], max_new_tokens=6) == expected
