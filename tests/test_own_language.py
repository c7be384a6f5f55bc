"""docs/own-language-model.md as a reader does it: each command as it stands there, with tiny parts."""

import shlex
from pathlib import Path

import pytest
from PIL import Image as PilImage

from isthmus.data.processor import TextProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import ConfigError
from isthmus.interop.convert import write_model
from isthmus.model import Model
from isthmus.models.lm import BareLM, LmConfig
from isthmus.recipes.run import train
from tests.interop import test_hf_gguf, tiny_models
from tests.test_tutorials import BLOCK, run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-language-model.md"
SHORT = [f"stages.{stage}.{key}" for stage in ("align", "instruct") for key in ("steps=2", "batch_size=2", "warmup=0")]
SHORT += ["stages.align.data.0.count=64", "stages.instruct.data.0.count=64"]
SHORT += ["evaluate.vqa.data.count=64", "evaluate.vqa.train.count=64"]


def tiny_instruct_lm(folder: Path) -> None:
    """A language model of a few tokens as transformers keeps one, with ChatML."""
    told = ["a small red cube and a large blue ring, two stars: what colour is it? system user assistant"] * 3
    words = Tokenizer.train(told, 300).with_tokens("<|im_start|>", "<|im_end|>")
    words = Tokenizer(words.backend, eos="<|im_end|>", bos="<|im_start|>", pad="<|im_end|>", begins=())
    rows = {"vocab_size": words.vocab_size, "max_position_embeddings": 2048}
    net = BareLM(LmConfig(language={**tiny_models.LLAMA, **rows}))
    write_model(Model(net, TextProcessor(words.with_chat_template(test_hf_gguf.CHATML), template="chat")), folder, "hf")


def test_a_template_for_asking_alone_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    tiny_instruct_lm(tmp_path / "lm")
    (tmp_path / "lm" / "chat_template.jinja").write_text("{{ raise_exception('on Sundays only') }}")
    overrides = [f"parts.language={tmp_path / 'lm'}", *SHORT]
    with pytest.raises(ConfigError, match=r"cannot be trained with: .*on Sundays only"):
        train("llava-smollm2", tmp_path / "run", overrides=overrides, progress=False)
    assert not (tmp_path / "run" / "stages").exists()


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch) -> None:
    tiny_instruct_lm(tmp_path / "runs" / "real" / "smollm2")
    test_hf_gguf.write(tmp_path / "model.gguf")
    PilImage.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    done = set()
    for language, _, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        for line in text.splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words:
                done.add(words[1])
                short = SHORT if words[1] in ("check", "train") else []
                assert run([*words, *short]) == 0, line
    assert {"chat", "show", "check", "train", "convert"} <= done
