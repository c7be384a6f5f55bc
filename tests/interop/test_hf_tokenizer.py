"""Tokenizers of transformers' classes begin a text here as transformers' own call does, whatever they name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CodeGenTokenizer,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    T5Tokenizer,
)

import isthmus
from isthmus.data.record import Record, Text
from isthmus.data.text import render
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.hf_tokenizer import open_tokenizer
from tests.interop import tiny_models
from tests.interop.test_folders import LANGUAGE, PICTURES, VISION, redraw

TEXT = "two cats, a red cube"
PIECES = [*"▁Ġabcdefghijklmnopqrstuvwxyz,?!.:", "\n", "ca", "at", "re", "ed", "cu", "be"]
MERGES = [("c", "a"), ("a", "t"), ("r", "e"), ("e", "d"), ("c", "u"), ("b", "e")]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "[g]", "<mask>", "<image>"]
VOCAB = {piece: n for n, piece in enumerate([*SPECIALS, *PIECES])}


def made(kind: Any, **more: Any) -> Any:
    return kind(vocab=dict(VOCAB), merges=list(MERGES), **{**NAMES, **more})


def fast(*front: str) -> Any:
    """A tokenizer of no class of its own, whose file puts ``front`` before a text."""
    backend = Backend(models.BPE(vocab=dict(VOCAB), merges=list(MERGES), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIALS)
    if front:
        ids = [(token, VOCAB[token]) for token in front]
        backend.post_processor = processors.TemplateProcessing(single=[*front, "$A"], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


FAMILIES: dict[str, Any] = {
    "llama": lambda: made(LlamaTokenizer, add_bos_token=True),
    "llama without": lambda: made(LlamaTokenizer, add_bos_token=False),
    "llama unsaid": lambda: made(LlamaTokenizer),
    "llama 3": lambda: fast("<s>"),
    "gpt2": lambda: made(GPT2Tokenizer),
    "smollm": lambda: made(GPT2Tokenizer, bos_token="[g]", eos_token="</s>"),
    "opt": lambda: made(GPT2Tokenizer, bos_token="</s>", add_bos_token=True),
    "qwen2": lambda: made(Qwen2Tokenizer),
    "gpt_neox": lambda: made(GPTNeoXTokenizer),
    "phi": lambda: made(CodeGenTokenizer),
    "gemma": lambda: made(GemmaTokenizer),
    "siglip 2": lambda: made(Siglip2Tokenizer),
    "xglm": lambda: fast("</s>"),
    "glm": lambda: fast("[g]", "<s>"),
    "named only": fast,
    "t5": lambda: T5Tokenizer(
        vocab=[(piece, -float(n)) for piece, n in VOCAB.items()], extra_ids=0, eos_token="</s>", unk_token="<unk>"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_begins_as_transformers_begins_it(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "theirs")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "theirs"), open_tokenizer(tmp_path / "theirs")
    bare = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert len(bare) > 5
    for told in (ours, Tokenizer.load(_saved(ours, tmp_path / "ours"))):
        expected = theirs(TEXT)["input_ids"]
        end = [theirs.eos_token_id] if family == "t5" else []
        assert [*told.begin_ids, *told.encode(TEXT), *end] == expected
        assert told.specials["bos_token"] == theirs.bos_token
    assert ours.begins == {"glm": ("[g]", "<s>"), "opt": ("</s>",), "xglm": ("</s>",)}.get(family, ours.begins)


def _saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


def test_folders_saved_before_begin_with_the_token_they_name(tmp_path: Path) -> None:
    Tokenizer.train(["a red cube"] * 3, 280).save(tmp_path)
    assert "begins_with" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path).begin_ids == (1,)


def test_an_lm_answers_and_is_written_as_it_begins(tmp_path: Path) -> None:
    """SmolLM's kind: a beginning is named, and nothing is put in front of a text."""
    sizes: dict[str, Any] = {"vocab_size": len(VOCAB), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    theirs = redraw(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=4, eos_token_id=2)))
    theirs.save_pretrained(tmp_path / "a")
    FAMILIES["smollm"]().save_pretrained(tmp_path / "a")
    model = isthmus.load(tmp_path / "a")
    write_model(model, tmp_path / "b", "hf")
    for opened, folder in ((model, "a"), (isthmus.load(tmp_path / "b"), "b")):
        words = AutoTokenizer.from_pretrained(tmp_path / folder)
        found = words(TEXT, return_tensors="pt")
        wanted = theirs.generate(**found, max_new_tokens=6, do_sample=False, suppress_tokens=[0], pad_token_id=0)
        said = opened.generate([Record(id="x", parts=(Text(TEXT),))], max_new_tokens=6)
        assert said == [opened.processor.tokenizer.decode(wanted[0, found["input_ids"].shape[1] :].tolist()).strip()]


