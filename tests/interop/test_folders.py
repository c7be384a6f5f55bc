"""Folders written by transformers load behind `isthmus.load`, tokenizer and image processor included."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image as PilImage
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import isthmus
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.collate import collate
from isthmus.data.images import ImageTransform, MadeImage
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, IsthmusWarning
from isthmus.interop.hf_files import swapped, tokenizer_files
from isthmus.interop.hf_images import image_transform
from isthmus.language import Decoding
from tests.fixtures import OPEN_CLIP
from tests.narrow import there

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
PICTURES: dict[str, Any] = {
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["a red cube and a blue ring"] * 3, 300)


def finish(folder, tokenizer, pictures=PICTURES):
    tokenizer.save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))


def redraw(model: Any) -> Any:
    """A model of transformers with weights of its own."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_clip(tmp_path, tokenizer):
    tokenizer = swapped(tokenizer, tokenizer.eos_id, tokenizer.vocab_size - 1)  # end-of-text 2 means another rule there
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_id,
    }
    peer = redraw(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)))
    peer.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer)
    for name, content in tokenizer_files(tokenizer, begin=True, end=True, context=24).items():
        (tmp_path / name).write_text(content)
    model = isthmus.load(tmp_path)
    picture = PilImage.effect_noise((50, 40), 90).convert("RGB")
    pixels = there(model.processor.image)(picture)[None]
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("a red cube"), tokenizer.eos_id]])
    with torch.no_grad():
        logits = peer(input_ids=ids, pixel_values=pixels).logits_per_image
    ours = model.similarity([picture], ["a red cube"]) * peer.logit_scale.exp()
    torch.testing.assert_close(ours, logits.detach(), atol=1e-4, rtol=1e-4)


CAPTIONS = ["a photo of a cat", "Two DOGS,  one frisbee!", "café naïve 猫 😀", "room 1234, don't", "a long one " * 40]


@pytest.mark.parametrize("eos", [2, 49407])
@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json and merges.txt"])
def test_clip_texts_go_the_published_way(tmp_path, layout, eos):
    """The published vocabulary (a part of its merges), both end-of-text ids and both sets of tokenizer files."""
    words = OPEN_CLIP / "tokenizer"
    theirs = CLIPTokenizer(vocab=str(words / "vocab.json"), merges=str(words / "merges.txt"))
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": eos,
    }
    peer = redraw(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)))
    peer.save_pretrained(tmp_path)
    if layout == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    else:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(words / name, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    model = isthmus.load(tmp_path)
    rows = theirs(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = peer.get_text_features(**rows).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert (expected @ expected.T).fill_diagonal_(0).max() < 0.997  # the captions can be told apart
    torch.testing.assert_close(model.embed_texts(CAPTIONS), expected, atol=1e-5, rtol=0)
    again = isthmus.load(model.save(tmp_path / "ours"))
    assert torch.equal(again.embed_texts(CAPTIONS), model.embed_texts(CAPTIONS))


def test_clip_reads_entities_as_its_weights_saw_them(tmp_path):
    """With the bare vocabulary, text is cleaned as OpenAI's weights saw it: what the fast tokenizer leaves out."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(OPEN_CLIP / "tokenizer" / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for row in json.loads((OPEN_CLIP / "tokenizer" / "rows.json").read_text()):
        ids = [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
        assert [*ids[:76], ids[-1]] == row["ids"] if len(ids) > 77 else ids == row["ids"]


def test_llava_forbids_its_image_token(tmp_path, tokenizer):
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=LANGUAGE | {"model_type": "llama"},
        image_token_index=310,
        image_seq_length=16,
    )
    peer = redraw(LlavaForConditionalGeneration(config))
    peer.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"do_pad": True})
    model = isthmus.load(tmp_path)
    # Buffers that no file holds are computed, not left as the memory happened to be.
    ours, theirs = (m.rotary_emb.inv_freq for m in (model.net.language.lm.model, peer.model.language_model))
    assert torch.equal(ours, theirs)
    assert model.forbidden == (310,)
    assert there(model.processor.image).mode == "pad"
    assert isinstance(model.answer(PilImage.new("RGB", (20, 30), "red"), "what?", max_new_tokens=3), str)
    again = isthmus.load(model.save(tmp_path / "ours"))
    assert again.forbidden == (310,)


MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% for c in m['content'] %}{{ '<image>\n' if "
    "c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'][0]['text'] }}"
    "{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)
SHAPES = [(20, 30), (100, 33), (64, 64), (31, 97), (32, 32)]
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96], [32, 32]]
"""The last of one tile: the library has such a picture twice."""


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("siglip", "full")])
@torch.no_grad()
def test_llava_next_of_the_library_gives_its_logits_and_tokens(tmp_path, tokenizer, tower, strategy):
    """Pictures by the folder's own processor there, by ours here; one of each shape, and two in one prompt. SigLIP's
    tower has no class token to drop, so the library's name for that is "full"."""
    config = LlavaNextConfig(
        vision_config=VISION | {"model_type": f"{tower}_vision_model"},
        text_config=LANGUAGE | {"model_type": "llama"},
        image_token_index=310,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy=strategy,
    )
    peer = redraw(LlavaNextForConditionalGeneration(config)).eval()
    peer.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"do_pad": True, "image_grid_pinpoints": PINPOINTS})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": MISTRAL}))
    model = isthmus.load(tmp_path)
    assert model.processor.template == "mistral_instruct"
    their_eyes = LlavaNextImageProcessorPil.from_pretrained(tmp_path, size={"shortest_edge": 32})
    for shapes in [[shape] for shape in SHAPES] + [SHAPES[:2]]:
        noise = [torch.rand(h, w, 3, generator=torch.Generator().manual_seed(h)) * 255 for w, h in shapes]
        pictures = [PilImage.fromarray(n.to(torch.uint8).numpy()) for n in noise]
        parts = [*(isthmus.Image(MadeImage(p), role="user") for p in pictures), isthmus.Text("what?", role="user")]
        example = model.processor.prompt(isthmus.Record(id="x", parts=tuple(parts)))
        ids = list(example.streams["lm"].ids)
        for place in example.places:
            ids[place.start : place.start + place.length] = [310] * place.length
        inputs = dict(their_eyes(pictures, return_tensors="pt")) | {"input_ids": torch.tensor([ids])}
        batch = collate([example])
        found = model.net.language.logits(model.net.embed_prompt(batch))
        expected = peer(**inputs).logits
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        written = peer.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[310], pad_token_id=0, eos_token_id=None
        )
        assert (
            model.net.generate(batch, Decoding(max_new_tokens=8, forbidden_ids=(310,)))[0]
            == written[0, len(ids) :].tolist()
        )
    told = isthmus.load(model.save(tmp_path / "ours"))
    assert told.net.config == model.net.config
    assert torch.equal(told.net.embed_prompt(batch), model.net.embed_prompt(batch))


