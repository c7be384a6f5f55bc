"""Flamingo from a recipe: joint steps over weighted sources, resume, a folder that loads, what a user asks of it."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image as PilImage

import isthmus
from isthmus.checkpoint import read_json
from isthmus.data.collate import collate
from isthmus.data.images import as_image
from isthmus.data.interleave import hateful_memes
from isthmus.data.joint import JointLoader
from isthmus.data.record import Record, Text
from isthmus.data.video import as_video
from isthmus.errors import ConfigError, DataError
from isthmus.models.flamingo import Flamingo
from isthmus.recipes.build import build
from isthmus.recipes.run import make_loader, train
from isthmus.recipes.schema import parse_recipe
from isthmus.stage import apply_stage
from isthmus.training import train as train_stage
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from tests.miniature import STAGE
from tests.models.tiny_flamingo import blocks_of
from tests.narrow import must_be, there

TREE = {
    "model": "flamingo",
    "config": {
        "resampler": {"layers": 1, "latents": 5, "heads": 2, "head_width": 8, "frames": 4},
        "xattn": {"heads": 2, "head_width": 8},
    },
    "image": {"mode": "aspect"},
    "stages": [
        {k: v for k, v in STAGE.items() if k != "batch_size"}
        | {
            "name": "interleave",
            "max_length": 400,
            "data": [
                {"kind": "scenes", "form": "pages", "count": 20, "batch_size": 2, "loss_weight": 1.0},
                {"kind": "scenes", "form": "captions", "count": 20, "batch_size": 3, "loss_weight": 0.2},
                {
                    "kind": "scenes",
                    "form": "clip_questions",
                    "count": 20,
                    "frames": 3,
                    "batch_size": 1,
                    "loss_weight": 0.03,
                },
            ],
            "train": [
                {"pattern": "connector.*", "lr": 1e-2},
                {"pattern": "xattn.*", "lr": 1e-2},
                {"pattern": "language.new_rows.*", "lr": 1e-2},
            ],
            "processor": {"p_next": 0.5, "space": 0.5},
        }
    ],
}


def recipe(story, **stage):
    tree = copy.deepcopy(TREE)
    tree["parts"] = {"vision": str(story / "clip"), "language": str(story / "lm")}
    tree["stages"][0] |= stage
    return parse_recipe(tree)


@pytest.fixture(scope="module")
def run(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flamingo")
    train(recipe(story), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return isthmus.load(run)


@pytest.fixture
def picture():
    return PilImage.effect_noise((70, 50), 90).convert("RGB")


def test_only_the_new_parts_moved_and_no_text_tower_is_kept(model, story):
    clip, lm = isthmus.load(story / "clip").net, isthmus.load(story / "lm").net
    state = model.net.state_dict()
    for part, theirs in (("vision.", clip.vision), ("language.lm.", lm.language.lm)):
        own = {n.removeprefix(part): t for n, t in state.items() if n.startswith(part)}
        assert own.keys() == theirs.state_dict().keys()
        assert all(torch.equal(t, own[n]) for n, t in theirs.state_dict().items())
    assert {n.split(".")[0] for n in state} == {"vision", "connector", "xattn", "language"}
    assert all(block.attn_gate.abs() > 0 for block in model.net.xattn)
    assert model.net.config.end_id == lm.language.vocab_size == model.processor.tokenizer.id_of("<|endofchunk|>")


def test_every_step_reads_every_source(story, run):
    loader = must_be(JointLoader, make_loader(build(recipe(story)), recipe(story).stages[0]))
    stream = loader.steps()
    for _ in range(2):
        position, batches = next(stream)
        assert [len(b) for b in batches] == [2, 3, 1]
        assert [b.sources[0] for b in batches] == [f"scenes-{f}-train" for f in ("pages", "captions", "clip_questions")]
        assert batches[0].loss_weights == {b.sources[0]: w for b, w in zip(batches, (1.0, 0.2, 0.03), strict=True)}
        assert max(there(g.pixels).shape[1] for g in batches[2].visuals) == 3
    third = next(stream)[1]
    stream.close()
    again = next(loader.steps(loader.position(position.to_dict())))[1]
    assert [b.ids for b in again] == [b.ids for b in third]
    lines = (run / "stages" / "interleave" / "metrics.jsonl").read_text()
    assert lines.count("lm/scenes-clip_questions-train") == 3


def test_sources_that_share_a_pass_have_the_same_gradient(story):
    found = []
    for tokens, passes in ((None, 3), (10_000, 1), (60, 2)):
        one = recipe(story, **({} if tokens is None else {"pass_tokens": tokens}))
        built = build(one)
        net = built.net.double()
        for block in blocks_of(must_be(Flamingo, net)):
            torch.nn.init.constant_(block.attn_gate, 0.5)
        stage = one.stages[0]
        apply_stage(net, stage.stage.train)
        stream = make_loader(built, stage).steps()
        batches = [replace(b, visuals=tuple(_double(g) for g in b.visuals)) for b in next(stream)[1]]
        stream.close()
        assert len(batches) == passes
        losses = backward(engine(net), batches, nullcontext())
        grads = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
        found.append((sorted(i for b in batches for i in b.ids), losses, grads))
    (ids, losses, grads), *others = found
    for other_ids, other_losses, other_grads in others:
        assert other_ids == ids
        assert other_losses == pytest.approx(losses, abs=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, atol=1e-10, rtol=0)


def _double(group):
    return replace(group, pixels=there(group.pixels).double())


@pytest.mark.parametrize("shared", [False, True], ids=["own passes", "shared passes"])
def test_a_resumed_run_ends_in_the_same_bits(story, run, tmp_path, monkeypatch, shared):
    one = recipe(story, **({"pass_tokens": 60} if shared else {}))
    built = build(one)
    stage = one.stages[0]

    class Cut(Exception):
        pass

    loader = must_be(JointLoader, make_loader(built, stage))
    steps = loader.steps

    def two(start=None):
        for n, item in enumerate(steps(start)):
            if n == 2:
                raise Cut
            yield item

    monkeypatch.setattr(loader, "steps", two)
    with pytest.raises(Cut):
        train_stage(built.net, loader, stage.stage, tmp_path / "s", seed=one.seed, progress=False)
    fresh = build(one)
    result = train_stage(
        fresh.net, make_loader(fresh, stage), stage.stage, tmp_path / "s", seed=one.seed, progress=False
    )
    assert result.resumed == 2
    if shared:
        run = tmp_path / "whole"
        train(one, run, progress=False)
    done = isthmus.load(run).net.state_dict()
    assert all(torch.equal(t, done[n]) for n, t in fresh.net.state_dict().items())


def test_captions_answers_conversations_and_clips(model, picture, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for n in range(3):
        picture.rotate(90 * n).save(folder / f"{n}.png")
    assert isinstance(model.caption(picture, max_new_tokens=4), str)
    path = tmp_path / "p.png"
    picture.save(path)
    asked = model.answer(path, "how many cubes?", max_new_tokens=4)
    content = [{"type": "image", "image": path}, {"type": "text", "text": "how many cubes?"}]
    assert model.chat([{"role": "user", "content": content}], max_new_tokens=4) == asked
    talk = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "video", "video": folder}, {"type": "text", "text": "which way?"}]},
    ]
    assert isinstance(model.chat(talk, max_new_tokens=4), str)
    records = [
        Record("a", (as_video(folder), Text("which?", role="user"))),
        Record("b", (as_image(picture), Text("?", role="user"))),
    ]
    together = model.generate(records, max_new_tokens=5)
    assert together == [model.generate([r], max_new_tokens=5)[0] for r in records]
    beams = model.generate(records, max_new_tokens=5, num_beams=3)
    assert beams == [model.generate([r], max_new_tokens=5, num_beams=3)[0] for r in records]
    specials = {"<image>", "<|endofchunk|>", "</s>"}
    drawn = model.generate(records * 2, max_new_tokens=30, temperature=5.0, seed=(0, 1, 2, 3))
    assert len(set(drawn)) == 4
    assert not any(s in text for s in specials for text in drawn)


def test_scores_share_the_beginning_and_equal_one_by_one(model, picture):
    shots = [
        picture,
        Text("what?", role="user"),
        Text("red", role="assistant"),
        picture.rotate(90, expand=True),
        Text("what?", role="user"),
    ]
    candidates = ["red", "blue", "red and blue"]
    calls = []
    hook = model.net.vision.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    found = model.score(shots, candidates)
    hook.remove()
    assert sum(calls) == 2  # two pictures, once for all candidates
    parts = tuple(p if isinstance(p, Text) else as_image(p) for p in shots)
    examples = [
        model.processor.example(Record("c", (*parts, Text(c, role="assistant", learn=True)))) for c in candidates
    ]
    with torch.inference_mode():
        whole = [float(model.net.score(collate([e]))) for e in examples]
    assert found == pytest.approx(whole, abs=1e-3)


def test_a_running_text_is_ranked_as_one(model, picture):
    parts = hateful_memes(as_image(picture), "a cat")
    found = model.score(parts, ["yes", "no"])
    examples = [
        model.processor.example(Record("c", hateful_memes(as_image(picture), "a cat", a))) for a in ("yes", "no")
    ]
    with torch.inference_mode():
        whole = [float(model.net.score(collate([e]))) for e in examples]
    assert found == pytest.approx(whole, abs=1e-3)


def test_attention_comes_on_request(model, picture):
    record = Record("x", (as_image(picture), as_image(picture.rotate(90, expand=True)), Text("what?", role="user")))
    (found,) = model.generate([record], return_attention=True, max_new_tokens=5)
    assert found.text == model.generate([record], max_new_tokens=5)[0]
    layers, tokens = 2, len(found.tokens)
    assert [m.shape for m in found.maps] == [(layers, tokens, 1, 3, 4), (layers, tokens, 1, 4, 3)]
    assert not found.maps[0].any()
    torch.testing.assert_close(found.maps[1].sum((-1, -2, -3)), torch.ones(layers, tokens))


def test_saved_and_loaded_again_it_is_the_same(model, picture, tmp_path):
    again = isthmus.load(model.save(tmp_path / "copy"))
    state = again.net.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.net.state_dict().items())
    assert again.processor.to_dict() == model.processor.to_dict()
    assert again.answer(picture, "what?", max_new_tokens=6) == model.answer(picture, "what?", max_new_tokens=6)
    assert read_json(tmp_path / "copy" / "processor.json")["image"]["patch"] == 16
    assert model.vision_features([picture, picture.rotate(90, expand=True)]).shape == (2, 32)


def test_a_prompt_may_be_longer_than_a_training_row(model):
    context = model.net.language.context
    assert 400 < context == model.processor.max_length  # the stage's rows end at 400
    words = "a red cube, " * 500
    with pytest.raises(DataError, match=f"and the model reads {context}"):
        model.processor.prompt(Record("long", (Text(words, role="user"),)))


def test_recipes_that_cannot_weigh_are_explained(story):
    with pytest.raises(ConfigError, match="every entry needs a batch_size"):
        recipe(story, data=[{"kind": "scenes", "form": "pages", "loss_weight": 1.0}])
    with pytest.raises(ConfigError, match="batch sizes of their own"):
        recipe(story, batch_size=4)
    with pytest.raises(ConfigError, match="split by accumulate or by pass_tokens"):
        recipe(story, pass_tokens=100, accumulate=2)
    with pytest.raises(ConfigError, match="pass_tokens is for stages whose entries"):
        recipe(story, data=[{"kind": "scenes", "form": "pages"}], batch_size=4, pass_tokens=100)
    same = [{"kind": "scenes", "form": "pages", "batch_size": 2, "loss_weight": w} for w in (1.0, 0.5)]
    with pytest.raises(ConfigError, match="called 'scenes-pages-train' and weigh"):
        make_loader(build(recipe(story, data=same)), recipe(story, data=same).stages[0])
    with pytest.raises(ConfigError, match="missing or unknown option"):
        make_loader(build(recipe(story)), recipe(story, processor={"p_nex": 1}).stages[0])
