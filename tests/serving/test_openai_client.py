"""The official client drives the server: chat, streams, several choices, vectors, models, errors."""

import openai
import pytest

from tests.serving.helpers import asked, figure, models, picture, shown


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("name", ["lm", "llava", "flamingo", "blip2"])
def test_a_chat_answers_what_the_model_answers(client, name):
    pictures = () if name == "lm" else (3,)
    found = client.chat.completions.create(model=name, messages=asked("how many?", *pictures), max_tokens=12)
    expected = models()[name].answer([picture(n) for n in pictures] or None, "how many?", max_new_tokens=12)
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.prompt_tokens > 3
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_conversation_keeps_its_turns_and_system_prompt(client):
    turns = [
        {"role": "system", "content": "say little."},
        *asked("what?", 1),
        {"role": "assistant", "content": "a cube"},
        {"role": "user", "content": "and its colour?"},
    ]
    found = client.chat.completions.create(model="llava", messages=turns, max_tokens=10)
    own = [dict(t) for t in turns]
    own[1]["content"] = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what?"}]
    assert found.choices[0].message.content == models()["llava"].chat(own, max_new_tokens=10)


def test_a_stream_says_what_the_answer_in_one_piece_says(client):
    ask = {"model": "llava", "messages": asked("what?", 1, 2), "max_tokens": 16, "n": 2, "temperature": 1.0, "seed": 3}
    whole = client.chat.completions.create(**ask)
    texts, ended, usage, roles = ["", ""], [None, None], None, []
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ended[choice.index] = choice.finish_reason or ended[choice.index]
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [c.message.content for c in whole.choices]
    assert texts[0] != texts[1]  # each choice has a seed of its own
    assert ended == [c.finish_reason for c in whole.choices]
    assert roles == ["assistant"] * 2
    assert usage == whole.usage


