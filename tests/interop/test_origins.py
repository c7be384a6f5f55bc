"""Checkpoints of the original code bases behind ``isthmus.load``: told by content, strict, saying what they lack."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image as PilImage
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import isthmus
from isthmus.checkpoint import write_folder
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.interleave import InterleaveProcessor
from isthmus.data.record import Image, Record, Text
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.given import Given
from isthmus.interop.hf_clip import clip_config_to_hf, clip_to_hf
from isthmus.interop.open_clip import clip_to_open_clip
from isthmus.interop.open_flamingo import trained_to_open_flamingo
from isthmus.interop.openai import SCALARS, clip_config_from_openai, clip_to_openai
from isthmus.interop.original_llava import llava_to_original
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig
from tests.fixtures import OPEN_CLIP
from tests.interop import tiny_models
from tests.narrow import must_be, there

WORDS = ("a", "red", "blue", "cube", "ring", "what", "is", "it", "USER", "ASSISTANT", ":", "?", ".")


def words(folder: Path, size: int = 64) -> Path:
    """A tokenizer of whole words, in a folder of its own."""
    known = ("<unk>", "<s>", *WORDS, *(f"w{i}" for i in range(size)))
    vocab = {word: i for i, word in enumerate((*known[: size - 1], "</s>"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    Tokenizer(backend, bos="<s>", eos="</s>", unk="<unk>").save(folder)
    return folder


def drawn(net, seed: int = 0):
    """Every number anew, so that nothing stands at 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.normal_(0.05 if parameter.ndim < 2 else 0.0, 0.15, generator=generator)
    return net.eval()


VISION = VisionConfig(image_size=28, patch_size=14, width=64, heads=1, layers=2, mlp_width=96)
LM = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def clip() -> Clip:
    text = TextConfig(context=12, vocab_size=64, width=64, heads=1, layers=2, mlp_width=96, pool="argmax", eot_id=63)
    return drawn(Clip(ClipConfig(vision=VISION, text=text, embed_dim=32)))


@pytest.fixture
def picture() -> PilImage.Image:
    return PilImage.effect_noise((40, 30), 90).convert("RGB")


def same(found, expected) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in found.state_dict().items())


