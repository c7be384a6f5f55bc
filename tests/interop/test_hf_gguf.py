"""A GGUF file is a language model: weights, tokenizer and chat template are those that transformers reads from it."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import isthmus
from isthmus.cli import show
from isthmus.data.chat import OWN
from isthmus.data.clip_tokenizer import byte_symbols
from isthmus.errors import CheckpointError, ConfigError, MissingExtraError
from isthmus.language import Decoding

WIDTH, LAYERS, HEADS, MLP = 64, 2, 4, 96
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write(path: Path, architecture: str = "llama") -> Path:
    """A llama.cpp file of random numbers, its tables in Q4_1, with a byte-level vocabulary and a template."""
    draw = np.random.default_rng(0)
    symbols = list(byte_symbols().values())
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    vocab = [*SPECIALS, *symbols, *("".join(pair) for pair in merges)]
    vocab += [f"<extra{n}>" for n in range(-len(vocab) % 8)]
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_context_length(128)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(MLP)
    out.add_head_count(HEADS)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(vocab))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(vocab)
    out.add_token_types([3 if t in SPECIALS else 1 for t in vocab])
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_add_bos_token(value=False)
    out.add_chat_template(CHATML)
    kind = gguf.GGMLQuantizationType.Q4_1
    shapes = {"token_embd": (len(vocab), WIDTH)}
    for n in range(LAYERS):
        own = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
        own |= {
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (MLP, WIDTH),
            "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }
        shapes |= {f"blk.{n}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        quantised = gguf.quants.quantize(draw.normal(0, 0.2, shape).astype(np.float32), kind)
        out.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{n}.{norm}" for n in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))):
        out.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_it_answers_as_transformers_does(file: Path, tmp_path: Path) -> None:
    model = isthmus.load(file)
    assert model.processor.to_dict()["template"] == OWN
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    messages = [{"role": "user", "content": "abcd is what?"}]
    asked = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    never = list(model.ended(Decoding()).forbidden_ids)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(asked), "do_sample": False, "max_new_tokens": 12}
    with torch.inference_mode():
        ids = theirs.generate(asked, eos_token_id=[2], suppress_tokens=never or None, **how)[0, asked.shape[1] :]
    assert model.chat(messages, max_new_tokens=12) == words.decode(ids, skip_special_tokens=True).strip()
    half, cast = isthmus.load(file, dtype=torch.bfloat16).net.state_dict(), model.net.cast(torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], tensor) for name, tensor in cast.items())
    assert next(iter(half.values())).dtype == torch.bfloat16
    model = isthmus.load(file)
    again = isthmus.load(model.save(tmp_path / "own"))
    assert again.chat(messages, max_new_tokens=12) == model.chat(messages, max_new_tokens=12)


def test_the_header_is_read_once(file: Path, monkeypatch: Any) -> None:
    read, own = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or own(path))
    patched = gguf.GGUFReader
    isthmus.load(file)
    assert read == [str(file)]
    assert gguf.GGUFReader is patched


def test_nothing_is_shown_while_it_is_read(file: Path, capfd: Any) -> None:
    isthmus.load(file)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_show_writes_the_prompt_to_the_letter(file: Path, tmp_path: Path, capsys: Any) -> None:
    show.run(str(file), [], tmp_path / "facts.json", render="hi")
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    ids = words.apply_chat_template([{"role": "user", "content": "hi"}], **how)
    shown = capsys.readouterr().out
    assert r"'<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'" in shown
    assert f"Ids: {ids}" in shown
    with pytest.raises(ConfigError, match="only a model's prompt"):
        show.run("clip-vit-b-32", [], None, render="hi")


def test_what_cannot_be_read_is_one_paragraph(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    content = file.read_bytes()
    for size in (4, 40, len(content) // 2, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cannot read the GGUF file .*cut short") as told:
            isthmus.load(tmp_path / "cut.gguf")
        assert "\n" not in str(told.value)
    with pytest.raises(CheckpointError, match="architecture"):
        isthmus.load(write(tmp_path / "odd.gguf", architecture="oddity"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"needs the extra gguf: pip install 'isthmus\[gguf\]'"):
        isthmus.load(file)