@torch.no_grad()
def test_a_llava_and_a_blip2_over_such_lms_get_their_processors_ids(tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = LlamaConfig(**{**LANGUAGE, "vocab_size": len(VOCAB)}, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"}, text_config=text, image_token_index=6
    )
    redraw(LlavaForConditionalGeneration(config)).save_pretrained(tmp_path / "llava")
    pictures = CLIPImageProcessorPil(**PICTURES)
    words = made(GPT2Tokenizer, extra_special_tokens=["<image>"])
    LlavaProcessor(pictures, words, patch_size=8, num_additional_image_tokens=1).save_pretrained(tmp_path / "llava")
    asked = Record(id="x", parts=(Text("a cat", role="user"),))
    ids = isthmus.load(tmp_path / "llava").processor.prompt(asked).streams["lm"].ids
    said = str(render(asked, "vicuna_v1", prompt=True))
    assert ids == AutoProcessor.from_pretrained(tmp_path / "llava")(text=said)["input_ids"][0]
    blip2 = tiny_models.blip2()
    write_model(blip2, tmp_path / "blip2", "hf", lossy=True)
    config = json.loads((tmp_path / "blip2" / "config.json").read_text())
    (tmp_path / "blip2" / "config.json").write_text(json.dumps(config | {"image_token_index": 6}))
    for name, front in (("opt", [2]), ("smollm", [])):
        FAMILIES[name]().save_pretrained(tmp_path / "blip2")
        assert OPTConfig().model_type == blip2.net.config.language["model_type"]
        told = isthmus.load(tmp_path / "blip2").processor
        ids = told.prompt(asked).streams["lm"].ids
        assert ids[: len(front) + 1] == [*front, told.tokenizer.encode("Question: a cat Answer:")[0]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip 2", "gemma"])
def test_siglip_2_pads_with_its_tokenizers_pad_and_keeps_punctuation(family: str, tmp_path: Path) -> None:
    """Its configuration names another pad, a default that nobody reads."""
    words = FAMILIES[family]()
    words.padding_side = "right"
    sizes = {**LANGUAGE, "vocab_size": len(VOCAB), "max_position_embeddings": 24, "pad_token_id": 1, "eos_token_id": 2}
    theirs = redraw(SiglipModel(SiglipConfig(text_config=sizes, vision_config=VISION))).eval()
    theirs.save_pretrained(tmp_path)
    backend = words.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 2)])
    words.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    model, told = isthmus.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.net.config.text.pad_id == 0
    texts = ["a red, red CUBE!", "two cats"]
    rows = told(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt", padding_side="right")
    wanted = theirs.get_text_features(input_ids=rows["input_ids"]).pooler_output
    for opened in (model, isthmus.load(model.save(tmp_path / "ours"))):
        found = opened.embed_texts(texts)
        torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5, rtol=0)


def test_a_missing_tokenizer_is_asked_for_and_may_be_given(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": len(VOCAB), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "lm")
    FAMILIES["gpt2"]().save_pretrained(tmp_path / "words")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer .*give tokenizer=… \(on the command line --tok"):
        isthmus.load(tmp_path / "lm")
    for given in (tmp_path / "words", tmp_path / "words" / "tokenizer.json"):
        assert isthmus.load(tmp_path / "lm", tokenizer=given).processor.tokenizer.begins == ()
    with pytest.raises(CheckpointError, match="is no folder of a tokenizer"):
        isthmus.load(tmp_path / "lm", tokenizer=tmp_path / "nowhere")