def scripted(state: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """A scripted module whose tensors have these dotted names."""

    class Part(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Part()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        part = root
        for step in path:
            if step not in part._modules:
                part.add_module(step, Part())
            part = must_be(Part, part._modules[step])
        part.register_buffer(leaf, tensor)
    return torch.jit.script(root)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["state", "torchscript", "trainer"])
def test_openai_files_with_and_without_torchscript(clip, picture, tmp_path, kind):
    state = clip_to_openai(clip.state_dict(), clip.config)
    path = tmp_path / "ViT-X.bin"
    if kind == "torchscript":
        scripted(state).save(str(path))
    else:
        torch.save(
            state if kind == "state" else {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path
        )
    model = isthmus.load(path, tokenizer=words(tmp_path / "words"))
    same(model.net, clip)
    assert model.net.config.vision.activation == "quick_gelu"  # OpenAI's own sizes are among the weights
    expected = torch.nn.functional.normalize(
        clip.embed_images(there(model.processor.image)(picture)[None]).detach(), dim=-1
    )
    torch.testing.assert_close(model.embed_images([picture]), expected, atol=1e-6, rtol=0)
    assert model.embed_texts(["a red cube"]).isfinite().all()


def test_weights_that_do_not_tell_their_activation_ask_for_it(clip, tmp_path):
    state = clip_to_openai(clip.state_dict(), clip.config)
    bare = {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    save_file({k: v.contiguous() for k, v in bare.items()}, tmp_path / "x.safetensors")
    vocabulary = words(tmp_path / "words")
    with pytest.raises(CheckpointError, match=r"activation=…"):
        isthmus.load(tmp_path / "x.safetensors", tokenizer=vocabulary)
    with pytest.raises(CheckpointError, match=r"how many attention heads.* widths 64 .*head_width=…"):
        isthmus.load(tmp_path / "x.safetensors", tokenizer=vocabulary, activation="gelu")
    told: dict = {"activation": "gelu", "head_width": 32}
    model = isthmus.load(tmp_path / "x.safetensors", tokenizer=vocabulary, **told)
    assert model.net.config.text.activation == "gelu"
    assert model.net.config.vision.heads == model.net.config.text.heads == 2
    with pytest.raises(CheckpointError, match=r"without a tokenizer.*tokenizer=…"):
        isthmus.load(tmp_path / "x.safetensors", **told)
    with pytest.raises(CheckpointError, match="needs no language"):
        isthmus.load(tmp_path / "x.safetensors", tokenizer=vocabulary, language="x", **told)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_published_image_towers_have_their_heads_not_a_guess(width, heads):
    """ViT-B to bigG: from H on open_clip's heads are 80, 88 and 104 wide."""
    config = ClipConfig(
        vision=VisionConfig(
            image_size=28, patch_size=14, width=width, layers=1, heads=heads, mlp_width=64, activation="gelu"
        ),
        text=TextConfig(
            context=8, vocab_size=20, width=512, layers=1, heads=8, mlp_width=64, activation="gelu", eot_id=19
        ),
        embed_dim=16,
    )
    with torch.device("meta"):
        state = clip_to_openai(Clip(config).state_dict(), config)
    found = clip_config_from_openai({k: v for k, v in state.items() if k not in SCALARS}, activation="gelu")
    assert (found.vision.heads, found.text.heads) == (heads, 8)


def test_a_trainers_checkpoint_of_a_clip_with_a_named_text_tower_opens(clip, tmp_path):
    """open_clip's CustomTextCLIP in training: ``module.text.…``."""
    state = clip_to_openai(clip.state_dict(), clip.config)
    image = ("visual.", "logit_scale")
    named = {f"module.{k if k.startswith(image) else 'text.' + k}": v for k, v in state.items() if k not in SCALARS}
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "epoch_3.pt")
    model = isthmus.load(
        tmp_path / "epoch_3.pt", tokenizer=words(tmp_path / "words"), activation="quick_gelu", head_width=32
    )
    same(model.net, clip)


@pytest.mark.parametrize("name", ["clip_quick_gelu", "clip_gelu", "custom_text_clip"])
def test_open_clip_folders_equal_open_clip(tmp_path, name):
    """The fixtures hold open_clip's own outputs; 1e-5 as in test_clip_open_clip."""
    tensors = load_file(OPEN_CLIP / f"{name}.safetensors")
    folder = words(tmp_path / "anything")
    values = {"model_cfg": json.loads((OPEN_CLIP / f"{name}.json").read_text()), "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "any.json").write_text(json.dumps(values))
    torch.save(
        {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}, folder / "w.bin"
    )
    model = isthmus.load(folder)
    with torch.no_grad():
        found = model.net.embed_images(tensors["pixels"])
    torch.testing.assert_close(found, tensors["image_embeds"], atol=1e-5, rtol=0)
    assert there(model.processor.image).mean == (0.5, 0.5, 0.5)


def _open_clip_folder(folder: Path, clip: Clip, **text) -> Path:
    """With CLIP's whole vocabulary (and a part of its merges) in the file that transformers wrote of it."""
    sizes = replace(clip.config.text, vocab_size=49408, context=77, eot_id=49407)
    net = drawn(Clip(replace(clip.config, text=sizes)))
    described = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "patch_size": 14, "width": 64, "layers": 2, "mlp_ratio": 1.5},
        "text_cfg": {"width": 64, "heads": 1, "layers": 2, "mlp_ratio": 1.5, **text},
    }
    theirs = CLIPTokenizer(
        vocab=str(OPEN_CLIP / "tokenizer" / "vocab.json"), merges=str(OPEN_CLIP / "tokenizer" / "merges.txt")
    )
    theirs.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    save_file(
        {k: v.contiguous() for k, v in clip_to_open_clip(net.state_dict(), net.config).items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def test_open_clip_reads_text_by_its_own_tokenizer(clip, tmp_path):
    """It pushes tokenizer.json into every repository of a CLIP, and reads by it only where the configuration names one:
    the two differ in entities and curly quotes."""
    rows = json.loads((OPEN_CLIP / "tokenizer" / "rows.json").read_text())
    cleaned = [row for row in rows if row["text"].count("&") or row["text"].count("\u2019")]
    assert cleaned
    told = isthmus.load(_open_clip_folder(tmp_path / "own", clip)).processor
    for row in [row for row in rows if row["text"].strip()]:
        assert told.text_example(row["text"]).streams["text"].ids == row["ids"]
    named = isthmus.load(_open_clip_folder(tmp_path / "named", clip, hf_tokenizer_name="openai/clip")).processor
    assert any(named.text_example(row["text"]).streams["text"].ids != row["ids"] for row in cleaned)


def test_a_folder_with_transformers_form_beside_open_clips_opens(tmp_path, clip):
    """As many are published on the hub: both configurations, both files of weights."""
    tensors = load_file(OPEN_CLIP / "clip_gelu.safetensors")
    folder = words(tmp_path / "both")
    write_folder(
        tmp_path / "theirs",
        {
            "config.json": clip_config_to_hf(clip.config),
            "model.safetensors": clip_to_hf(clip.state_dict(), clip.config),
        },
    )
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "theirs" / name).read_bytes())
    described = {"model_cfg": json.loads((OPEN_CLIP / "clip_gelu.json").read_text()), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    save_file(weights, folder / "open_clip_model.safetensors")
    with torch.no_grad():
        found = isthmus.load(folder).net.embed_images(tensors["pixels"])
    torch.testing.assert_close(found, tensors["image_embeds"], atol=1e-5, rtol=0)


# LLaVA as its own repository writes it.


@pytest.fixture
def llava(tmp_path):
    """A net, and the parts it was trained from in folders of transformers' kind."""
    config = LlavaConfig(vision=VISION, language=LM, projector="mlp2x_gelu", feature_layer=-2)
    net = drawn(Llava(config))
    text = TextConfig(context=12, vocab_size=64, width=64, heads=1, layers=1, mlp_width=96, eot_id=63)
    tower = drawn(Clip(ClipConfig(vision=VISION, text=text, embed_dim=32)), seed=1)
    tower.vision.load_state_dict(net.vision.state_dict())
    weights = clip_to_hf(tower.state_dict(), tower.config)
    write_folder(tmp_path / "tower", {"config.json": clip_config_to_hf(tower.config), "model.safetensors": weights})
    words(tmp_path / "tower2")
    for file in (tmp_path / "tower2").iterdir():
        file.rename(tmp_path / "tower" / file.name)
    return net


def _config(**changes):
    own = {"mm_vision_tower": "someone/tower", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    return {**LM, "model_type": "llava_llama", "image_aspect_ratio": "pad", **own, **changes}


def _language_folder(net, folder: Path, vocabulary: Path) -> Path:
    """The bare LM, as transformers keeps it."""
    net.language.lm.save_pretrained(folder)
    for file in words(vocabulary).iterdir():
        file.rename(folder / file.name)
    return folder


@pytest.mark.parametrize("with_tower", [True, False])
def test_a_full_original_llava(llava, picture, tmp_path, with_tower):
    folder = words(tmp_path / "llava")
    (folder / "config.json").write_text(json.dumps(_config()))
    state = llava_to_original(llava.state_dict(), llava.config, vision=with_tower)
    half = list(state)[: len(state) // 2]
    torch.save({k: state[k] for k in half}, folder / "pytorch_model-1.bin")
    torch.save({k: v for k, v in state.items() if k not in half}, folder / "pytorch_model-2.bin")
    placed = {k: f"pytorch_model-{1 if k in half else 2}.bin" for k in state}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    if not with_tower:
        with pytest.raises(CheckpointError, match="tower"):
            isthmus.load(folder)
    model = isthmus.load(folder, vision=tmp_path / "tower")
    same(model.net, llava)
    assert there(model.processor.image).mode == "pad"
    assert isinstance(model.answer(picture, "what is it?", max_new_tokens=3), str)


@pytest.mark.parametrize(("aspect", "mode"), [("pad", "pad"), ("square", "square"), (None, "square")])
def test_an_original_llava_makes_pixels_as_its_tower_says(llava, tmp_path, aspect, mode):
    """Their code reads the image processor of the tower's folder; also of the one that is written beside the model."""
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    own |= {"size": {"shortest_edge": 28}, "crop_size": 28}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(own))
    folder = words(tmp_path / "llava")
    (folder / "config.json").write_text(json.dumps(_config(image_aspect_ratio=aspect)))
    torch.save(llava_to_original(llava.state_dict(), llava.config, vision=False), folder / "pytorch_model.bin")
    model = isthmus.load(folder, vision=tmp_path / "tower")
    image = there(model.processor.image)
    assert (image.mode, image.mean, image.std) == (mode, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (image.resample, image.crop) == ("bilinear", "floor")
    again = isthmus.load(write_model(model, tmp_path / "again", "original").folder)
    assert again.processor.image == image


def test_the_first_models_tokens_around_a_picture(llava, picture, tmp_path):
    """``mm_use_im_start_end`` of v0 and the first v1: trained tokens before and behind each picture."""
    folder = words(tmp_path / "llava", 62)
    load_tokenizer(folder).with_tokens("<im_start>", "<im_end>").save(folder)
    (folder / "config.json").write_text(json.dumps({**_config(), "mm_use_im_start_end": True}))
    torch.save(llava_to_original(llava.state_dict(), llava.config, vision=True), folder / "pytorch_model.bin")
    model = isthmus.load(folder, vision=tmp_path / "tower")
    record = Record("a", (Image(picture, role="user"), Text("what is it?", role="user")))
    example = model.processor.prompt(record)
    (place,), ids = example.places, example.streams["lm"].ids
    told = model.processor.tokenizer
    assert [ids[place.start - 1], ids[place.start + place.length]] == [
        told.id_of("<im_start>"),
        told.id_of("<im_end>"),
    ]
    write_model(model, tmp_path / "again", "original")
    again = isthmus.load(tmp_path / "again")
    assert again.processor.prompt(record).streams["lm"].ids == ids
    assert model.answer(picture, "what is it?", max_new_tokens=3) == again.answer(
        picture, "what is it?", max_new_tokens=3
    )
    with pytest.raises(CheckpointError, match=r"processor\.around"):
        write_model(model, tmp_path / "hf", "hf")


def test_a_projector_alone_is_put_between_the_parts_named(llava, tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config()))
    state = llava_to_original(llava.state_dict(), llava.config, vision=False)
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    language = _language_folder(llava, tmp_path / "vicuna", tmp_path / "v")
    with pytest.raises(CheckpointError, match=r"language=…"):
        isthmus.load(folder, vision=tmp_path / "tower")
    with pytest.raises(CheckpointError, match=r"tower|vision=…"):
        isthmus.load(folder, language=language)
    same(isthmus.load(folder, vision=tmp_path / "tower", language=language).net, llava)


def test_a_lora_is_merged_into_its_base(llava, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config()))
    language = _language_folder(llava, tmp_path / "vicuna", tmp_path / "v")
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(96, 4, generator=generator)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    state = llava_to_original(llava.state_dict(), llava.config, vision=False)
    side = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k}
    torch.save(side, folder / "non_lora_trainables.bin")
    found = isthmus.load(folder, vision=tmp_path / "tower", language=language).net
    target = "language.lm.model.layers.1.mlp.up_proj.weight"
    expected = llava.state_dict()
    torch.testing.assert_close(found.state_dict()[target], expected[target] + 2 * b @ a, atol=1e-6, rtol=0)
    assert all(torch.equal(t, expected[n]) for n, t in found.state_dict().items() if n != target)
    save_file({f"{name}.lora_A.weight": a}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="the adapter lacks"):
        isthmus.load(folder, vision=tmp_path / "tower", language=language)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_an_open_flamingo_over_gpt_neox_begins_as_its_tokenizer_does(tmp_path, picture, named, adds):
    """The released models' tokenizer names a beginning of sequence and adds none: rows begin with the picture."""
    tokens = tiny_models.tokenizer().vocab_size
    model = tiny_models.flamingo(language={**tiny_models.NEOX, "vocab_size": tokens})
    folder = write_model(model, tmp_path / "out", "open_flamingo").folder
    lm = folder / "lang_encoder"
    if not adds:
        tree = json.loads((lm / "tokenizer.json").read_text())
        (lm / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": None}))
    parts: dict[str, Any] = {
        "vision": folder / "vision_encoder",
        "language": lm,
        **({"tokenizer": lm} if named else {}),
    }
    read = must_be(InterleaveProcessor, isthmus.load(folder / "checkpoint.pt", **parts).processor)
    pair = Record("a", (Image(picture, role="text"), Text("a red cube", learn=True)))
    told = read.tokenizer
    row = [read.image_id, *told.encode("a red cube"), read.end_id, told.eos_id]
    assert read.example(pair).streams["lm"].ids == ([told.id_of("<s>"), *row] if adds else row)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_an_open_flamingo_run_trained(llava, picture, tmp_path, wrapped):
    net = drawn(
        Flamingo(
            FlamingoConfig(
                vision=VISION,
                language=LM,
                end_id=64,
                image_id=65,
                resampler=ResamplerConfig(layers=2, latents=3, heads=2, head_width=64),
                xattn=GatedConfig(heads=2, head_width=64),
                every=2,
                offset=1,
            )
        )
    )
    net.vision.load_state_dict(llava.vision.state_dict())
    net.language.lm.load_state_dict(llava.language.lm.state_dict())
    state = trained_to_open_flamingo(net, 66)
    if wrapped:
        state = {"epoch": 1, "model_state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "checkpoint.pt")
    language = _language_folder(llava, tmp_path / "lm", tmp_path / "v")
    model = isthmus.load(tmp_path / "checkpoint.pt", vision=tmp_path / "tower", language=language)
    same(model.net, net)
    assert isinstance(model.caption(picture, max_new_tokens=3), str)
    for missing in ("vision", "language"):
        given = {"vision": tmp_path / "tower", "language": language}
        del given[missing]
        with pytest.raises(CheckpointError, match=rf"{missing}=…"):
            isthmus.load(tmp_path / "checkpoint.pt", **given)


def test_files_of_no_known_layout_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no known layout.*conv.weight"):
        isthmus.load(tmp_path / "x.safetensors")
    save_file({"Qformer.bert.x": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="neither the projection into a language model"):
        isthmus.load(tmp_path / "y.safetensors")


def test_a_folder_of_ours_takes_no_further_parts(story):
    with pytest.raises(CheckpointError, match="needs no vision"):
        isthmus.load(story / "llava", vision=story / "clip")


def test_a_vision_encoder_is_taken_of_a_model_that_has_one():
    given = Given(open=lambda path: tiny_models.lm() if path == "words" else tiny_models.clip(), account=Account())
    assert given.encoder("pictures").config == tiny_models.clip().net.vision.config
    with pytest.raises(CheckpointError, match="words is a lm model without a vision encoder"):
        given.encoder("words")
