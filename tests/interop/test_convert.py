"""`isthmus convert`: every format there and back, what is refused, how a folder is written."""

import json
import pickletools
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PilImage
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import isthmus
from isthmus.checkpoint import Foreign, read_folder
from isthmus.data.clip_tokenizer import IDS
from isthmus.data.images import ImageTransform
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.convert import write_model
from isthmus.interop.formats import FORMATS
from isthmus.interop.hf_llava import llava_config_to_hf, llava_to_hf
from isthmus.model import Model
from isthmus.models.llava import Llava
from isthmus.models.llava import LlavaConfig as OurConfig
from isthmus.testing.peer import compare
from tests.interop import tiny_models
from tests.interop.round_trips import CASES, Case, key_columns, run
from tests.narrow import there

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


@pytest.mark.parametrize("case", CASES, ids=[f"{c.model} to {c.to}" for c in CASES])
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path / "model")
    assert found.equal == found.tensors > 20
    assert found.ours <= 1e-4
    assert found.theirs is None or found.theirs <= 1e-4
    assert found.tokens[0] == found.tokens[1]
    read_folder(tmp_path / "model")  # every file's sha256 stands in the manifest


def test_the_page_tells_every_case() -> None:
    page = PAGE.read_text(encoding="utf-8")
    told = [" | ".join(line.split(" | ")[:3]) + " |" for line in page.splitlines() if line.count("|") == 8]
    assert told[2:] == [key_columns(case) for case in CASES]
    assert {case.to for case in CASES} == set(FORMATS)
    assert all(f"| `{name}` |" in page for name in FORMATS)


