"""The commands of docs/finetune.md, in their order, on small checkpoints that transformers wrote."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from isthmus import adapters
from isthmus.adapters import Lora
from isthmus.cli.app import app
from isthmus.interop.convert import write_model
from isthmus.interop.hf_peer import open_class
from isthmus.opening import load
from isthmus.stage import Group, apply_stage
from tests.interop import tiny_models

PAGE = Path(__file__).parents[2] / "docs" / "finetune.md"
SMALL = [f"stages.tune.{key}=2" for key in ("steps", "batch_size", "validate.every", "validate.rows")]
ADAPTED = ["stages.tune.train.0.lora.rank=2", "evaluate.answers.options.decoding.max_new_tokens=1"]
NAMES = ["red", "blue", "a green ball", "two rings"]


def commands(kind):
    """Every command of the page that has to do with a kind of model."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = [shlex.split(line) for language, block in blocks if not language for line in block.splitlines()]
    whose = {"runs/my-captions": "blip2", "runs/my-whole-clip": "clip"}
    own = [words[1:] for words in lines if any(f"my-{kind}" in w or f"finetune-{kind}" in w for w in words)]
    assert [words[0] for words in own[:6]] == ["check", "train", "eval", "verify", "convert", "verify"]
    assert all(whose.get(w, kind) == kind for words in own for w in words)
    return own


def data(folder, words):
    """``train`` and ``held-out`` as JSON lines and as LLaVA JSON; ``words`` makes a row from a picture's name."""
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 4), ("held-out", 2)):
        rows = []
        for number in range(count):
            file = f"{split}-{number}.png"
            Image.new("RGB", (40, 32), (30 * number, 200 - 20 * number, 90)).save(folder / "images" / file)
            rows.append((file, NAMES[number % len(NAMES)]))
        told = [json.dumps({"image": file, **words(name)}) for file, name in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(told))
        turns = [
            {
                "id": file,
                "image": file,
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat is it?"},
                    {"from": "gpt", "value": name},
                ],
            }
            for file, name in rows
        ]
        (folder / f"{split}.json").write_text(json.dumps(turns))


@pytest.mark.parametrize("kind", ["llava", "clip", "blip2"])
def test_every_command_of_the_page_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer = tmp_path / "peer"
    write_model(getattr(tiny_models, kind)(), peer, "hf")
    open_class(peer).save_pretrained(tmp_path / f"{kind}-hf")  # by transformers itself, which leaves the words out
    for file in peer.iterdir():
        if not (tmp_path / f"{kind}-hf" / file.name).exists() and not file.name.endswith(".safetensors"):
            (tmp_path / f"{kind}-hf" / file.name).write_bytes(file.read_bytes())
    data(tmp_path / "my-data", lambda name: {"caption": name})
    data(tmp_path / "my-pairs", lambda name: {"caption": name})
    data(tmp_path / "my-questions", lambda name: {"question": "what?", "answer": name})
    for words in commands(kind):
        small = [*SMALL, *(ADAPTED if kind != "clip" else [])] if words[0] in ("check", "train") else []
        done = CliRunner().invoke(app, [*words, *small])
        assert done.exit_code == 0, f"{' '.join(words)}\n{done.output}\n{done.exception!r}"
    run = tmp_path / "runs" / f"my-{kind}"
    first = json.loads((run / "stages/tune/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["validation"]
    assert (run / "stages/tune/best/validation.json").is_file()
    assert bool(adapters.adapted(load(run).net)) == (kind != "clip")
    assert not adapters.adapted(load(tmp_path / f"my-{kind}-hf").net)


def test_a_qformer_takes_adapters():
    net = tiny_models.blip2().net
    table = apply_stage(net, (Group("connector.qformer.*", lora=Lora(rank=2)),))
    layers = adapters.adapted(net)
    assert layers
    assert all(name.startswith("connector.qformer.") for name in layers)
    assert not any("ffn_text" in name and f".{net.config.qformer.layers - 1}." in name for name in layers)
    assert table.trained == sum(t.numel() for t in adapters.adapter_tensors(net).values())
