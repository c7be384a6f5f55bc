"""The real parts that tools/real_parts.sh brings: run by `make real`, skipped where they are not."""

import json
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus import checkpoint
from isthmus.recipes.build import build
from isthmus.recipes.schema import read_recipe

REAL = Path(__file__).resolve().parents[2] / "runs" / "real"
SMOLLM2 = REAL / "smollm2"
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about a red cube.",
    "How many legs has a spider?",
]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no runs/real/smollm2: run tools/real_parts.sh"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def model():
    return isthmus.load(SMOLLM2)


@pytest.fixture(scope="module")
def peer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(SMOLLM2), AutoModelForCausalLM.from_pretrained(SMOLLM2).eval()


def asked(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]


def test_it_still_knows_the_capital_of_france(model):
    assert model.chat(asked(QUESTIONS[0])) == "The capital of France is Paris."


@pytest.mark.parametrize("turns", [(q,) for q in QUESTIONS] + [("Hi.", "Hello!", QUESTIONS[1])])
def test_answers_equal_the_librarys_over_its_own_template(model, peer, turns):
    tokenizer, theirs = peer
    given = tokenizer.apply_chat_template(asked(*turns), add_generation_prompt=True, return_tensors="pt")
    ids = given["input_ids"] if hasattr(given, "keys") else given
    with torch.inference_mode():
        found = theirs.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
    expected = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert model.chat(asked(*turns), max_new_tokens=40) == expected.strip()


def test_the_gguf_holds_the_same_model(model):
    (file,) = REAL.glob("unpacked/*/*.gguf")
    same = isthmus.load(file).net.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in model.net.state_dict().items())


def test_bert_starts_the_qformer():
    built = build(read_recipe("blip2-smollm2", [f"parts.{n}={REAL / p}" for n, p in PARTS.items()]))
    held = checkpoint.load_tensors(REAL / "minilm" / "model.safetensors")
    words = next(v for k, v in held.items() if k.endswith("word_embeddings.weight"))
    own = built.net.state_dict()["connector.qformer.words.weight"]
    assert torch.equal(own[: len(words)], words)
    assert json.loads((REAL / "minilm" / "config.json").read_text())["hidden_size"] == own.shape[1]


PARTS = {"language": "smollm2", "bert": "minilm"}
