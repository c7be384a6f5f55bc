"""Adapters over a base in 4 bits (QLoRA), with a stand-in for bitsandbytes: what it is asked for, what stays."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from isthmus import adapters, quantised
from isthmus.adapters import Lora
from isthmus.checkpoint import load_tensors, read_json
from isthmus.cli.app import app
from isthmus.errors import CheckpointError, ConfigError, MissingExtraError, StageError
from isthmus.opening import load
from isthmus.processes import world_size
from isthmus.recipes import build as build_module
from isthmus.recipes.build import build, check_parts
from isthmus.recipes.check import check
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from isthmus.stage import Group, Stage, defining_keys
from isthmus.testing.contracts import frozen, saved, tensors
from isthmus.training.parallel import Parallel
from isthmus.training.proof import frozen_tensors
from isthmus.weights import state_tensors
from tests import four_bits
from tests.miniature import tree

LORA = {"pattern": "language.*", "lora": {"rank": 2, "bits": 4, "targets": ["q_proj", "v_proj"]}}
OPEN = {"pattern": "connector.*", "lr": 1e-3}


def recipe(story, *, train=(LORA, OPEN), init=True, stages=None):
    found = tree("llava", story)
    if init:
        found["parts"] = {"init": str(story / "llava")}
    own = found["stages"][-1]
    found["stages"] = [{**own, "name": f"tune-{n}", "train": list(t)} for n, t in enumerate(stages or [train])]
    return parse_recipe(found)


@pytest.fixture(scope="module")
def library():
    with four_bits.standing_in() as found:
        yield found


@pytest.fixture(scope="module")
def tuned(story, library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four-bits") / "run"
    four_bits.Linear4bit.asked.clear()
    train(recipe(story), folder, progress=False)
    return folder, list(four_bits.Linear4bit.asked)


def answers(model):
    return model.score(["what?"], ["red", "a blue cube"])


def test_every_layer_of_the_pattern_but_the_head_is_rounded_once_as_nf4(story, tuned):
    folder, asked = tuned
    base = load(story / "llava").net
    layers = {n: m.weight for n, m in base.language.named_modules() if isinstance(m, torch.nn.Linear)}
    head = [n for n, w in layers.items() if w.shape == base.language.lm.get_input_embeddings().weight.shape]
    told = read_json(folder / "model/config.json")["base"]["quantised"]
    assert sorted(told) == sorted(f"language.{n}" for n in layers if n not in head)
    assert {(a["quant_type"], a["compress_statistics"], a["compute"]) for a in asked} == {("nf4", True, torch.float32)}
    assert len(read_json(folder / "model/adapter_config.json")["target_modules"]) < len(told)


def test_adapters_moved_and_the_folder_opens_as_it_was_trained(story, tuned):
    folder, _ = tuned
    assert all(bool(t.any()) for n, t in load_tensors(folder / "model/adapter_model.safetensors").items())
    rounded, stored, base = load(folder), load(folder, unquantised=True), load(story / "llava")
    assert {lora.bits for lora in adapters.described(rounded.net).values()} == {4}
    assert not quantised.names(stored.net)
    assert answers(rounded) != answers(stored)
    assert answers(rounded) == pytest.approx(answers(stored), rel=0.2)
    counts = [sum(map(quantised.numel, net.parameters())) for net in (rounded.net, stored.net)]
    assert counts[0] == counts[1]
    assert [contract(rounded).verdict for contract in (tensors, saved, frozen)] == ["pass"] * 3
    weights = state_tensors(base.net)
    assert all(
        torch.equal(weights[n], t) for n, t in state_tensors(stored.net).items() if n in weights and "language" in n
    )


def test_weights_in_4_bits_and_their_scales_are_among_what_must_not_move(tuned):
    net = load(tuned[0]).net
    before = frozen_tensors(net)
    layer = net.get_submodule(quantised.names(net)[0])
    layer = getattr(layer, "base_layer", layer)
    assert layer.support_avx512bf16_for_cpu is False  # or an answer would lay the weight out anew
    layer.weight.quant_state.absmax.mul_(2)
    (scales,) = [name for name, digest in frozen_tensors(net).items() if before[name] != digest]
    layer.weight.data.add_(1)
    (weight, again) = sorted(name for name, digest in frozen_tensors(net).items() if before[name] != digest)
    assert (again, scales) == (f"{weight}.absmax", f"{weight}.absmax")


def test_a_merge_is_refused_over_4_bits_and_done_over_the_base_as_stored(tuned, tmp_path):
    words = ["convert", str(tuned[0]), str(tmp_path / "hf"), "--to", "hf", "--merge"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, CheckpointError)
    assert "is quantised (torch.uint8)" in str(done.exception)
    assert "--unquantised" in str(done.exception)
    done = CliRunner().invoke(app, [*words, "--unquantised"])
    assert done.exit_code == 0, done.output
    merged, written = load(tuned[0], unquantised=True), state_tensors(load(tmp_path / "hf").net)
    adapters.merge(merged.net)
    assert all(torch.equal(written[n], t) for n, t in state_tensors(merged.net).items() if "_proj." in n)


def test_check_tries_it_and_further_stages_go_on_with_it(story, library, tmp_path):
    assert check(recipe(story)).problems == ()
    with pytest.raises(StageError, match=r"held in 4 bits since an earlier stage"):
        train(recipe(story, stages=[[LORA], [{"pattern": "language.*", "lr": 1e-3}]]), tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"init": False}, "the net is not the part `init` as it is"),
        ({"stages": [[{"pattern": "language.*", "lr": 1e-3}], [LORA]]}, "was trained by an earlier stage"),
    ],
)
def test_weights_that_no_base_holds_are_not_rounded(story, library, tmp_path, changed, fault):
    with pytest.raises(ConfigError, match=fault):
        train(recipe(story, **changed), tmp_path / "run", progress=False)


def test_without_bitsandbytes_nothing_is_loaded(story, tuned, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(build_module, "load", lambda *a, **k: pytest.fail("a part was opened"))
    for asked in (lambda: train(recipe(story), tmp_path / "run", progress=False), lambda: check(recipe(story))):
        with pytest.raises(MissingExtraError, match=r"needs bitsandbytes.*isthmus\[qlora\].*Take `bits` out.*bf16"):
            asked()
    assert not (tmp_path / "run/run.json").exists()
    with pytest.raises(MissingExtraError, match=r"open over their base as it is stored with unquantised=True"):
        load(tuned[0])
    assert not quantised.names(load(tuned[0], unquantised=True).net)
    with pytest.raises(CheckpointError, match="needs no unquantised"):
        load(story / "llava", unquantised=True)


def test_where_bitsandbytes_fails_it_is_said_with_its_reason(story, library, monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(four_bits.Params4bit, "to", fails)
    with pytest.raises(ConfigError, match=r"fails on this cpu: no kernel image is available\. Take `bits` out"):
        check_parts(recipe(story))


def test_shards_of_4_bits_are_refused(story, library, monkeypatch):
    monkeypatch.setattr(build_module, "world_size", lambda: 2)
    sharded = recipe(story).model_copy(update={"parallel": Parallel(engine="fsdp")})
    with pytest.raises(ConfigError, match="bits: 4 goes with parallel=ddp"):
        build(sharded)
    assert world_size() == 1


def test_bits_are_4_or_left_out_and_older_runs_keep_their_fingerprint():
    with pytest.raises(ConfigError, match="bits is 8; give 4"):
        Lora(bits=8)
    stage = Stage(name="a", steps=1, train=(Group("language.*", lora=Lora(rank=2)),))
    assert "bits" not in json.dumps(stage.to_dict()["train"])
    later = {"train": [{"pattern": "x", "lora": {"rank": 2, "bits": None}}]}
    assert defining_keys(later) == {"train": [{"pattern": "x", "lora": {"rank": 2}}]}
