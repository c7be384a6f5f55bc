"""Model: the words a user knows, on a miniature CLIP, LM and LLaVA."""

import json

import pytest
import torch
from PIL import Image as PilImage

import isthmus
from isthmus.batch import Tokens
from isthmus.data.blip2 import PromptProcessor
from isthmus.data.images import ImageTransform
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor
from isthmus.data.processor import SpliceProcessor
from isthmus.data.reading import CAPTION_REQUEST
from isthmus.data.record import Image, Record, Text
from isthmus.data.sources import open_source
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, CheckpointError, ConfigError, DataError
from isthmus.interop.convert import write_model
from isthmus.interop.hf_files import generation_config
from isthmus.language import Decoding, until_stop
from tests.data.helpers import llama_like
from tests.interop import tiny_models
from tests.models.tiny_blip2 import OPT, QUERIES, SIZE, T5
from tests.models.tiny_blip2 import tiny as tiny_blip2
from tests.models.tiny_flamingo import tiny as tiny_flamingo
from tests.models.tiny_llava import tiny as tiny_llava
from tests.narrow import must_be


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
    assert clip.classify(picture, ["cube"], templates=["a {x} {}"]) == {"cube": pytest.approx(1.0)}


def test_classify_takes_a_bare_template_and_refuses_one_without_a_place(clip, picture):
    labels = ["cube", "sphere"]
    assert clip.classify(picture, labels, templates="a {}") == clip.classify(picture, labels, templates=["a {}"])
    for wrong in ("a photo of a", ["a {}", "a photo"]):
        with pytest.raises(ConfigError, match=r"needs exactly one \{\}"):
            clip.classify(picture, labels, templates=wrong)
    with pytest.raises(ConfigError, match="no templates"):
        clip.classify(picture, labels, templates=[])


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
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0: .* 'image' lacks its field 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "lacks its field 'text'"),
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


def test_a_candidate_or_prompt_that_does_not_fit_is_named_not_cut(llava, lm, picture):
    for model, parts in ((llava, [picture, "what is it?"]), (lm, ["what is it?"])):
        limit = model.processor.max_length
        with pytest.raises(DataError, match=rf"candidate 1 \('red cube.* the model reads {limit} in all; shorten"):
            model.score(parts, ["red", "red cube " * limit])
        with pytest.raises(DataError, match=r"prompt too long: .* no room for candidate 0 \('red'\)"):
            model.score([*parts, "what is it? " * limit], ["red"])


def test_scoring_needs_candidates_and_takes_a_bare_one(llava, picture):
    with pytest.raises(ConfigError, match="no candidates"):
        llava.score([picture, "what?"], [])
    assert llava.score("what?", "red") == llava.score(["what?"], ["red"])


