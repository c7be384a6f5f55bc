"""Adapters through a recipe: trained, saved beside their base, opened, merged, refused over another base."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from isthmus import adapters
from isthmus.checkpoint import load_tensors, read_json
from isthmus.cli.app import app
from isthmus.errors import CheckpointError
from isthmus.interop.hub import model_hash
from isthmus.opening import load
from isthmus.recipes.build import build
from isthmus.recipes.check import check
from isthmus.recipes.facts import net_of, stage_facts
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from isthmus.stage import named_state
from isthmus.weights import state_tensors
from tests.miniature import tree

LORA = {"pattern": "language.*", "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
OPEN = {"pattern": "connector.*", "lr": 1e-3}


def recipe(story, *, init=True, train=(LORA, OPEN)):
    """LLaVA's instruct stage with adapters: on the finished LLaVA of the story, or on its parts."""
    found = tree("llava", story)
    if init:
        found["parts"] = {"init": str(story / "llava")}
        found["stages"] = found["stages"][1:]
    found["stages"][-1]["train"] = list(train)
    return parse_recipe(found)


@pytest.fixture(scope="module")
def tuned(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    train(recipe(story), folder, progress=False)
    return folder


def answers(model):
    return model.score(["what?"], ["red", "a blue cube"])


def test_the_folder_holds_what_moved_and_names_its_base(story, tuned):
    inner = tuned / "model"
    config = read_json(inner / "config.json")
    assert config["base"]["sha256"] == model_hash(story / "llava")
    assert not (inner / "model.safetensors").exists()
    trained = load_tensors(inner / "trained.safetensors")
    base = load_tensors(story / "llava" / "model" / "model.safetensors")
    assert set(trained) == {n for n in base if n.startswith("connector.")}
    peft = read_json(inner / "adapter_config.json")
    assert peft["peft_type"] == "LORA"
    assert peft["r"] == 2
    assert peft["base_model_name_or_path"] == str(story / "llava")
    assert len(load_tensors(inner / "adapter_model.safetensors")) == 2 * len(peft["target_modules"]) > 0


def test_opened_it_is_the_base_with_adapters_on(story, tuned):
    model, base = load(tuned), load(story / "llava")
    state, before = state_tensors(model.net), state_tensors(base.net)
    frozen = {n: t for n, t in before.items() if not n.startswith("connector.")}
    named = {n.replace(".base_layer", ""): t for n, t in state.items()}
    assert all(torch.equal(t, named[n]) for n, t in frozen.items())
    assert any(not torch.equal(t, named[n]) for n, t in before.items() if n.startswith("connector."))
    assert answers(model) != answers(base)
    assert len(adapters.adapted(model.net)) == len(read_json(tuned / "model" / "adapter_config.json")["target_modules"])


def test_merged_and_converted_it_answers_alike(tuned, tmp_path):
    plain = CliRunner().invoke(app, ["convert", str(tuned), str(tmp_path / "no"), "--to", "hf"])
    assert isinstance(plain.exception, CheckpointError)
    assert "--merge" in str(plain.exception)
    done = CliRunner().invoke(app, ["convert", str(tuned), str(tmp_path / "hf"), "--to", "hf", "--merge"])
    assert done.exit_code == 0, done.output
    assert "outputs moved by at most" in done.output
    whole, merged = load(tmp_path / "hf"), load(tuned)
    adapters.merge(merged.net)
    state, written = state_tensors(merged.net), state_tensors(whole.net)
    layers = [name for name in state if "_proj." in name]
    assert layers
    assert all(torch.equal(written[n], state[n]) for n in layers)
    torch.testing.assert_close(torch.tensor(answers(merged)), torch.tensor(answers(load(tuned))), rtol=1e-5, atol=1e-5)


def test_another_base_or_none_is_refused(story, tuned, tmp_path):
    shutil.copytree(tuned / "model", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"is not the base that .* was trained on: .*--base\), it was .*llava"):
        load(tmp_path / "model", base=story / "clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"this holds no weights"):
        load(tmp_path / "model", base=tmp_path / "empty")
    moved = load(tmp_path / "model", base=story / "llava")
    assert answers(moved) == answers(load(tuned))
    with pytest.raises(CheckpointError, match="needs no base"):
        load(story / "llava", base=story / "llava")


def test_a_base_that_is_gone_is_asked_for(story, tuned, tmp_path):
    shutil.copytree(story / "llava", tmp_path / "base")
    train(
        recipe(story).model_copy(update={"parts": {"init": str(tmp_path / "base")}}), tmp_path / "run", progress=False
    )
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"give its place with base=… \(on the command line --base\)"):
        load(tmp_path / "run")
    assert answers(load(tmp_path / "run", base=story / "llava")) == answers(load(tuned))


def test_without_init_the_base_is_written_beside(story, tmp_path):
    model = train(recipe(story, init=False), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "model-base" / "config.json").is_file()
    assert adapters.adapted(model.net)
    (tmp_path / "run").rename(tmp_path / "elsewhere")  # both go together
    assert answers(load(tmp_path / "elsewhere")) == answers(model)


def test_adapters_are_trained_on_by_further_ones(tuned, story, tmp_path):
    found = tree("llava", story)
    found |= {"parts": {"init": str(tuned)}, "stages": [found["stages"][1] | {"train": [LORA]}]}
    whole, mapped = (named_state(build(parse_recipe(found), aside).net) for aside in (None, tmp_path))
    assert all(torch.equal(tensor, mapped[name]) for name, tensor in whole.items())
    model = train(parse_recipe(found), tmp_path / "run", progress=False)
    assert model.base is not None
    assert model.base.path == str(tuned)
    assert answers(model) != answers(load(tuned))


def test_encoder_and_connector_take_adapters_too(story, tmp_path):
    wanted = [
        {"pattern": "vision.*", "lora": {"rank": 1, "dora": True}},
        {"pattern": "connector.*", "lora": {"rank": 3, "dora": True}},
    ]
    model = train(recipe(story, train=wanted), tmp_path / "run", progress=False)
    ranks = {name.split(".")[0]: lora.rank for name, lora in adapters.described(model.net).items()}
    assert ranks == {"vision": 1, "connector": 3}


def test_check_and_show_count_them(story):
    asked = recipe(story)
    assert check(asked).problems == ()
    net, _ = net_of(asked)
    (facts,) = stage_facts(asked, net)
    row = next(r for r in facts.table.rows if r.part == "language")
    assert row.adapters == row.trained > 0
    text = json.dumps(facts.table.to_dict())
    assert '"rank": 2' in text


def test_show_names_a_models_adapters(tuned):
    shown = CliRunner().invoke(app, ["show", str(tuned)])
    assert shown.exit_code == 0
    assert "LoRA of rank 2 on" in " ".join(shown.output.split())