def test_llava_next_with_tiles_of_two_kinds_is_refused(tmp_path, tokenizer):
    config = LlavaNextConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=LANGUAGE | {"model_type": "llama"},
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"image_grid_pinpoints": PINPOINTS[:2]})
    with pytest.raises(CheckpointError, match=r"cuts tiles from the canvases \[\(32, 64\), \(64, 32\)\]"):
        isthmus.load(tmp_path)


def test_a_chat_template_that_nobody_knows_is_told(tmp_path, tokenizer):
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"}, text_config=LANGUAGE | {"model_type": "llama"}
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    finish(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>{{ text }}")
    with pytest.warns(IsthmusWarning, match="its chat template is none that is known"):
        isthmus.load(tmp_path)


def test_language_model(tmp_path, tokenizer):
    redraw(LlamaForCausalLM(LlamaConfig(**LANGUAGE))).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model = isthmus.load(tmp_path)
    assert model.kind == "lm"
    assert isinstance(
        model.generate([isthmus.Record(id="x", parts=(isthmus.Text("a red"),))], max_new_tokens=3)[0], str
    )


def test_json_files_of_other_things_do_not_stop_a_folder_from_opening(tmp_path, tokenizer):
    LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    for name, text in (("classes.json", '["cat"]'), ("modules.json", "[]"), ("log.json", '{"a": 1}\n{"a": 2}\n')):
        (tmp_path / name).write_text(text)
    assert isthmus.load(tmp_path).kind == "lm"
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json is not valid JSON"):
        isthmus.load(tmp_path)


def bare(folder, tokenizer, **told):
    """The tokenizer's files as GPT-NeoX's and Gemma's: a beginning of sequence is named, and nothing puts it first."""
    tokenizer.save(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": None}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


@pytest.mark.parametrize("told", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_a_gpt_neox_begins_as_its_tokenizer_does(tmp_path, tokenizer, told):
    GPTNeoXForCausalLM(GPTNeoXConfig(**LANGUAGE)).save_pretrained(tmp_path)
    bare(tmp_path, tokenizer, **told)
    model = isthmus.load(tmp_path)
    record = isthmus.Record(id="x", parts=(isthmus.Text("a red", learn=True),))
    theirs = AutoTokenizer.from_pretrained(tmp_path)("a red")["input_ids"]
    for opened in (model, isthmus.load(model.save(tmp_path / "ours"))):
        ids = opened.processor.example(record, 0).streams["lm"].ids
        assert ids == [*theirs, tokenizer.eos_id]


def test_what_does_not_fit_is_named(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither a format of ours nor a model_type"):
        isthmus.load(tmp_path)
    redraw(
        CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 2},
                vision_config=VISION,
                projection_dim=16,
            )
        )
    ).save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"crop_size": 64})
    with pytest.raises(CheckpointError, match="pictures of 64 pixels"):
        isthmus.load(tmp_path)


