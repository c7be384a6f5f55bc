"""BLIP-2 by recipe: three stages with different parts, what each keeps, resuming, the finished models' words."""

import copy
import shutil
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, T5Config, T5ForConditionalGeneration

from isthmus.checkpoint import load_tensors
from isthmus.config import plain
from isthmus.data.sources import open_source
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, CheckpointError, ConfigError, DataError
from isthmus.evaluation.rerank import RerankScores
from isthmus.interop.hub import model_hash
from isthmus.nn.vit import VisionTransformer
from isthmus.opening import load
from isthmus.recipes import run as run_module
from isthmus.recipes.build import build
from isthmus.recipes.check import check
from isthmus.recipes.facts import net_of, stage_costs, stage_facts
from isthmus.recipes.run import open_data, train
from isthmus.recipes.schema import EvalSpec, parse_recipe, read_recipe
from isthmus.recipes.scoring import score_model
from tests.miniature import STAGE
from tests.narrow import must_be

SAID = {"question": "USER: {} ASSISTANT:", "clean": False}
CAPTIONS = {"kind": "scenes", "form": "captions", "count": 41}
QUESTIONS = {"kind": "scenes", "form": "questions", "split": "test", "count": 12}
CONNECTOR = [{"pattern": "connector.*", "lr": 1e-3}]
TREE = {
    "model": "blip2",
    "config": {
        "feature_layer": -2,
        "embed_dim": 16,
        "qformer": {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48, "queries": 4, "positions": 64},
    },
    "tokenizer": {"kind": "wordpiece", "vocab_size": 300, "samples": 50, "data": [CAPTIONS]},
    "stages": [
        STAGE
        | {
            "name": "represent",
            "config": {"phase": "represent"},
            "max_length": 64,
            "data": [CAPTIONS],
            "train": [*CONNECTOR, {"pattern": "heads.*", "lr": 1e-3}],
        },
        STAGE
        | {
            "name": "generate",
            "config": {"phase": "generate"},
            "max_length": 128,
            "processor": SAID,
            "data": [CAPTIONS],
            "train": CONNECTOR,
        },
        STAGE
        | {
            "name": "vqa",
            "config": {"instruct": True},
            "max_length": 128,
            "processor": SAID,
            "data": [{"kind": "scenes", "form": "questions", "count": 40}],
            "train": CONNECTOR,
        },
    ],
    "evaluate": [
        {
            "name": "retrieval",
            "task": "retrieval",
            "stage": "represent",
            "options": {"rerank": 6},
            "data": {"kind": "scenes", "form": "captions", "split": "test", "count": 8},
        },
        {
            "name": "zero-shot-vqa",
            "task": "vqa",
            "stage": "generate",
            "data": QUESTIONS,
            "options": {"decoding": {"max_new_tokens": 3, "num_beams": 3, "length_penalty": -1}},
        },
        {"name": "vqa", "task": "vqa", "data": QUESTIONS, "options": {"decoding": {"max_new_tokens": 3}}},
    ],
}


def tree(story, **changes):
    found = copy.deepcopy(TREE) | copy.deepcopy(changes)
    return {"parts": {"vision": str(story / "clip"), "language": str(story / "lm")}, **found}


