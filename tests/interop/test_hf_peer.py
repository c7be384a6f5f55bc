"""transformers' own models through our evaluator give what our models of the same folder give."""

import json

import pytest
import torch
from PIL import Image as PilImage
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import isthmus
from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, CheckpointError, ConfigError
from isthmus.evaluation import VqaTask, evaluate
from isthmus.interop.convert import write_model
from isthmus.interop.hf_peer import AnsweringPeer, EmbeddingPeer, load_peer
from isthmus.testing import probe
from tests.interop import tiny_models
from tests.interop.test_folders import LANGUAGE, PICTURES, VISION, finish, redraw
from tests.narrow import must_be, there


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer.train(["a red cube and a blue ring, what colour is it? USER: ASSISTANT:"] * 3, 299)
    return words.with_tokens("<image>")


@pytest.fixture(scope="module")
def llava(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llava")
    image_token = tokenizer.id_of("<image>")
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**LANGUAGE, "model_type": "llama", "eos_token_id": tokenizer.eos_id},
        image_token_index=image_token,
        image_seq_length=16,
    )
    model = redraw(LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = tokenizer.eos_id
    model.generation_config.suppress_tokens = list(range(image_token, LANGUAGE["vocab_size"]))
    model.save_pretrained(folder)
    finish(folder, tokenizer, {**PICTURES, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}})
    return folder


def pictures(count):
    colours = [(255, 0, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)]
    return [PilImage.new("RGB", (50, 40), colours[n]) for n in range(count)]


def records(count=3):
    return [
        Record(
            id=f"q{n}",
            parts=(as_image(p), Text("what colour is it?", role="user"), Text("red", role="assistant", learn=True)),
        )
        for n, p in enumerate(pictures(count))
    ]


def answering(folder, **options):
    return must_be(AnsweringPeer, load_peer(folder, **options))


def test_llava_answers_like_ours(llava):
    peer, ours = answering(llava), isthmus.load(llava)
    pixels = there(ours.processor.image)(pictures(1)[0])
    torch.testing.assert_close(peer.pixels(pictures(1))[0], pixels, atol=1e-6, rtol=0)
    found = peer.answer_records(records(), max_new_tokens=6)
    allowed = {"max_new_tokens": 6, "forbidden_ids": tuple(range(ours.forbidden[0], LANGUAGE["vocab_size"]))}
    assert found == ours.answer_records(records(), **allowed)
    assert len(set(found)) > 1, "the pictures are looked at"
    blind = [Record(r.id, r.texts) for r in records()]
    assert len(set(peer.answer_records(blind, max_new_tokens=6))) == 1


def test_llava_next_answers_like_ours(tmp_path):
    """Pictures of three shapes, so unlike numbers of tiles and tokens; two in the last question."""
    model = tiny_models.llava_next()
    write_model(model, tmp_path / "hf", "hf")
    peer = answering(tmp_path / "hf")
    asked = [Record(f"q{n}", (probe.picture(n), Text("what?", role="user"))) for n in (1, 2, 3)]
    asked.append(Record("both", (probe.picture(2), probe.picture(3), Text("what?", role="user"))))
    spare = model.processor.tokenizer.vocab_size  # the image token's row: nobody says it
    found = peer.answer_records(asked, max_new_tokens=6)
    assert found == model.answer_records(asked, max_new_tokens=6, forbidden_ids=(spare,))
    assert len(set(found)) > 1


def test_likelihoods_order_candidates_like_ours(llava):
    peer, ours = answering(llava), isthmus.load(llava)
    parts = records(1)[0].parts[:2]
    theirs, wanted = (m.score(parts, ["red", "a blue ring"]) for m in (peer, ours))
    assert all(s < 0 for s in theirs)
    assert theirs[0] != peer.score(records(2)[1].parts[:2], ["red", "a blue ring"])[0]
    assert (theirs[0] > theirs[1]) == (wanted[0] > wanted[1])


def test_the_evaluator_scores_a_peer_and_says_so_in_the_manifest(llava, tmp_path):
    task = VqaTask(name="v", records=records(), decoding={"max_new_tokens": 3})
    result = evaluate(load_peer(llava), task, tmp_path)
    assert len(result.rows) == 3
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["peer"].startswith("transformers ")
    assert manifest["prompt"]["first"].endswith("USER: <image>\nwhat colour is it? ASSISTANT:")
    assert manifest["image"]["image_mean"] == PICTURES["image_mean"]


def test_clip_embeds_like_ours(tmp_path, tokenizer):
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_id,
    }
    redraw(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))).save_pretrained(tmp_path)
    finish(
        tmp_path, tokenizer, {**PICTURES, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    )
    peer, ours = must_be(EmbeddingPeer, load_peer(tmp_path)), isthmus.load(tmp_path)
    torch.testing.assert_close(peer.embed_images(pictures(3)), ours.embed_images(pictures(3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        peer.vision_features(pictures(3)), ours.vision_features(pictures(3)), atol=1e-4, rtol=1e-4
    )
    assert peer.embed_texts(["a red cube", "a blue ring"]).norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])


def test_a_causal_lm_reads_text_and_refuses_pictures(tmp_path, tokenizer):
    redraw(LlamaForCausalLM(LlamaConfig(**LANGUAGE))).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    peer = answering(tmp_path, template="vicuna_bare")
    asked = Record(id="t", parts=(Text("what colour is it?", role="user"),))
    assert isinstance(peer.answer_records([asked], max_new_tokens=3)[0], str)
    with pytest.raises(CapabilityError, match="no image processor"):
        peer.answer_records(records(1), max_new_tokens=3)


def test_what_is_no_folder_of_transformers(tmp_path, llava):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_peer(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "isthmus-1"}')
    with pytest.raises(CheckpointError, match="without hf:"):
        load_peer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(CheckpointError, match="cannot open"):
        load_peer(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        answering(llava).answer_records(records(1), max_tokens=3)
    with pytest.raises(ConfigError, match="unknown template"):
        load_peer(llava, template="vicuna_2")
