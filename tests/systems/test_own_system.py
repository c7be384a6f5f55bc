"""A user's own system, the one of the examples: trained, opened, asked, evaluated and compared by its name alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PilImage
from typer.testing import CliRunner

from isthmus.batch import Batch
from isthmus.cli.app import app
from isthmus.data.messages import conversation
from isthmus.data.sources import open_source
from isthmus.errors import CheckpointError, ConfigError
from isthmus.language import Decoding
from isthmus.net import Net
from isthmus.opening import load
from isthmus.recipes.run import train
from isthmus.recipes.schema import read_recipe
from isthmus.serving.engine import Together, WholeAnswers, speaker_of
from isthmus.serving.limits import Limits
from isthmus.systems import system
from isthmus.testing.contracts import verify
from tests.interop import tiny_models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = {"kind": "scenes", "form": "questions", "split": "test", "count": 6}
LITTLE = [
    "threads=1",
    "tokenizer.samples=60",
    "evaluate.vqa.data.count=6",
    "evaluate.vqa.train.count=12",
    "evaluate.vqa.options.decoding.min_new_tokens=2",  # so little trained, it would say nothing
    *(f"stages.{name}.{key}" for name in ("describe", "answer") for key in ("steps=3", "warmup=1", "batch_size=4")),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its run; tests that change something take a copy of their own."""
    place = tmp_path_factory.mktemp("own")
    for name in ("my_system.py", "my_system.yaml"):
        shutil.copy(EXAMPLES / name, place)
    train(place / "my_system.yaml", place / "run", overrides=LITTLE, progress=False)
    return place


def test_the_example_is_short_and_its_recipe_needs_no_other_model() -> None:
    assert len((EXAMPLES / "my_system.py").read_text(encoding="utf-8").splitlines()) < 150
    recipe = read_recipe(EXAMPLES / "my_system.yaml")
    assert not recipe.parts
    assert system(recipe.model).kind == "my-system"


def test_it_is_opened_and_asked(place: Path) -> None:
    stored = json.loads((place / "run" / "model" / "config.json").read_text(encoding="utf-8"))["kind"]
    assert stored.startswith(f"{place / 'my_system.py'}:MySystem#sha256=")
    model = load(place / "run")
    assert (model.kind, model.net.tap.layers) == ("my-system", (-1,))
    record = open_source(QUESTIONS)[0]
    (answer,) = model.answer_records([record], max_new_tokens=3)
    assert isinstance(answer, str)
    assert len(model.score(record.parts[:-1], ["red", "blue"])) == 2


@torch.no_grad()
def only_generates(net: Any, batch: Batch, decoding: Decoding) -> list[list[int]]:
    return net.language.generate(net.embed_prompt(batch), batch.text["lm"].lengths, decoding)


@pytest.mark.parametrize("continues", [True, False])
def test_it_streams_and_is_served_with_a_prompt_or_without(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, continues: bool
) -> None:
    """A net that only generates gives its answers in one piece."""
    model = load(place / "run")
    if not continues:
        monkeypatch.setattr(type(model.net), "prompt", Net.prompt)
        monkeypatch.setattr(type(model.net), "generate", only_generates)
    assert model.net.continues_prompts == model.net.shares_beginning == continues
    picture = PilImage.effect_noise((64, 64), 60).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    asked = [{"role": "user", "content": content}]
    said_whole = model.chat(asked, min_new_tokens=3, max_new_tokens=3)
    assert "".join(model.stream(asked, min_new_tokens=3, max_new_tokens=3)) == said_whole
    assert len(model.score([picture, "what?"], ["red", "blue"])) == 2
    speaker = speaker_of(model, Limits())
    assert isinstance(speaker, Together if continues else WholeAnswers)
    example = model.processor.prompt(conversation(asked))
    speaker.begin("row", example, Decoding(min_new_tokens=3, max_new_tokens=3), None)
    said: list[int] = []
    while len(said) < 3:
        said += [token.id for token in speaker.step() if token.id is not None]
    assert model.processor.tokenizer.decode(said).strip() == said_whole
    picture.save(tmp_path / "picture.png")
    done = CliRunner().invoke(app, ["chat", str(place / "run"), "--image", str(tmp_path / "picture.png"), "what?"])
    assert done.exit_code == 0, done.output


def test_it_holds_every_contract_and_is_saved_only_with_its_place(place: Path, tmp_path: Path) -> None:
    model = load(place / "run")
    assert {row.name for row in verify(model) if row.verdict == "FAIL"} == set()
    model.system = type(model.system)()
    with pytest.raises(ConfigError, match="does not say in which file it is"):
        model.save(tmp_path / "saved")


def test_it_is_evaluated_and_compared(place: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(place / "run"), "--out", str(tmp_path / "scores")])
    assert done.exit_code == 0, done.output
    assert "gain" in json.loads((tmp_path / "scores" / "vqa" / "scores.json").read_text(encoding="utf-8"))
    tiny_models.MODELS["llava"]().save(tmp_path / "other")
    source = tmp_path / "questions.yaml"
    source.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    words = ["compare", str(place / "run"), str(tmp_path / "other"), "--task", "vqa", "--data", str(source)]
    words += ["--set", "task.decoding={min_new_tokens: 2, max_new_tokens: 4}"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "compared")])
    assert done.exit_code == 0, done.output
    assert {"run", "other"} <= set(json.loads((tmp_path / "compared" / "results.json").read_text())["models"])


def test_changed_code_is_imported_only_when_it_is_named(place: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(place, own)
    changed = own / "my_system.py"
    changed.write_text(changed.read_text(encoding="utf-8") + "\n# another\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="another recipe"):
        train(own / "my_system.yaml", own / "run", overrides=LITTLE, progress=False)
    moved = tmp_path / "elsewhere" / "my_system.py"
    moved.parent.mkdir()
    shutil.copy(own / "my_system.py", moved)
    model = load(own / "run", code=[moved])
    assert str(moved) in model.system.name
    config = own / "run" / "model" / "config.json"
    assert str(place) in config.read_text(encoding="utf-8")


def test_code_in_a_models_own_folder_is_never_imported(place: Path, tmp_path: Path) -> None:
    model = load(place / "run")
    folder = tmp_path / "run"
    inside = folder / "my_system.py"
    model.system = type(model.system)(model.system.name.replace(str(place / "my_system.py"), str(inside)))
    model.save(folder / "model")
    shutil.copy(place / "my_system.py", inside)
    shutil.copy(place / "run" / "run.json", folder)
    for opened in (folder, folder / "model"):
        with pytest.raises(CheckpointError, match="in the model's own folder"):
            load(opened)


def test_a_class_that_is_no_system_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from isthmus.net import Net\nfrom isthmus.systems.base import System\n"
        "class A: pass\nclass B(System): kind = 'b'\n"
        "class D(System): kind, net = 'd', A\nclass ENet(Net): CONFIG = dict\nclass E(System): kind, net = 'e', ENet\n"
    )
    recipe = tmp_path / "r.yaml"
    text = (EXAMPLES / "my_system.yaml").read_text(encoding="utf-8")
    for name, fault in (
        ("A", "is no system"),
        ("B", "does not say its 'net'"),
        ("C", "has no class C"),
        ("D", r"its net must be a class of isthmus\.net\.Net"),
        ("E", "its net ENet must say its CONFIG, a frozen dataclass"),
    ):
        recipe.write_text(text.replace("my_system.py:MySystem", f"mine.py:{name}"), encoding="utf-8")
        with pytest.raises(ConfigError, match=fault):
            system(read_recipe(recipe).model)