@pytest.fixture(scope="module")
def run(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2") / "blip2"
    train(parse_recipe(tree(story)), folder, progress=False)
    return folder


def weights(folder):
    return load_tensors(folder / "model" / "model.safetensors")


def scene(number: int = 0):
    return open_source(QUESTIONS)[number].images[0]


def test_every_stage_has_its_parts_and_frozen_ones_stay_bit_identical(story, run):
    represent = weights(run / "stages" / "represent")
    generate = weights(run / "stages" / "generate")
    final = weights(run)
    clip, lm = weights(story / "clip"), weights(story / "lm")
    for state, has_lm, has_text, has_heads in (
        (represent, False, True, True),
        (generate, True, False, False),
        (final, True, True, False),
    ):
        assert any(n.startswith("language.") for n in state) == has_lm
        assert any(n.startswith("heads.") for n in state) == has_heads
        assert ("connector.qformer.words.weight" in state) == has_text
        for name, tensor in state.items():
            if name.startswith("vision."):
                assert torch.equal(tensor, clip[name])
            elif name.startswith("language."):
                assert torch.equal(tensor, lm[name])
    # The text half of the last stage comes from the first, through a stage that did not have it; then it trained.
    name = "connector.qformer.layers.0.ffn_text.mlp.fc1.weight"
    assert 0 < (final[name] - represent[name]).abs().max() < 0.02
    assert torch.equal(
        final["connector.qformer.layers.1.ffn_text.ln.weight"],
        represent["connector.qformer.layers.1.ffn_text.ln.weight"],
    )  # nothing reads the last layer's text rows
    for before, after in ((represent, generate), (generate, final)):
        for moved in ("connector.queries", "connector.norm.weight"):
            assert 0 < (before[moved] - after[moved]).abs().max() < 0.02


def test_an_interrupted_run_ends_as_an_uninterrupted_one(story, run, tmp_path, monkeypatch):
    folder = tmp_path / "blip2"
    real = run_module.train_stage
    for stopped_in in ("generate", "vqa"):

        def breaks(net, loader, stage, *args, name=stopped_in, **kwargs):
            if stage.name == name:
                raise KeyboardInterrupt
            return real(net, loader, stage, *args, **kwargs)

        monkeypatch.setattr(run_module, "train_stage", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(parse_recipe(tree(story)), folder, progress=False)
    monkeypatch.setattr(run_module, "train_stage", real)
    train(parse_recipe(tree(story)), folder, progress=False)
    for part in ("", "stages/represent", "stages/generate"):
        first, second = weights(run / part), weights(folder / part)
        assert set(first) == set(second)
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_first_stages_model_embeds_matches_and_captions(run):
    model = load(run / "stages" / "represent")
    assert model.kind == "blip2"
    pictures, texts = [scene(0), scene(1)], ["a red cube", "a blue ring at the top", "two things"]
    images, words = model.embed_images(pictures), model.embed_texts(texts)
    assert images.shape == (2, 4, 16)
    assert words.shape == (3, 16)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2, 4))
    torch.testing.assert_close(model.similarity(pictures, texts), torch.stack([(words @ i.T).amax(1) for i in images]))
    pairs = torch.tensor([[0, 0], [1, 0], [0, 2]])
    logits = model.match_logits(pictures, texts, pairs)
    assert model.match(pictures[0], texts[2]) == pytest.approx(float(_yes(model, pictures[0], texts[2])), abs=1e-6)
    assert 0 < model.match(pictures[0], texts[0]) < 1
    torch.testing.assert_close(logits[2:], model.match_logits(pictures[:1], texts[2:], torch.zeros(1, 2).long()))
    said = model.caption(pictures[0], num_beams=3, max_new_tokens=8, min_new_tokens=3)
    assert said
    assert "[" not in said
    assert model.caption(pictures[0], max_new_tokens=5) == model.caption(pictures[0], max_new_tokens=5)
    for call in (lambda: model.answer(pictures[0], "what?"), lambda: model.score([pictures[0]], ["a"])):
        with pytest.raises(CapabilityError, match="it can: generate, caption, embed_images"):
            call()
    with pytest.raises(DataError, match="empty"):
        model.match(pictures[0], " ")


def _yes(model, picture, text):
    pixels = model.processor.image(picture)[None]
    tokens = model._text_tokens([text])
    with torch.inference_mode():
        return model.net.match_logits(model.net.normed(pixels), tokens).softmax(-1)[0, 1]


def test_the_finished_model_answers_and_survives_saving(run, tmp_path):
    model = load(run)
    with pytest.raises(CapabilityError, match="cannot match"):
        model.match(scene(), "a cube")
    question = "what is left of the ring?"
    answer = model.answer(scene(), question, max_new_tokens=4, num_beams=5, length_penalty=-1)
    turn = [{"type": "image", "image": scene()}, {"type": "text", "text": question}]
    greedy = model.answer(scene(), question, max_new_tokens=4)
    assert model.chat([{"role": "user", "content": turn}], max_new_tokens=4) == greedy
    model.caption(scene(), max_new_tokens=4)
    scores = model.score([scene(), question], ["red", "a blue ring"])
    assert all(s < 0 for s in scores)
    assert model.score([scene(3), question], ["red"]) != model.score([scene(), question], ["red"])
    again = load(model.save(tmp_path / "saved"))
    assert again.answer(scene(), question, max_new_tokens=4, num_beams=5, length_penalty=-1) == answer
    assert again.score([scene(), question], ["red", "a blue ring"]) == scores
    assert again.processor.to_dict() == model.processor.to_dict()
    half = load(run, dtype=torch.bfloat16)
    assert next(half.net.language.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in half.net.connector.parameters()} == {torch.float32}
    assert half.score([scene(), question], ["red"])[0] == pytest.approx(scores[0], rel=0.1)