def test_a_siglip_folder_cleans_texts_and_starts_them_with_nothing(tmp_path):
    tokenizer = Tokenizer.train(["a red cube and a blue ring"] * 3, 320)
    sizes = {**LANGUAGE, "max_position_embeddings": 16, "pad_token_id": 2, "eos_token_id": 2}
    theirs = redraw(SiglipModel(SiglipConfig(text_config=sizes, vision_config=VISION))).eval()
    theirs.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer)
    named = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    model = isthmus.load(tmp_path)
    ids = [*tokenizer.encode("a red cube"), tokenizer.eos_id]
    padded = torch.tensor([ids + [tokenizer.eos_id] * (16 - len(ids))])
    with torch.no_grad():
        expected = theirs.text_model(input_ids=padded).pooler_output
    expected = expected / expected.norm(dim=-1, keepdim=True)
    model.save(tmp_path / "ours")
    for opened in (model, isthmus.load(tmp_path / "ours")):
        found = opened.embed_texts(["  A red, CUBE! "])
        assert torch.allclose(found / found.norm(dim=-1, keepdim=True), expected, atol=1e-5)


def test_siglip_2_starts_a_text_without_a_beginning_token(tmp_path):
    """Gemma's tokenizer, told to add an end only."""
    tokenizer = Tokenizer.train(["a red cube and a blue ring"] * 3, 320)
    sizes = {**LANGUAGE, "max_position_embeddings": 16, "pad_token_id": 1, "eos_token_id": 2}
    SiglipModel(SiglipConfig(text_config=sizes, vision_config=VISION)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    begins = isthmus.load(tmp_path).processor.text_example("a red").streams["text"].ids
    bare(tmp_path, tokenizer, add_bos_token=False)
    ids = [*tokenizer.encode("a red"), tokenizer.eos_id]
    assert isthmus.load(tmp_path).processor.text_example("a red").streams["text"].ids == ids
    assert begins == [tokenizer.bos_id, *ids]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_resize": False}, "do_resize False"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1 / 127.5}, "scales by"),
        ({"size": {"shortest_edge": 40}}, "resizes to 40 pixels before it cuts out 28"),
    ],
)
def test_steps_of_an_image_processor_that_are_not_ours_are_refused(tmp_path, changes, named):
    """Pixels would differ, and nothing would say so."""
    ours = {"do_center_crop": True, "crop_size": 28, "size": {"shortest_edge": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours))
    assert image_transform(tmp_path, 28).mode == "square"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**ours, **changes}))
    with pytest.raises(CheckpointError, match=named):
        image_transform(tmp_path, 28)


@pytest.mark.parametrize("told", [None, {"size": {"height": 32, "width": 32}}])
def test_a_siglip_folder_that_tells_nothing_of_pixels_gets_siglips(tmp_path, told):
    """CLIP's mean and std would load and degrade."""
    sizes = {**LANGUAGE, "pad_token_id": 2, "eos_token_id": 2}
    SiglipModel(SiglipConfig(text_config=sizes, vision_config=VISION)).save_pretrained(tmp_path / "whole")
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path / "tower")
    Tokenizer.train(["a red cube"] * 3, 300).save(tmp_path / "whole")
    for name in ("whole", "tower"):
        if told is not None:
            (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(told))
        image = isthmus.load(tmp_path / name).processor.image
        assert image == replace(ImageTransform.siglip(32), deep="clip")


def test_pictures_that_are_not_normalised_stay_so(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28, "do_normalize": False}))
    transform = image_transform(tmp_path, 28)
    assert (transform.mean, transform.std) == ((0.0,) * 3, (1.0,) * 3)


def test_every_id_that_the_folder_stops_at_ends_an_answer(tmp_path, tokenizer):
    LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    stops = tmp_path / "generation_config.json"
    stops.write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 311]}))
    model = isthmus.load(tmp_path)
    free = model.net.language.generate
    embeds, lengths = model.net.language.embed(torch.tensor([[5, 6, 7]])), torch.tensor([3])
    (first, *_), *_ = free(embeds, lengths, Decoding(max_new_tokens=3))
    assert model.ended(Decoding()).stop_ids == tuple(sorted((tokenizer.eos_id, 311)))
    assert free(embeds, lengths, model.ended(Decoding(stop_ids=(first,)))) == [[]]

    model.save(tmp_path / "ours")
    assert isthmus.load(tmp_path / "ours").ended(Decoding()).stop_ids == model.ended(Decoding()).stop_ids
    stops.unlink()  # then the library takes what config.json says, but for the class's default
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [tokenizer.eos_id, 312]}))
    assert isthmus.load(tmp_path).ended(Decoding()).stop_ids == (tokenizer.eos_id, 312)
    for wrong, ids in (("-1", [tokenizer.eos_id, -1]), ("'end'", "end")):
        stops.write_text(json.dumps({"eos_token_id": ids}))
        with pytest.raises(CheckpointError, match=f"eos_token_id holds {wrong}, which is not a token id"):
            isthmus.load(tmp_path)
    stops.write_text(json.dumps({"eos_token_id": tokenizer.eos_id}))
    assert isthmus.load(tmp_path).processor.stop_ids == ()
