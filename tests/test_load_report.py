"""The account of a checkpoint's tensors: every one of the net is in it, every exception has a reason."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import isthmus
from isthmus.interop.convert import write_model
from isthmus.interop.lavis import to_lavis
from tests.interop import tiny_models
from tests.interop.round_trips import CASES, key_columns


def _tensors(net) -> int:
    return len({id(tensor) for tensor in net.state_dict(keep_vars=True).values()})


def _counted(report) -> int:
    return report.matched + report.converted + report.from_parts + len(report.absent)


@pytest.mark.parametrize("case", CASES, ids=key_columns)
def test_every_tensor_of_the_net_is_accounted_for(case, tmp_path, monkeypatch):
    reports = []
    load = isthmus.load
    monkeypatch.setattr(isthmus, "load", lambda *a, **k: reports.append(load(*a, **k)) or reports[-1])
    model = case.make()
    write_model(model, tmp_path / "out", case.to, lossy=case.lossy)
    case.back(tmp_path / "out", model)
    report = reports[-1].report
    assert _counted(report) == _tensors(reports[-1].net)
    assert report.matched > 0
    assert min(report.converted, report.from_parts) >= 0
    if case.to == "isthmus":
        assert (report.converted, report.from_parts, report.absent, report.ignored) == (0, 0, {}, {})
    joint = ("SigLIP", "Image encoder, SigLIP", "InstructBLIP", "BLIP-2")  # q, k and v in one matrix there
    splits = case.to in ("openai", "open_clip", "lavis", "open_flamingo") or case.model.startswith(joint)
    assert (report.converted > 0) == (splits and case.to != "isthmus"), str(report)


def test_what_is_absent_and_what_is_unused_is_named_with_its_reason(tmp_path):
    model = tiny_models.lavis()
    lm = tiny_models.save_language(model, tmp_path / "lm")
    state = to_lavis(model.net.state_dict())
    torch.save({"model": {**state, "Qformer.bert.embeddings.position_ids": torch.arange(4)[None]}}, tmp_path / "a.pth")
    report = isthmus.load(tmp_path / "a.pth", language=lm).report
    assert report is not None
    assert report.ignored == {"Qformer.bert.embeddings.position_ids": "made anew, or the word table once more"}
    blocks = model.net.config.vision.layers
    assert set(report.absent) == {f"vision.blocks.{i}.attn.k_proj.bias" for i in range(blocks)}
    assert "keys have no bias" in str(report)


def test_parts_named_beside_a_checkpoint_are_told_apart(tmp_path):
    model = tiny_models.flamingo()
    folder = write_model(model, tmp_path / "out", "open_flamingo").folder
    parts: dict[str, Any] = {"vision": folder / "vision_encoder", "language": folder / "lang_encoder"}
    report = isthmus.load(folder / "checkpoint.pt", **parts).report
    assert report is not None
    frozen = _tensors(model.net.vision) + _tensors(model.net.language.lm)
    assert report.from_parts == frozen
    assert _counted(report) == _tensors(model.net)


def test_a_half_precision_file_is_matched_and_an_old_buffer_unused(tmp_path):
    write_model(tiny_models.openai_clip(), tmp_path / "out", "hf")
    state = {n: t.half() for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    old = {f"{side}_model.embeddings.position_ids": torch.arange(5)[None] for side in ("vision", "text")}
    save_file(state | old, tmp_path / "out" / "model.safetensors")
    report = isthmus.load(tmp_path / "out", dtype=torch.float64).report
    assert report is not None
    assert (report.matched, report.converted) == (len(state), 0)
    assert set(report.ignored) == set(old)