def test_evaluations_are_done_by_the_model_of_their_stage(run, tmp_path):
    recipe = parse_recipe(tree(run.parent))
    results = score_model(load(run), recipe.evaluate, tmp_path, model_hash=model_hash(run), run=run)
    retrieval, zero, vqa = results
    assert isinstance(retrieval.scores, RerankScores)
    assert "gain_at_1" in retrieval.scores.to_dict()
    assert len(zero.rows) == len(vqa.rows) == 12
    other = EvalSpec(name="x", task="vqa", stage="represent", data=QUESTIONS)
    with pytest.raises(CapabilityError):
        score_model(load(run), [other], tmp_path, model_hash="", run=run)
    with pytest.raises(ConfigError, match="no model as the stage 'gone' left it"):
        score_model(load(run), [other.model_copy(update={"stage": "gone"})], tmp_path, model_hash="", run=run)


def test_a_finished_model_is_a_part_of_the_next_recipe(story, run, tmp_path):
    again = tree(story, stages=[TREE["stages"][2] | {"name": "more"}], evaluate=[])
    again["parts"] = {"init": str(run)}
    for key in ("config", "tokenizer"):
        with pytest.raises(ConfigError, match="with the part 'init'"):
            build(parse_recipe({k: v for k, v in again.items() if k in (key, "model", "parts", "stages")}))
    del again["config"], again["tokenizer"]
    train(parse_recipe(again), tmp_path / "more", progress=False)
    before, after = weights(run), weights(tmp_path / "more")
    assert set(before) == set(after)
    assert 0 < (before["connector.queries"] - after["connector.queries"]).abs().max() < 0.02


def test_berts_start_and_a_t5_from_their_folders(story, tmp_path):
    texts = [t for i in range(40) for part in open_source(CAPTIONS)[i].texts for t in part.text]
    language = tmp_path / "t5"
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).save_pretrained(language)
    Tokenizer.train(texts, 300).save(language)
    recipe = tree(story, evaluate=[])
    size = build(parse_recipe(recipe)).tokenizers.others["qformer"].vocab_size
    bert = tmp_path / "bert"
    BertForPreTraining(
        BertConfig(
            vocab_size=size - 1,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    ).save_pretrained(bert)
    recipe["parts"] |= {"language": str(language), "bert": str(bert)}
    net: Any = build(parse_recipe(recipe)).net
    layer = net.connector.qformer.layers[1]
    assert torch.equal(layer.ffn_query.mlp.fc1.weight, layer.ffn_text.mlp.fc1.weight)
    stored = load_tensors(bert / "model.safetensors")
    assert torch.equal(layer.attn.q_proj.weight, stored["bert.encoder.layer.1.attention.self.query.weight"])
    assert torch.equal(net.heads.lm_bias[:-1], stored["cls.predictions.bias"])
    model = train(parse_recipe(recipe), tmp_path / "run", progress=False)
    assert set(model.processor.prompt(open_source(QUESTIONS)[0]).streams) == {"encoder", "qformer"}
    assert isinstance(model.answer(scene(), "what is it?", max_new_tokens=3), str)
    assert all(s < 0 for s in model.score([scene(), "what is it?"], ["red", "a cube"]))
    kept, frozen = load_tensors(language / "model.safetensors"), model.net.language.lm.state_dict()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in kept.items())


def test_what_does_not_fit_is_named(story, tmp_path):
    def refused(message, error: type[Exception] = ConfigError, **changes):
        recipe = tree(story, **changes)
        with pytest.raises(error, match=message):
            build(parse_recipe(recipe))

    bpe = {"vocab_size": 300, "data": [CAPTIONS], "samples": 20}
    refused("needs a WordPiece tokenizer", tokenizer=bpe)
    refused("needs the part 'vision'", parts={"language": str(story / "lm")})
    refused("which has no language in it", parts={"vision": str(story / "clip"), "language": str(story / "clip")})
    refused("which has no vision in it", parts={"vision": str(story / "lm")})
    refused("did you mean 'vision'", parts={"visoin": str(story / "clip")})
    stages = copy.deepcopy(TREE["stages"])
    stages[0]["processor"] = {"promt": "x"}
    built = build(parse_recipe(tree(story, stages=stages)))
    with pytest.raises(ConfigError, match="unknown processor option among"):
        built.processor(built.recipe.stages[0])
    stages[0]["template"] = "plain"
    built = build(parse_recipe(tree(story, stages=stages)))
    with pytest.raises(ConfigError, match="no chat template"):
        built.processor(built.recipe.stages[0])
    stages[1]["config"] = {"phase": "generate", "qformer": {"width": 64}}
    with pytest.raises(ConfigError, match=r"would get the shape .* in stage 'generate'"):
        built.enter(parse_recipe(tree(story, stages=stages)).stages[1])
    with pytest.raises(ConfigError, match="no stage 'represnt'; did you mean 'represent'"):
        parse_recipe(tree(story, evaluate=[TREE["evaluate"][0] | {"stage": "represnt"}]))
    lost = tmp_path / "clip"
    shutil.copytree(story / "clip", lost)
    (lost / "model" / "model.safetensors").unlink()
    refused("missing", CheckpointError, parts={"vision": str(lost), "language": str(story / "lm")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processor": {"promt": "x"}}, "Stage 'vqa': unknown processor option among"),
        ({"config": {"instruct": True, "qformer": {"width": 64}}}, r"would get the shape .* in stage 'vqa'"),
    ],
)
def test_a_phase_to_come_is_tried_before_the_first_step(story, tmp_path, change, words):
    stages = copy.deepcopy(TREE["stages"])
    stages[2] |= change
    recipe = parse_recipe(tree(story, stages=stages))
    with pytest.raises(ConfigError, match=words):
        train(recipe, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob("stages/*/*"))
    with pytest.raises(ConfigError, match=words):
        check(recipe, on_stage=lambda stage: pytest.fail(f"stage {stage.name} was tried"))


