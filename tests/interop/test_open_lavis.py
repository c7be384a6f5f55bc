"""A BLIP-2 of LAVIS behind ``isthmus.load``: what is in the file, what is named beside it, and the outputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import isthmus
from isthmus.data.collate import collate
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.lavis import _eva, to_lavis
from isthmus.interop.openai import clip_to_openai
from isthmus.model import Model
from isthmus.models.blip2 import Blip2
from isthmus.models.lm import BareLM, LmConfig
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.testing import probe
from tests.interop import tiny_models
from tests.models.tiny_blip2 import T5, redraw

LANGUAGES = {"opt": tiny_models.OPT, "t5": {**T5, "vocab_size": tiny_models.ROWS}, "llama": tiny_models.LLAMA}


def _file(model, folder, *, without=()):
    """As LAVIS saves a run: what was frozen is often left out."""
    folder.mkdir(exist_ok=True)
    kind = (model.net.config.language or {"model_type": "opt"})["model_type"]
    state = to_lavis(model.net.state_dict(), kind)
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith(tuple(without))}}, folder / "model.pth")
    return folder / "model.pth"


def _bert(folder):
    folder.mkdir()
    for name, text in tiny_models.words().files().items():
        (folder / name).write_text(text)
    return folder


def _same(ours: Model, theirs: Model) -> float:
    worst = 0.0
    for example in probe.prompts(ours, probe.WORDS, (1, 2, 3)):
        whole = probe.answered(ours, example, [5, 6]) if "encoder" in example.streams else example
        (a,), (b,) = (probe.outputs(m, collate([whole])) for m in (ours, theirs))
        worst = max(worst, float((a - b).abs().max()))
    return worst


@pytest.mark.parametrize("kind", LANGUAGES)
def test_the_second_stage_takes_its_language_model_from_a_folder(kind, tmp_path):
    model = tiny_models.lavis(LANGUAGES[kind])
    file = _file(model, tmp_path / "run", without=("opt_model.", "t5_model.", "llm_model."))
    again = isthmus.load(file, language=tiny_models.save_language(model, tmp_path / "lm"))
    state, found = model.net.state_dict(), again.net.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[n], state[n]) for n in state)
    assert _same(model, again) == 0
    asked = "Question: {} Short answer:" if kind == "t5" else "Question: {} Answer:"
    assert again.processor.to_dict()["question"] == asked
    assert again.net.config.qformer.dropout == 0.1


def test_a_file_that_holds_its_language_model_keeps_it(tmp_path):
    model = tiny_models.lavis()
    other = tiny_models.lavis()
    redraw(other.net, std=0.3)
    again = isthmus.load(_file(model, tmp_path / "run"), language=tiny_models.save_language(other, tmp_path / "lm"))
    assert torch.equal(
        again.net.state_dict()["language.lm.lm_head.weight"], model.net.state_dict()["language.lm.lm_head.weight"]
    )


def test_the_first_stage_reads_with_berts_tokenizer(tmp_path):
    model = tiny_models.lavis(None)
    file = _file(model, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"needs BERT's tokenizer.*give tokenizer=.*--tokenizer"):
        isthmus.load(file)
    again = isthmus.load(file, tokenizer=_bert(tmp_path / "bert"))
    assert all(torch.equal(again.net.state_dict()[n], t) for n, t in model.net.state_dict().items())
    assert again.match(probe.picture(1), "a red cube") == model.match(probe.picture(1), "a red cube")
    written = write_model(model, tmp_path / "out", "lavis").folder
    assert torch.equal(isthmus.load(written / "model.pth").embed_texts(["a cube"]), model.embed_texts(["a cube"]))


def test_instructblip_needs_both_tokenizers(tmp_path):
    model = tiny_models.lavis(tiny_models.LLAMA, instruct=True)
    file, lm = (
        _file(model, tmp_path / "run", without=("llm_model.",)),
        tiny_models.save_language(model, tmp_path / "lm"),
    )
    with pytest.raises(CheckpointError, match="BERT's tokenizer"):
        isthmus.load(file, language=lm)
    again = isthmus.load(file, language=lm, tokenizer=_bert(tmp_path / "bert"))
    assert again.net.config.instruct
    assert _same(model, again) == 0


def test_an_encoder_left_out_is_taken_from_a_model_or_from_evas_own_file(tmp_path):
    model = tiny_models.lavis()
    lm = tiny_models.save_language(model, tmp_path / "lm")
    file = _file(model, tmp_path / "run", without=("opt_model.", "visual_encoder."))
    with pytest.raises(CheckpointError, match=r"holds no vision encoder: give vision="):
        isthmus.load(file, language=lm)
    model.save(tmp_path / "whole")
    eva = {n.removeprefix("visual_encoder."): t for n, t in to_lavis(model.net.state_dict()).items() if "visual" in n}
    more = f"blocks.{model.net.config.vision.layers}."
    last = {n.replace("blocks.0.", more): t for n, t in eva.items() if "blocks.0." in n}
    torch.save(eva | last | {"norm.weight": torch.ones(88), "head.weight": torch.ones(4, 88)}, tmp_path / "eva.pth")
    for source in ("whole", "eva.pth"):
        again = isthmus.load(file, language=lm, vision=tmp_path / source)
        assert all(torch.equal(again.net.state_dict()[n], t) for n, t in model.net.state_dict().items())


def _over_clip() -> tuple[Model, Model]:
    """A BLIP-2 over CLIP's tower without its last block, and the whole CLIP that it came from."""
    whole = tiny_models.openai_clip()
    vision = replace(whole.net.config.vision, layers=2, post_norm="none", pool="none")
    qformer = replace(tiny_models.lavis().net.config.qformer, vision_width=vision.width)
    net = Blip2(replace(tiny_models.lavis().net.config, vision=vision, qformer=qformer))
    redraw(net)
    net.vision.load_state_dict({n: t for n, t in whole.net.vision.state_dict().items() if n in net.vision.state_dict()})
    return Model(net, tiny_models.lavis().processor), whole