def test_a_mistyped_path_is_not_scored_as_words(llava, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("there.png")
    picture.save("my photo.png")
    (tmp_path / "what is it?").mkdir()
    assert llava.score(["there.png", "what?"], ["red"]) == llava.score([tmp_path / "there.png", "what?"], ["red"])
    with pytest.raises(DataError, match=r"no such file: sc/nosuch\.png"):
        llava.score(["sc/nosuch.png", "what?"], ["red"])
    with pytest.raises(DataError, match="no such file"):
        llava.score(["nosuch.MP4", "what?"], ["red"])
    assert llava.score(["my photo.png", "what?"], ["red"]) == llava.score([picture, "what?"], ["red"])
    said = Text("what is it?", role="user")
    assert llava.score(["what is it?"], ["red"]) == llava.score([said], ["red"])


def test_an_unknown_decoding_option_names_the_nearest(llava, picture):
    record = Record("r", (Text("what?", role="user"),))
    for ask in (llava.answer_records, llava.gaps, llava.attend):
        with pytest.raises(ConfigError, match="no field 'beams'; did you mean 'num_beams'"):
            ask([record], beams=5)
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        llava.answer(picture, "what?", max_tokens=5)


def test_gaps_are_told_of_plain_greedy_decoding_only(llava):
    record = Record("r", (Text("what?", role="user"),))
    assert len(llava.gaps([record], max_new_tokens=2)) == 1
    for option in ({"min_new_tokens": 2}, {"no_repeat_ngram": 2}, {"num_beams": 2}, {"temperature": 1.0}):
        with pytest.raises(ConfigError, match=f"plain greedy decoding; leave {next(iter(option))} out"):
            llava.gaps([record], max_new_tokens=3, **option)


def test_gaps_of_an_encoder_decoder_are_refused_before_it_answers(monkeypatch):
    model = tiny_models.blip2({**T5, "vocab_size": tiny_models.ROWS})
    monkeypatch.setattr(model.net, "generate", None)
    with pytest.raises(CapabilityError, match="need a causal language model"):
        model.gaps([Record("r", (Text("what?", role="user"),))], max_new_tokens=2)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_plain_caption_ends_at_its_newline_only(legacy):
    """SentencePiece writes a newline alone as a bare dummy space and the newline's byte."""
    tokenizer = llama_like(legacy=legacy)
    processor = SpliceProcessor(tokenizer, ImageTransform.clip(SIZE), num_tokens=16, template="plain")
    model = isthmus.Model(tiny_llava(), processor)
    said = tokenizer.encode("a photo of 2 dogs\n")
    assert "▁" in tokenizer.tokens(said)
    assert until_stop(said, model.ended(Decoding()).stop_ids) == said[:-1]
    assert tokenizer.tokens(must_be(list, generation_config(model)["eos_token_id"])) == ["</s>", "<0x0A>"]


def test_a_foreign_llava_is_asked_for_a_caption_in_its_own_template(picture, tmp_path):
    made = tiny_models.llava()
    write_model(made, tmp_path / "hf", "hf")
    model = isthmus.load(tmp_path / "hf")
    part = isthmus.data.images.as_image(picture)
    asked = Record("r", (part, Text(CAPTION_REQUEST, role="user")))
    prompts = model.provenance([asked], {})["prompts"]
    assert isinstance(prompts, list)
    (prompt,) = prompts
    assert prompt.endswith("USER: <image>\nProvide a brief description of the given image. ASSISTANT:")
    for again in (model, isthmus.load(model.save(tmp_path / "ours"))):
        assert again.caption(picture, max_new_tokens=6) == model.generate([asked], max_new_tokens=6)[0]
    bare = Record("r", (isthmus.Image(part.source, role="text"),))  # what models trained on bare pictures read
    assert made.caption(picture, max_new_tokens=6) == made.generate([bare], max_new_tokens=6)[0]
    assert made.caption(picture, max_new_tokens=6) != model.caption(picture, max_new_tokens=6)


def test_generation_says_that_it_takes_records(llava):
    record = Record("r", (Text("what?", role="user"),))
    for ask in (llava.generate, llava.attend, llava.gaps, llava.answer_records):
        for wrong in (record, ["hello"], "hello", [[record]]):
            with pytest.raises(ConfigError, match="takes a list of Records"):
                ask(wrong)


def test_embedding_takes_a_bare_thing_as_one_and_refuses_none(clip, picture):
    assert torch.equal(clip.embed_texts("a red cube"), clip.embed_texts(["a red cube"]))
    assert torch.equal(clip.embed_images(picture), clip.embed_images([picture]))
    assert clip.similarity(picture, "a red cube").shape == (1, 1)
    for ask, what in (
        (lambda: clip.similarity([], ["a"]), "images"),
        (lambda: clip.similarity([picture], []), "texts"),
        (lambda: clip.embed_texts([]), "texts"),
        (lambda: clip.vision_features([]), "images"),
        (lambda: clip.classify(picture, []), "labels"),
    ):
        with pytest.raises(ConfigError, match=f"no {what}: give a list"):
            ask()


def test_provenance_tells_template_prompts_and_decoding(clip, llava, picture):
    record = Record("r", (isthmus.data.images.as_image(picture), Text("what?", role="user")))
    facts = llava.provenance([record], {"max_new_tokens": 3})
    assert facts["template"] == facts["processor"]["template"] == llava.processor.template
    assert facts["prompts"][0].endswith("<image>\nwhat? ASSISTANT:")
    assert (facts["decoding"]["max_new_tokens"], facts["decoding"]["num_beams"]) == (3, 1)
    assert facts["image"] == llava.processor.image.to_dict()
    assert set(clip.provenance([], {})) == {"image", "processor"}


def small_blip2(**options):
    """A model of phase generate with an encoder, a Q-Former and an LM of a few thousand weights."""
    tokenizer = Tokenizer.train(["a small red cube and a big ring", "Question: Answer:"] * 5, 300)
    language = {**OPT, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 128}
    image = ImageTransform.clip(SIZE)
    options = {"question": "Question: {} Answer:", "prompt": "a photo of", "max_text": 48, **options}
    return isthmus.Model(
        tiny_blip2("generate", language), PromptProcessor(tokenizer, image, num_tokens=QUERIES, **options)
    )


def test_blip2_scores_whatever_it_answers(picture):
    model = small_blip2()
    for seen in (None, picture, [picture, picture]):
        assert isinstance(model.answer(seen, "what?", max_new_tokens=2), str)
        parts = [] if seen is None else seen if isinstance(seen, list) else [seen]
        scores = model.score([*parts, "what?"], ["red", "a cube"])
        assert len(set(scores)) == 2
        assert scores == pytest.approx([model.score([*parts, "what?"], [c])[0] for c in ("red", "a cube")], abs=1e-4)
    with pytest.raises(DataError, match=r"candidate 0 .* the model reads 48 in all"):
        model.score([picture, picture, "what?"], ["red cube " * 30])
    with pytest.raises(DataError, match="candidate 0 is too long: the model reads 50 words of a caption"):
        model.score([picture], ["cube " * 60])


@torch.no_grad()
def test_an_encoder_decoder_scores_the_whole_candidate_without_a_question(picture):
    model = tiny_models.blip2({**T5, "vocab_size": tiny_models.ROWS})
    must_be(PromptProcessor, model.processor).prompt_text = ""
    net, tokenizer = model.net, model.processor.tokenizer
    candidates = ["a red cube", "two small blue balls"]
    prompt = model.processor.prompt(Record("r", (isthmus.data.images.as_image(picture),)))
    batch = isthmus.data.collate.collate([prompt])
    expected = []
    for candidate in candidates:
        ids = torch.tensor([[net.language.start_id, *tokenizer.encode(candidate), tokenizer.eos_id]])
        decoder = Tokens(ids=ids, lengths=torch.tensor([ids.shape[1]]))
        logits = net.language.logits(net.embed_prompt(batch), batch.text["encoder"].lengths, decoder)
        told = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected.append(float(told.sum()))
    assert model.score([picture], candidates) == pytest.approx(expected, abs=1e-4)


def test_provenance_of_blip2_and_flamingo_holds_their_own_words(picture):
    record = Record("r", (isthmus.data.images.as_image(picture), Text("what?", role="user"), Text("x", "assistant")))
    blip2 = small_blip2(clean=False)
    facts = json.loads(json.dumps(blip2.provenance([record], {"num_beams": 2})))
    assert (facts["processor"]["question"], facts["processor"]["prompt"]) == ("Question: {} Answer:", "a photo of")
    assert facts["prompts"] == ["<image><s>Question: what? Answer:"]
    assert facts["decoding"]["num_beams"] == 2
    tokenizer = Tokenizer.train(["what is it?"] * 5, 300).with_tokens(*NEW_TOKENS)
    processor = InterleaveProcessor(tokenizer, ImageTransform.clip(SIZE), max_length=8)
    facts = json.loads(json.dumps(isthmus.Model(tiny_flamingo(), processor).provenance([record], {})))
    assert facts["template"] == "paper"
    assert facts["style"]["question"] == "Question: "
    assert facts["prompts"] == ["<s><image>Question: what? Answer:"]  # whole, though longer than the model reads
    assert facts["decoding"]["max_new_tokens"] == 128