def test_what_is_foreseen_reads_records_as_the_stage_will(story):
    built = foreseen = build(parse_recipe(tree(story)))
    for stage in built.recipe.stages:
        built, foreseen = built.enter(stage), foreseen.foresee(stage)
        assert plain(built.net.config) == plain(foreseen.net.config)
        record = open_source(stage.data[0])[0]
        own, other = (b.processor(stage).example(record, 0) for b in (built, foreseen))
        assert own.streams == other.streams
    assert all(parameter.is_meta for parameter in foreseen.net.parameters())


def test_a_published_encoder_is_the_part_without_its_last_block(story):
    whole = plain(load(story / "clip").net.config.vision)
    config = copy.deepcopy(TREE["config"]) | {"feature_layer": -1}
    config["vision"] = whole | {"layers": 1, "post_norm": "none", "pool": "none"}
    built = build(parse_recipe(tree(story, config=config)))
    cut = build(parse_recipe(tree(story)))
    assert len(must_be(VisionTransformer, built.net.vision).blocks) == 1
    assert len(must_be(VisionTransformer, cut.net.vision).blocks) == 2
    pixels = torch.randn(1, 1, 3, 64, 64)
    torch.testing.assert_close(built.net.visual_features(pixels), cut.net.visual_features(pixels))
    for wrong in ({"width": 64}, {"layers": 3}):
        with pytest.raises(ConfigError, match="they do not fit"):
            build(parse_recipe(tree(story, config=config | {"vision": config["vision"] | wrong})))
    for strange, words in (
        (config["vision"] | {"layers": "two"}, "layers: expected int"),
        ("big", "vision: expected keys"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(parse_recipe(tree(story, config=config | {"vision": strange})))


def test_the_published_recipe_shows_its_size_without_files():
    recipe = read_recipe("blip2-vit-l-opt-2.7b", to_show=True)
    net, built = net_of(recipe)
    assert built is None
    represent, generate = stage_facts(recipe, net)
    assert represent.table.trained == 183_165_758
    assert generate.table.trained == 103_591_936 + 2_048


def test_the_shipped_recipe_and_its_facts(story):
    given = [f"parts.vision={story / 'clip'}", f"parts.language={story / 'lm'}"]
    recipe = read_recipe("blip2-tiny", [*given, "config.feature_layer=-2"])  # the story's encoder has two blocks
    names = [s.name for s in recipe.stages]
    assert names == ["represent", "generate", "vqa"]
    small = recipe.model_copy(
        update={"tokenizer": recipe.tokenizer.model_copy(update={"samples": 20}) if recipe.tokenizer else None}
    )
    built = build(small)
    # The last stage names no phase: its processor is that of the stage before, whose net is not made yet.
    run_module._foresee(built, {stage.name: open_data(stage) for stage in small.stages})
    facts = stage_facts(small, built.net)
    parts = [{row.part for row in fact.table.rows} for fact in facts]
    assert parts == [{"vision", "connector", "heads"}, *[{"vision", "connector", "language"}] * 2]
    assert [cost.steps for cost in stage_costs(built)] == [s.stage.steps for s in recipe.stages]
    for fact in facts:
        trained = {row.part: row.trained for row in fact.table.rows}
        assert trained["vision"] == trained.get("language", 0) == 0
        assert trained["connector"] > 0