@pytest.mark.parametrize("inside", [True, False])
def test_clips_tower_as_encoder(inside, tmp_path):
    """In the file under OpenAI's names, or left out and named: a whole CLIP, which is read before its last block."""
    model, whole = _over_clip()
    lm = tiny_models.save_language(model, tmp_path / "lm")
    rest = {n: t for n, t in model.net.state_dict().items() if not n.startswith(("vision.", "language."))}
    state = to_lavis(rest)
    more = {}
    if inside:
        names = clip_to_openai(whole.net.state_dict(), whole.net.config)
        names = {n: t for n, t in names.items() if n.startswith("visual.")}
        kept = {n: t for n, t in names.items() if "resblocks.2." not in n and "ln_post" not in n and n != "visual.proj"}
        state |= {f"visual_encoder.{n.removeprefix('visual.')}": t for n, t in kept.items()}
    else:
        whole.save(tmp_path / "clip")
        more = {"vision": tmp_path / "clip"}
    torch.save({"model": state}, tmp_path / "model.pth")
    again = isthmus.load(tmp_path / "model.pth", language=lm, **more)
    assert again.net.config.vision == model.net.config.vision
    assert all(torch.equal(again.net.state_dict()[n], t) for n, t in model.net.state_dict().items())


def test_what_does_not_belong_is_named(tmp_path):
    model = tiny_models.lavis()
    lm = tiny_models.save_language(model, tmp_path / "lm")
    file = _file(model, tmp_path / "run")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"vision": lm}, "needs no vision"),
        ({"tokenizer": lm}, "needs no tokenizer"),
        ({"activation": "gelu"}, "needs no activation"),
    ]
    for more, told in refused:
        with pytest.raises(CheckpointError, match=told):
            isthmus.load(file, language=lm, **more)
    with pytest.raises(CheckpointError, match="holds no language model's sizes: give language="):
        isthmus.load(file)
    state = torch.load(file, weights_only=True)["model"]
    torch.save({"model": {**state, "visual_encoder.extra": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match=r"visual_encoder\.extra"):
        isthmus.load(file, language=lm)
    torch.save({"model": {n: t for n, t in state.items() if n != "ln_vision.bias"}}, file)
    with pytest.raises(CheckpointError, match=r"lacks 'connector\.norm\.bias'"):
        isthmus.load(file, language=lm)


def test_a_language_model_of_another_width_is_refused(tmp_path):
    model = tiny_models.lavis()
    narrow = BareLM(LmConfig(language={**tiny_models.OPT, "hidden_size": 16, "word_embed_proj_dim": 16}))
    other = tiny_models.save_language(Model(narrow, tiny_models.lm().processor), tmp_path / "lm")
    file = _file(model, tmp_path / "run", without=("opt_model.",))
    with pytest.raises(CheckpointError, match=r"connector\.projection"):
        isthmus.load(file, language=other)


def test_the_published_encoder_by_its_shapes():
    """EVA's ViT-g as LAVIS's file has it."""
    with torch.device("meta"):
        state = VisionTransformer(VisionConfig.eva_g_14()).state_dict()
    names = to_lavis({f"vision.{n}": t for n, t in state.items() if not n.endswith("k_proj.bias")})
    assert _eva(names) == VisionConfig.eva_g_14()