def test_an_answer_ends_before_its_stop_text(client):
    ask = {"model": "llava", "messages": asked("what?", 1), "max_tokens": 24}
    said = client.chat.completions.create(**ask).choices[0].message.content
    stop = said[4:6]
    cut = client.chat.completions.create(**ask, stop=[stop, "never said"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (said[: said.index(stop)].rstrip(), "stop")


def test_a_language_model_continues_text(client):
    found = client.completions.create(model="lm", prompt=["a red", "two"], max_tokens=5, n=2)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    streamed = client.completions.create(model="lm", prompt="a red", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == found.choices[0].text
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="llava", prompt="a red")
    assert refused.value.code == "model_cannot"


def test_vectors_are_those_of_the_model(client):
    found = client.embeddings.create(model="clip", input=["a red cube", shown(1)])
    clip = models()["clip"]
    assert found.data[0].embedding == pytest.approx(clip.embed_texts(["a red cube"])[0].tolist(), abs=1e-6)
    assert found.data[1].embedding == pytest.approx(clip.embed_images([picture(1)])[0].tolist(), abs=1e-6)
    many = client.embeddings.create(model="matcher", input=[shown(1)], encoding_format="float")
    assert many.data[0].shape == [4, 12]  # one per query
    assert many.data[0].embedding == pytest.approx(
        models()["matcher"].embed_images([picture(1)])[0].flatten().tolist(), abs=1e-6
    )


def test_vectors_and_scores_count_what_was_read(served):
    """A text as its tower reads it, a picture by the encoder's patches or the connector's queries, once in ``usage``
    and once in the server's own figures."""

    def read(path, body):
        name = f'isthmus_tokens_total{{kind="read",model="{body["model"]}"}}'
        before = figure(served, name)
        answer = served.post(path, body).json
        return answer.get("usage", {}).get("prompt_tokens"), figure(served, name) - before

    clip, matcher = models()["clip"], models()["matcher"]
    patches = (clip.net.image_size // clip.net.vision.config.patch_size) ** 2 + 1
    queries = matcher.embed_images([picture(1)]).shape[1]
    text = len(clip.processor.text_example("a red cube").streams["text"].ids)
    asked_in = len(matcher.processor.text_example("a red cube").streams["qformer"].ids)
    assert text > len(clip.processor.tokenizer.encode("a red cube"))
    long, context = "red " * 500, clip.processor.text_example("red " * 500).length
    labels = {"labels": ["cube", "ring"], "templates": ["a {}.", "{} here"]}
    prompts = sum(clip.processor.text_example(t).length for t in ("a cube.", "cube here", "a ring.", "ring here"))
    candidates = {"candidates": ["a red cube", "b"]}
    for path, body, count in [
        ("embeddings", {"model": "clip", "input": "a red cube"}, text),
        ("embeddings", {"model": "clip", "input": [shown(1)]}, patches),
        (
            "embeddings",
            {"model": "clip", "input": ["a red cube", shown(1), shown(2), long]},
            text + 2 * patches + context,
        ),
        ("embeddings", {"model": "matcher", "input": [shown(1), "a red cube"]}, queries + asked_in),
        ("score", {"model": "clip", "input": [shown(1)], **candidates}, patches),
        ("score", {"model": "matcher", "input": [shown(1)], **candidates}, queries),
        ("score", {"model": "matcher", "input": [shown(1)], "measure": "similarity", **candidates}, queries),
    ]:
        assert read(f"/v1/{path}", body) == (count, count), (path, body["model"])
    usage, counted = read(
        "/v1/score", {"model": "llava", "input": [shown(1), {"type": "text", "text": "what?"}], **candidates}
    )
    assert usage == counted > models()["llava"].net.num_tokens(32, 32)
    assert read("/v1/classify", {"model": "clip", "input": [shown(1)], **labels}) == (None, patches + prompts)


def test_models_are_listed_with_what_they_can(client):
    found = {m.id: m for m in client.models.list()}
    assert set(found) == set(models())
    assert found["lm"].capabilities == list(models()["lm"].capabilities)
    assert client.models.retrieve("clip").vision is True
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.chat.completions.create(model="gpt", messages=asked())


def test_errors_reach_the_client_with_code_and_field(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="llava", messages=asked(), max_tokens=0)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "max_tokens")
    assert "it must be at least 1" in refused.value.message


def test_scores_and_labels(served):
    parts = [shown(1), {"type": "text", "text": "what?"}]
    body = {"model": "llava", "input": parts, "candidates": ["red", "two rings"]}
    found = served.post("/v1/score", body).json
    expected = models()["llava"].score([picture(1), "what?"], ["red", "two rings"])
    assert found["measure"] == "likelihood"
    talk = served.post("/v1/chat/completions", {"model": "llava", "messages": asked("what?", 1), "max_tokens": 1}).json
    read = talk["usage"]["prompt_tokens"]
    assert found["usage"] == {"prompt_tokens": read, "total_tokens": read}
    assert read > models()["llava"].net.num_tokens(32, 32) > 0
    assert [d["score"] for d in found["data"]] == pytest.approx(expected, abs=1e-4)
    match = served.post("/v1/score", {"model": "matcher", "input": [shown(1)], "candidates": ["a red cube"]}).json
    assert match["data"][0]["score"] == pytest.approx(models()["matcher"].match(picture(1), "a red cube"), abs=1e-5)
    near = {"model": "matcher", "input": [shown(1)], "candidates": ["a", "b"], "measure": "similarity"}
    expected = models()["matcher"].similarity([picture(1)], ["a", "b"])[0].tolist()
    assert [d["score"] for d in served.post("/v1/score", near).json["data"]] == pytest.approx(expected, abs=1e-5)
    labels = {"model": "clip", "input": [shown(1)], "labels": ["cube", "ring"], "templates": ["one {}.", "a {}"]}
    found = served.post("/v1/classify", labels).json["data"][0]
    expected = models()["clip"].classify(picture(1), ["cube", "ring"], templates=["one {}.", "a {}"])
    assert dict(zip(["cube", "ring"], found["probs"], strict=True)) == pytest.approx(expected, abs=1e-6)
    assert found["label"] == max(expected, key=expected.__getitem__)
