"""The examples through the real program: trained, loaded, scored; what a changed or moved file says."""

import json
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest

from isthmus.cli import main
from isthmus.data.record import Record, Text
from isthmus.errors import CheckpointError, ConfigError
from isthmus.evaluation import evaluate
from isthmus.opening import load
from isthmus.pretrained import names
from isthmus.user_code import pin, resolve
from tests.evaluation.fakes import facts_of

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Two steps teach no answer, and an evaluation says when all of them are empty.
pytestmark = pytest.mark.filterwarnings("ignore:All .* answers are empty")
SHORT = [
    "stages.describe.steps=2",
    "stages.describe.warmup=0",
    "stages.describe.batch_size=4",
    "stages.describe.save_every=1",
    "tokenizer.samples=60",
    "tokenizer.vocab_size=320",
    "config.language.vocab_size=320",
]


def run(*arguments: object, code: int = 0) -> None:
    """``isthmus ARGUMENTS`` in this process, which ends with the exit code."""
    before, sys.argv = sys.argv, ["isthmus", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    assert (stop.value.code or 0) == code


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the user's files and a model trained with the connector among them."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("my_connector.py", "my_connector.yaml", "my_source.py", "my_task.py"):
        shutil.copy(EXAMPLES / name, folder / name)
    run("train", folder / "my_connector.yaml", *SHORT, "--out", folder / "runs" / "mine")
    return folder


def test_a_connector_is_named_relative_to_the_recipe(place, capsys):
    """By the recipe's folder, not the working folder; options come from the recipe; `show` counts its tokens."""
    model = load(place / "runs" / "mine")
    assert type(model.net.connector).__name__ == "ConvPool"
    assert model.net.connector.after.in_channels == 96
    run("show", place / "runs" / "mine", "--json", place / "facts.json")
    assert json.loads((place / "facts.json").read_text())["visual_tokens"] == 4
    config = json.loads((place / "runs" / "mine" / "model" / "config.json").read_text())["config"]
    name, _, sha = config["projector"]["kind"].partition("#sha256=")
    assert name == f"{place / 'my_connector.py'}:ConvPool"
    assert len(sha) == 64
    assert "4 visual tokens" in capsys.readouterr().out


def test_a_source_and_a_task_are_named_on_the_command_line(place, monkeypatch):
    """Relative to the working folder. Another task's code does not go on in the first one's folder."""
    monkeypatch.chdir(place)
    words = [
        "--task",
        "my_task.py:Counting",
        "--data",
        "my_source.py:Cards",
        "--set",
        "count=12",
        "--set",
        "task.near=9",
    ]
    run("eval", "runs/mine", *words, "--out", "scores", "--json", "scores.json")
    scores = json.loads((place / "scores.json").read_text())["Counting"]
    manifest = json.loads((place / "scores" / "Counting" / "manifest.json").read_text())
    assert 0 < scores["n"] == manifest["items"] < 12
    assert manifest["near"] == 9
    assert manifest["code"].startswith("my_task.py:Counting#sha256=")
    text = (place / "my_task.py").read_text()
    (place / "my_task.py").write_text(text.replace("{1,3}", "{1,2}") + "# changed\n")
    run("eval", "runs/mine", *words, "--out", "scores", code=2)
    (place / "my_task.py").write_text(text)
    run("eval", "runs/mine", *words, "--out", "scores")  # nothing to do


def test_a_users_task_scores_its_folder_again(tmp_path, capsys):
    """Without model and data, by the options that the manifest names; which code did it is said where it is another."""
    file, folder = tmp_path / "my_task.py", tmp_path / "scores"
    shutil.copy(EXAMPLES / "my_task.py", file)
    own = resolve(pin(f"{file}:Counting"))
    task = own(name="counting", records=[counted(n) for n in range(4)], near=2)
    first = facts_of(evaluate(SaysTwo(), task, folder).scores)
    assert {k: v for k, v in first.items() if k != "exact_interval"} == {
        "n": 4,
        "exact": 0.25,
        "near": 1.0,
        "near_interval": (1.0, 1.0),
        "unread": 0,
    }
    assert first["exact_interval"][0] < 0.25 < first["exact_interval"][1]
    (folder / "scores.json").rename(tmp_path / "first.json")
    run("eval", "--rescore", folder, code=2)
    assert "the task Counting of your my_task.py: name that file, --code" in " ".join(capsys.readouterr().err.split())
    run("eval", "--rescore", folder, "--code", file)
    assert (folder / "scores.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    run("eval", "--rescore", folder, "--against", folder, "--code", file)
    assert "exact" in capsys.readouterr().out
    file.write_text(file.read_text().replace("distance <= near", "distance < near"))
    run("eval", "--rescore", folder, "--code", file)
    again = json.loads((folder / "scores.json").read_text())
    assert again["near"] == 0.75
    assert again["code"] == pin(f"{file}:Counting").rpartition("/")[2]


def counted(n: int) -> Record:
    return Record(id=str(n), parts=(Text("How many?", role="user"), Text(str(n), role="assistant", learn=True)))


class SaysTwo:
    def answer_records(self, records, **decoding):
        return ["2 of them" for _ in records]


def test_a_source_and_a_task_in_a_recipe(place, capsys):
    """Trained on and scored by what the recipe names, relative to it; the finished run's own tasks are found again."""
    recipe = (
        (place / "my_connector.yaml")
        .read_text()
        .replace(
            "- {kind: scenes, form: captions, count: 20000}",
            "- {kind: my_source.py:Cards, count: 40}\n      - {kind: my_source.py:Cards, count: 20, seed: 7}",
        )
    )
    recipe += """
evaluate:
  - name: counting
    task: my_task.py:Counting
    data: {kind: my_source.py:Cards, count: 12, seed: 1}
    options: {near: 2}
"""
    (place / "cards.yaml").write_text(recipe)
    run("train", place / "cards.yaml", *SHORT, "--out", place / "runs" / "cards")
    run("eval", place / "runs" / "cards", "--json", place / "own.json")
    found = json.loads((place / "own.json").read_text())["counting"]
    assert set(found) == {"n", "exact", "exact_interval", "near", "near_interval", "unread"}
    capsys.readouterr()
    run(
        "train", place / "cards.yaml", *SHORT, "stages.describe.data.0.cuont=3", "--out", place / "runs" / "bad", code=2
    )
    assert "my_source.py:Cards': unknown option 'cuont'; did you mean 'count'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_goes_on_only_with_the_code_it_began_with(place, tmp_path, capsys):
    """A moved file that says the same is the same code."""
    shutil.copy(place / "my_connector.py", tmp_path / "my_connector.py")
    shutil.copy(place / "my_connector.yaml", tmp_path / "my_connector.yaml")
    run("train", tmp_path / "my_connector.yaml", *SHORT, "--out", place / "runs" / "mine")
    (tmp_path / "my_connector.py").write_text((place / "my_connector.py").read_text() + "# changed\n")
    capsys.readouterr()
    run("train", tmp_path / "my_connector.yaml", *SHORT, "--out", place / "runs" / "mine", code=2)
    assert "holds a run of another recipe" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_moved_or_changed_is_named_with_code(place, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("isthmus_user_")]:
        monkeypatch.delitem(sys.modules, name)  # as in a program that has not imported it yet
    model = tmp_path / "model"
    shutil.copytree(place / "runs" / "mine" / "model", model)
    asked = tmp_path / "asked.yaml"
    asked.write_text("{kind: scenes, form: questions, count: 2}")
    own = place / "my_connector.py"
    text = own.read_text()
    try:
        own.write_text(text + "# changed\n")
        with pytest.raises(ConfigError, match=r"my_connector\.py has changed since .*--code FILE"):
            load(model)
        own.unlink()
        with pytest.raises(ConfigError, match=r"is not at .* any more.*--code FILE"):
            load(model)
        other = shutil.copytree(model, tmp_path / "other")
        pair = ["compare", model, other, "--task", "vqa", "--data", asked, "--limit", 2, "--out", tmp_path / "both"]
        run(*pair, code=2)
        assert "--code FILE" in " ".join(capsys.readouterr().err.split())
        shutil.copy(EXAMPLES / "my_connector.py", tmp_path / "my_connector.py")
        assert load(model, code=tmp_path / "my_connector.py").net.num_tokens(64, 64) == 4
        run("show", model, "--code", tmp_path / "my_connector.py")
        assert "4 visual tokens" in capsys.readouterr().out
        run(*pair, "--code", tmp_path / "my_connector.py")
        assert json.loads((tmp_path / "both" / "results.json").read_text())["models"]["other"]["n"] == 2
    finally:
        own.write_text(text)


def test_code_in_a_models_folder_is_never_imported(place, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(place / "runs" / "mine" / "model", model)
    shutil.copy(place / "my_connector.py", model / "my_connector.py")
    file = model / "config.json"
    file.write_text(file.read_text().replace(str(place / "my_connector.py"), str(model / "my_connector.py")))
    with pytest.raises(CheckpointError, match="the model's own folder"):
        load(model)
    config = json.loads(file.read_text())
    config["config"]["projector"] = "my_connector:ConvPool"  # as runs of earlier versions have it
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"without saying what it was.*--code FILE"):
        load(model)


@pytest.mark.parametrize("name", [p.name for p in sorted(EXAMPLES.glob("my_*.py"))])
def test_examples_are_short(name):
    most = {"my_system.py": 125, "my_patches.py": 125, "my_task.py": 125}.get(name, 100)
    assert len((EXAMPLES / name).read_text().splitlines()) < most


@pytest.mark.skipif(not names(), reason="this installation came without trained models")
def test_the_gradio_page_answers_with_the_models_of_the_package(monkeypatch):
    """Without Gradio, which is no dependency: what it would call, and what it would be told."""
    told = {}
    stub = types.SimpleNamespace(Interface=lambda answer, **options: told.update(options, answer=answer) or "page")
    for part in ("Dropdown", "Image", "Textbox"):
        setattr(stub, part, lambda *values, **options: (values, options))
    monkeypatch.setitem(sys.modules, "gradio", stub)
    space = runpy.run_path(str(EXAMPLES / "gradio_space.py"))
    assert space["page"]() == "page"
    assert told["inputs"][0][0] == (["blip2", "flamingo", "llava"],)
    model, scene, question = told["examples"][0]
    pieces = list(told["answer"](model, scene, question))
    assert pieces[-1] == load("isthmus:llava", device="cpu").answer(scene, question)
    assert list(told["answer"](model, None, question)) == ["Give a picture and a question."]
    assert list(told["answer"]("../llava", scene, question)) == ["There is no such model."]