def layout_a(config: OurConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of llava-hf's published files, written out from their index."""
    width, hidden = config.language["hidden_size"], config.language["intermediate_size"]
    rows, v = config.language["vocab_size"], config.vision
    found: dict[str, tuple[int, ...]] = {
        "language_model.lm_head.weight": (rows, width),
        "language_model.model.embed_tokens.weight": (rows, width),
        "language_model.model.norm.weight": (width,),
        "multi_modal_projector.linear_1.weight": (width, v.width),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    for n in range(config.language["num_hidden_layers"]):
        at = f"language_model.model.layers.{n}"
        found |= {f"{at}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        found |= {f"{at}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (width, hidden)
        found |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    tower = "vision_tower.vision_model"
    found |= {
        f"{tower}.embeddings.class_embedding": (v.width,),
        f"{tower}.embeddings.patch_embedding.weight": (v.width, 3, v.patch_size, v.patch_size),
        f"{tower}.embeddings.position_embedding.weight": (v.tokens, v.width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{tower}.{norm}.{leaf}": (v.width,) for leaf in ("weight", "bias")}
    for n in range(v.layers):
        at = f"{tower}.encoder.layers.{n}"
        for part in ("q", "k", "v", "out"):
            found |= {f"{at}.self_attn.{part}_proj.weight": (v.width, v.width)}
            found |= {f"{at}.self_attn.{part}_proj.bias": (v.width,)}
        found |= {f"{at}.layer_norm{k}.{leaf}": (v.width,) for k in (1, 2) for leaf in ("weight", "bias")}
        found |= {f"{at}.mlp.fc1.weight": (v.mlp_width, v.width), f"{at}.mlp.fc1.bias": (v.mlp_width,)}
        found |= {f"{at}.mlp.fc2.weight": (v.width, v.mlp_width), f"{at}.mlp.fc2.bias": (v.width,)}
    return found


def test_llava_is_written_in_the_layout_of_published_files_key_by_key() -> None:
    config = OurConfig.v1_5_7b(32064)
    with torch.device("meta"):
        state = Llava(config).state_dict()
        theirs = LlavaForConditionalGeneration(LlavaConfig.from_dict(llava_config_to_hf(config, image_token_id=32000)))
    written = llava_to_hf(state, config)
    assert {name: tuple(t.shape) for name, t in written.items()} == layout_a(config)
    numbers = sum(t.numel() for t in written.values())
    assert numbers == sum(t.numel() for t in theirs.state_dict().values()) == 7_063_427_072


def test_large_weights_are_written_in_shards(tmp_path: Path) -> None:
    model = tiny_models.llava()
    write_model(model, tmp_path / "hf", "hf", shard_bytes=200_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-0000{len(files)}.safetensors"
    assert all((tmp_path / "hf" / f).stat().st_size < 220_000 for f in files)
    assert set(index["weight_map"]) == {name for f in files for name in load_file(tmp_path / "hf" / f)}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.net.parameters())
    assert compare(model, tmp_path / "hf").difference <= 1e-4
    again = isthmus.load(tmp_path / "hf").net.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in model.net.state_dict().items())


def test_where_shards_were_asked_for_weights_in_one_file_are_told(tmp_path: Path) -> None:
    model = tiny_models.llava()
    for to, wanted in (("isthmus", 1), ("hf", 0)):
        done = write_model(model, tmp_path / to, to, shard_bytes=200_000)
        notes = [note for note in done.notes if "--shard-size" in note]
        assert len(notes) == wanted
        assert all("model.safetensors has 0." in note and "keeps its weights in one file" in note for note in notes)
    assert not any("--shard-size" in note for note in write_model(model, tmp_path / "unasked", "isthmus").notes)


def test_pickled_files_hold_plain_tensors_only(tmp_path: Path) -> None:
    model = tiny_models.lavis()
    held = sum(t.numel() * t.element_size() for t in model.net.state_dict().values())
    write_model(model, tmp_path / "lavis", "lavis")
    write_model(tiny_models.published_clip(), tmp_path / "openai", "openai")
    write_model(tiny_models.flamingo(), tmp_path / "flamingo", "open_flamingo")
    for file in ("lavis/model.pth", "openai/model.pt", "flamingo/checkpoint.pt"):
        torch.load(tmp_path / file, weights_only=True)
        with zipfile.ZipFile(tmp_path / file) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            named = {str(a) for op, a, _ in pickletools.genops(archive.read(name)) if op.name == "GLOBAL"}
        assert named <= {
            "torch._utils _rebuild_tensor_v2",
            "torch FloatStorage",
            "torch LongStorage",
            "collections OrderedDict",
        }
    assert (tmp_path / "lavis" / "model.pth").stat().st_size < 1.2 * held  # no storage behind a view comes along


def test_a_clip_with_end_of_text_2_keeps_its_numbers(tmp_path: Path) -> None:
    """transformers takes that id for another rule, so it is given another one, in table and tokenizer alike."""
    model = tiny_models.clip()
    assert model.net.config.text.eot_id == 2
    write_model(model, tmp_path / "hf", "hf")
    again = isthmus.load(tmp_path / "hf")
    assert again.net.config.text.eot_id == again.processor.tokenizer.eos_id == model.processor.tokenizer.vocab_size - 1
    texts = ["a red cube", "two small balls"]
    torch.testing.assert_close(again.embed_texts(texts), model.embed_texts(texts), atol=0, rtol=0)
    assert compare(model, tmp_path / "hf").difference <= 1e-4


def test_a_blip2_for_retrieval_matches_and_does_not_write(tmp_path: Path) -> None:
    model = tiny_models.blip2(None)
    write_model(model, tmp_path / "hf", "hf", lossy=True)
    again = isthmus.load(tmp_path / "hf")
    assert again.capabilities == ("embed_images", "embed_texts", "similarity", "match")
    image = PilImage.new("RGB", (40, 32), "red")
    assert again.match(image, "a red cube") == pytest.approx(model.match(image, "a red cube"), abs=1e-6)


def test_an_unknown_filter_is_refused(tmp_path: Path) -> None:
    write_model(tiny_models.clip(), tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    values = json.loads(file.read_text())
    for number, name in ((2, "bilinear"), (None, "bicubic")):
        file.write_text(json.dumps(values | {"resample": number}))
        assert there(isthmus.load(tmp_path / "hf").processor.image).resample == name
    file.write_text(json.dumps(values | {"resample": 1}))
    with pytest.raises(CheckpointError, match="filter 1"):
        isthmus.load(tmp_path / "hf")


def test_the_template_comes_back(tmp_path: Path) -> None:
    for name in ("vicuna_bare", "llava_v1", "plain"):
        write_model(tiny_models.llava(template=name, mode="pad"), tmp_path / name, "hf")
        again = isthmus.load(tmp_path / name).processor
        assert (again.template, there(again.image).mode) == (name, "pad")
    write_model(tiny_models.lm(template="vicuna_bare"), tmp_path / "lm", "hf")
    assert isthmus.load(tmp_path / "lm").processor.template == "vicuna_bare"


def test_what_the_original_llava_has_no_place_for_is_told(tmp_path: Path) -> None:
    """Such a model is asked by its file's kind: trained in other words it would answer worse, and nobody would know."""
    for name, model in (
        ("llava_v1", tiny_models.llava(template="llava_v1")),
        ("vicuna_bare", tiny_models.llava(template="vicuna_bare")),
        ("plain", tiny_models.llava(template="plain")),
        ("vicuna_v1", tiny_models.llava(projector="linear")),
        ("paper", tiny_models.flamingo(template="paper")),
    ):
        to = "open_flamingo" if model.kind == "flamingo" else "original"
        with pytest.raises(CheckpointError, match=f"processor.template '{name}'"):
            write_model(model, tmp_path / name, to)
        (loss,) = write_model(model, tmp_path / name, to, lossy=True).losses
        assert loss.startswith("processor.template")


def test_what_ends_an_answer_comes_back_from_the_original_layout(tmp_path: Path) -> None:
    model = tiny_models.llava()
    model.processor.stop_ids = (311, 7)
    write_model(model, tmp_path / "out", "original")
    assert isthmus.load(tmp_path / "out").processor.stop_ids == (7, 311)


def test_the_original_layout_is_without_transformers_token_for_a_picture(tmp_path: Path) -> None:
    """And without the padding behind it: their code could write those tokens, and never reads them."""
    write_model(tiny_models.llava(), tmp_path / "hf", "hf")
    model = isthmus.load(tmp_path / "hf")
    (image,) = model.forbidden
    assert image < model.net.language.vocab_size - 1
    write_model(model, tmp_path / "original", "original")
    again = isthmus.load(tmp_path / "original")
    ours, back = model.net.state_dict(), again.net.state_dict()
    assert again.net.language.vocab_size == image == again.processor.tokenizer.vocab_size
    assert again.forbidden == ()
    cut = {name for name in ours if ours[name].shape != back[name].shape}
    assert cut == {"language.lm.model.embed_tokens.weight", "language.lm.lm_head.weight"}
    assert all(torch.equal(ours[name][: len(back[name])] if name in cut else ours[name], back[name]) for name in ours)
    picture = PilImage.effect_noise((40, 30), 90).convert("RGB")
    assert model.answer(picture, "what?", max_new_tokens=8) == again.answer(picture, "what?", max_new_tokens=8)


def test_a_token_in_use_behind_that_of_a_picture_is_not_cut_off(tmp_path: Path) -> None:
    model = tiny_models.llava()
    model.processor.tokenizer = model.processor.tokenizer.with_tokens("<image>", "<end_of_turn>")
    model.forbidden = (model.processor.tokenizer.id_of("<image>"),)
    with pytest.raises(CheckpointError, match=rf"forbidden \[{model.forbidden[0]}\]: their code may write"):
        write_model(model, tmp_path / "out", "original")
    write_model(model, tmp_path / "out", "original", lossy=True)
    assert isthmus.load(tmp_path / "out").forbidden == model.forbidden


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_open_flamingos_tables_are_as_long_as_its_tokenizer_makes_them(tmp_path: Path, padded: bool, pad: bool) -> None:
    """Their factory resizes them to the tokenizer and <PAD>, and load_state_dict then fails on any other shape."""
    tokens = tiny_models.tokenizer().vocab_size
    language = {**tiny_models.NEOX, "vocab_size": tiny_models.ROWS if padded else tokens, "tie_word_embeddings": False}
    model = tiny_models.flamingo(language=language)
    told = model.processor.tokenizer
    if not pad:
        model.processor.tokenizer = told = Tokenizer(told.backend, eos="</s>", bos="<s>")
    write_model(model, tmp_path / "out", "open_flamingo")
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    tables = {name: len(t) for name, t in state.items() if "embed" in name}
    rows = told.vocab_size + (not pad)
    assert tables == {"lang_encoder.gpt_neox.embed_in.weight": rows, "lang_encoder.embed_out.weight": rows}
    assert rows == tokens + (2 if pad else 3)
    parts: dict[str, Any] = {
        "vision": tmp_path / "out" / "vision_encoder",
        "language": tmp_path / "out" / "lang_encoder",
    }
    again = isthmus.load(tmp_path / "out" / "checkpoint.pt", **parts)
    assert all(torch.equal(t, again.net.state_dict()[name]) for name, t in model.net.state_dict().items())


def test_open_clip_reads_texts_by_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    """Without a name it takes CLIP's own, whose ids mean nothing to a model with another vocabulary."""
    for name, make, told in (("own", tiny_models.clip, "."), ("published", tiny_models.published_clip, None)):
        model = make()
        write_model(model, tmp_path / name, "open_clip")
        described = json.loads((tmp_path / name / "open_clip_config.json").read_text())["model_cfg"]
        assert described["text_cfg"].get("hf_tokenizer_name") == told
        again, texts = isthmus.load(tmp_path / name), ["a red cube", "fish &amp; chips"]
        assert torch.equal(again.embed_texts(texts), model.embed_texts(texts))


def test_the_card_tells_stages_data_and_scores(story: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    for place in ("model", "eval/vqa"):
        (run_folder / place).mkdir(parents=True)
    (run_folder / "model" / "recipe.yaml").write_text((story / "llava" / "model" / "recipe.yaml").read_text())
    (run_folder / "eval" / "vqa" / "scores.json").write_text('{"task": "vqa", "accuracy": 0.25, "kinds": {}}')
    write_model(isthmus.load(story / "llava"), tmp_path / "hf", "hf", origin=run_folder)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"isthmus {isthmus.__version__}" in card
    assert "| align | 3 steps | `connector.*` | scenes form captions count 40 |" in card
    assert "| vqa | accuracy 0.25 |" in card
    assert "Prompt of the task caption: `describe the picture.`" in card
    assert str(tmp_path) not in card
    assert "transformers.LlavaForConditionalGeneration" in card


def other_heads() -> Model:
    model = tiny_models.lavis()
    model.net.config = replace(model.net.config, qformer=replace(model.net.config.qformer, heads=2))
    return model


def clip_of_77(rows: int, **text: int) -> Model:
    return tiny_models.clip(text=replace(tiny_models.clip().net.config.text, context=77, vocab_size=rows, **text))


def asked_in(model: Model, **words: str) -> Model:
    """A BLIP-2 that was trained in other words than the published ones."""
    for name, value in words.items():
        setattr(model.processor, name, value)
    return model


GRANITE = {**tiny_models.LLAMA, "model_type": "granite", "logits_scaling": 8.0}
"""Its own class divides the logits; transformers' LLaVA over it does not."""

REFUSED = {
    "qformer.heads": (other_heads, "lavis"),
    "similarity": (lambda: tiny_models.clip(similarity="dot"), "hf"),
    "language.num_key_value_heads": (tiny_models.flamingo, "hf"),
    "projector": (lambda: tiny_models.llava(projector="linear"), "hf"),
    "language.model_type": (lambda: tiny_models.llava(language=GRANITE), "hf"),
    "processor.image.mode": (lambda: tiny_models.llava(mode="squash"), "original"),
    "vision.activation": (
        lambda: tiny_models.clip(vision=replace(tiny_models.VISION, activation="gelu")),
        "openai",
    ),
    "vision.heads": (lambda: tiny_models.clip(vision=replace(tiny_models.VISION, heads=4)), "openai"),
    "text.activation": (
        lambda: tiny_models.clip(vision=replace(tiny_models.VISION, activation="gelu")),
        "open_clip",
    ),
    "vision.class_token": (tiny_models.siglip, "openai"),
    "text.context": (tiny_models.openai_clip, "openai"),
    "text.vocab_size": (lambda: clip_of_77(tiny_models.ROWS), "openai"),
    "processor.tokenizer": (lambda: clip_of_77(IDS, eot_id=IDS - 1), "openai"),
    "vision.width": (tiny_models.siglip, "open_clip"),
    "feature_layer": (lambda: tiny_models.llava(feature_layer=(1, -2)), "original"),
    "offset": (lambda: tiny_models.flamingo(offset=0), "open_flamingo"),
    "media": (lambda: tiny_models.flamingo(media="all"), "open_flamingo"),
    "feature_layer -2": (lambda: tiny_models.flamingo(feature_layer=-2), "open_flamingo"),
    "patch_positions": (lambda: tiny_models.flamingo(patch_positions=True), "open_flamingo"),
    "patch_positions of BLIP-2": (lambda: tiny_models.lavis(patch_positions=True), "lavis"),
    "patch_positions in transformers": (lambda: tiny_models.blip2(None, patch_positions=True), "hf"),
    "norm_eps": (lambda: tiny_models.lavis(norm_eps=1e-6), "lavis"),
    "heads.temperature": (lambda: tiny_models.blip2(None), "hf"),
    "processor.question": (lambda: asked_in(tiny_models.blip2(), question="USER: {} ASSISTANT:"), "hf"),
    "processor.end": (lambda: asked_in(tiny_models.lavis(), end="eos"), "lavis"),
    "processor.prompt": (lambda: asked_in(tiny_models.lavis(), prompt_text=""), "lavis"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_the_fields_name(field: str, tmp_path: Path) -> None:
    make, to = REFUSED[field]
    with pytest.raises(CheckpointError, match=rf"{field.split()[0]}\b"):
        write_model(make(), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_losses_are_named_and_wanted(tmp_path: Path) -> None:
    model = tiny_models.blip2(None)
    done = write_model(model, tmp_path / "hf", "hf", lossy=True)
    assert [loss.split(":")[0] for loss in done.losses] == ["heads.temperature", "heads.lm_*"]
    assert "heads.temperature" in (tmp_path / "hf" / "README.md").read_text()
    aspect = tiny_models.clip()
    aspect.processor.image = ImageTransform(size=32, mode="aspect", patch=8)
    with pytest.raises(CheckpointError, match=r"processor\.image\.mode is 'aspect'"):
        write_model(aspect, tmp_path / "no", "hf")


def test_nothing_is_written_over_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.published_clip()
    write_model(model, tmp_path / "out", "openai")
    for to in ("openai", "isthmus"):
        with pytest.raises(CheckpointError, match="--replace"):
            write_model(model, tmp_path / "out", to)
    write_model(model, tmp_path / "out", "isthmus", replace=True)
    assert isthmus.load(tmp_path / "out").kind == "clip"
    for name in ("data", "manifest"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("manifest.json" if name == "manifest" else "photo.jpg")).write_text("{}")
        with pytest.raises(CheckpointError, match="no folder that isthmus wrote"):
            write_model(model, tmp_path / name, "hf", replace=True)
        assert len(list((tmp_path / name).iterdir())) == 1
        shutil.rmtree(tmp_path / name)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.interop.openai.pickled", lambda content: Foreign(full, 10))
    with pytest.raises(CheckpointError, match="No space"):
        write_model(model, tmp_path / "other", "openai")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_formats_and_kinds_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'open_clip'"):
        write_model(tiny_models.clip(), tmp_path / "x", "openclip")
    with pytest.raises(
        CheckpointError,
        match="format lavis; it can in isthmus, hf, openai, open_clip",
    ):
        write_model(tiny_models.clip(), tmp_path / "x", "lavis")
