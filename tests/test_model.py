"""Model: the words a user knows, on a miniature CLIP, LM and LLaVA."""

import pytest
import torch
from PIL import Image as PilImage

import isthmus
from isthmus.data.record import Image, Record, Text
from isthmus.data.sources import open_source
from isthmus.errors import CapabilityError, CheckpointError, DataError


@pytest.fixture(scope="module")
def clip(story):
    return isthmus.load(story / "clip")


@pytest.fixture(scope="module")
def llava(story):
    return isthmus.load(story / "llava")


@pytest.fixture(scope="module")
def lm(story):
    return isthmus.load(story / "lm")


@pytest.fixture
def picture():
    return PilImage.effect_noise((70, 50), 90).convert("RGB")


def test_embeddings_are_unit_vectors_and_similarity_is_their_product(clip, picture):
    images, texts = clip.embed_images([picture, picture.rotate(90)]), clip.embed_texts(["a red cube", "two things"])
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(clip.similarity([picture], ["a red cube"]), images[:1] @ texts[:1].T)


def test_text_vectors_do_not_depend_on_neighbours(clip):
    alone = torch.cat([clip.embed_texts([t]) for t in ("a cube", "a small red sphere at the top left")])
    together = clip.embed_texts(["a cube", "a small red sphere at the top left"])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_classify_gives_probabilities_likeliest_first(clip, picture):
    found = clip.classify(picture, ["cube", "sphere", "ring"], templates=["a {}", "the {}"])
    assert set(found) == {"cube", "sphere", "ring"}
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_answers_do_not_depend_on_the_batch(llava):
    source = open_source({"kind": "scenes", "form": "questions", "split": "test", "count": 9})
    records = [source[i] for i in range(9)]
    together = llava.answer_records(records, max_new_tokens=5)
    assert together == [llava.answer_records([r], max_new_tokens=5)[0] for r in records]
    assert together == llava.generate(
        [isthmus.data.record.without_answer(r) for r in records], batch_size=4, max_new_tokens=5
    )


def test_caption_answer_and_chat(llava, picture, tmp_path):
    path = tmp_path / "p.png"
    picture.save(path)
    assert isinstance(llava.caption(path, max_new_tokens=4), str)
    asked = llava.answer(path, "how many cubes?", max_new_tokens=4)
    said = llava.chat(
        [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "how many cubes?"}]}],
        max_new_tokens=4,
    )
    assert asked == said
    assert isinstance(llava.answer([path, picture], "same?", max_new_tokens=3), str)
    follow = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cube"},
        {"role": "user", "content": "what colour is it?"},
    ]
    assert isinstance(llava.chat(follow, max_new_tokens=3), str)


def test_score_is_the_log_likelihood_of_each_candidate(llava, picture):
    parts = [picture, Text("what colour is it?", role="user")]
    scores = llava.score(parts, ["red", "blue", "a much longer answer"])
    assert scores == pytest.approx(
        [llava.score(parts, [c])[0] for c in ("red", "blue", "a much longer answer")], abs=1e-4
    )
    assert all(s < 0 for s in scores)


def test_the_lm_reads_text_and_refuses_pictures(lm, picture):
    assert isinstance(lm.answer(None, "red cube top left\nwhat colour is the cube?", max_new_tokens=3), str)
    with pytest.raises(DataError, match="reads only text"):
        lm.answer(picture, "what?", max_new_tokens=3)


def test_a_missing_capability_is_named(clip, lm, picture):
    with pytest.raises(CapabilityError, match="clip model cannot caption; it can: embed_images"):
        clip.caption(picture)
    with pytest.raises(CapabilityError, match="lm model cannot embed_texts"):
        lm.embed_texts(["x"])


def test_save_and_load_give_the_same_model(llava, picture, tmp_path):
    again = isthmus.load(llava.save(tmp_path / "copy"))
    assert again.answer(picture, "what?", max_new_tokens=6) == llava.answer(picture, "what?", max_new_tokens=6)
    state = again.net.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in llava.net.state_dict().items())
    with pytest.raises(CheckpointError):
        llava.save(tmp_path / "copy")


def test_special_tokens_are_never_answered(llava, picture):
    specials = set(llava.processor.tokenizer.specials.values()) - {None}
    record = Record(id="x", parts=(isthmus.data.images.as_image(picture), Text("what?", role="user")))
    answers = llava.generate([record] * 4, temperature=5.0, seed=(0, 1, 2, 3), max_new_tokens=40)
    assert len(set(answers)) > 1
    assert not any(s in a for a in answers for s in specials)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "x"}, {"role": "user", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": 3}], "a text or a list"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "must be text, or an image"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the assistant's"),
        ([], "missing"),
    ],
)
def test_bad_messages_are_explained(llava, messages, words):
    with pytest.raises(DataError, match=words):
        llava.chat(messages, max_new_tokens=2)


def test_load_explains_what_is_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        isthmus.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json \(found: nothing\)"):
        isthmus.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        isthmus.load(tmp_path)


def test_image_parts_pass_through(llava, picture):
    part = isthmus.data.images.as_image(picture)
    assert isinstance(part, Image)
    assert llava.answer(part, "what?", max_new_tokens=3) == llava.answer(picture, "what?", max_new_tokens=3)
