"""Requests at the same time: every answer is the one given alone; log-probabilities; features of pictures are kept."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from isthmus.data.collate import collate
from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from tests.narrow import there
from tests.serving.helpers import asked, models, picture

CHAT = "/v1/chat/completions"
QUESTIONS = ["what?", "how many red things are there beside the blue cube?", "two", "is it large?"]


def requests(name):
    """Requests of unlike lengths, pictures and ways of writing."""
    for number, question in enumerate(QUESTIONS * 2):
        pictures = () if name == "lm" else (number % 3,)
        more = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": number} if number % 2 else {}
        yield {"model": name, "messages": asked(question, *pictures), "max_tokens": 5 + 7 * (number % 3)} | more


def answer(served, body):
    found = served.post(CHAT, body)
    assert found.status == 200, found.raw
    choice = found.json["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], found.json["usage"]["completion_tokens"]


@pytest.mark.parametrize("name", ["lm", "llava", "flamingo", "blip2"])
def test_answers_together_are_the_answers_alone(served, name):
    bodies = list(requests(name))
    alone = [answer(served, body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: answer(served, body), bodies))
    assert together == alone
    assert len({text for text, *_ in alone}) > 3
    sizes = served.get("/metrics").raw.decode()
    alone, all_of_them = (
        float(next(line for line in sizes.splitlines() if line.startswith(f"isthmus_batch_size_{what}")).split()[1])
        for what in (f'bucket{{le="1.0",model="{name}"}}', f'count{{model="{name}"}}')
    )
    assert all_of_them > alone  # some steps had several rows


@torch.inference_mode()
def test_logprobs_are_those_of_the_model(served):
    model = models()["llava"]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        ask = {"model": "llava", "messages": asked("what?", 1), "max_tokens": 6, "logprobs": True, "top_logprobs": 4}
        found = client.chat.completions.create(**ask).choices[0]
        streamed = []
        for chunk in client.chat.completions.create(**ask, stream=True):
            for choice in chunk.choices:
                streamed += there(choice.logprobs.content) if choice.logprobs else []
    told = found.logprobs.content
    assert [t.token for t in streamed] == [t.token for t in told]
    assert b"".join(bytes(t.bytes) for t in told).decode(errors="replace").strip() == found.message.content
    prompt = model.processor.prompt(Record("r", (as_image(picture(1)), Text("what?", role="user"))))
    batch = collate([prompt])
    embeds = model.net.embed_prompt(batch)
    for token in told:
        scores = model.net.language.logits(embeds)[0, -1].log_softmax(-1)
        best, ids = scores.topk(4)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(float(best[0]), abs=1e-4)
        embeds = torch.cat([embeds, model.net.language.embed(ids[None, :1])], dim=1)


def test_completions_tell_logprobs_in_their_own_form(served):
    found = served.post("/v1/completions", {"model": "lm", "prompt": "a red", "max_tokens": 4, "logprobs": 2}).json
    told = found["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 4
    assert told["text_offset"][0] == 0
    assert all(math.isfinite(p) and p < 0 for p in told["token_logprobs"])


def test_a_picture_is_encoded_once(served, monkeypatch):
    net, seen = models()["llava"].net, []
    encode = net.visual_features
    monkeypatch.setattr(net, "visual_features", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    body = {"model": "llava", "messages": asked("what?", 71, 72), "max_tokens": 2, "n": 3}
    first = served.post(CHAT, body).json["choices"]
    assert seen == [1, 1]
    assert served.post(CHAT, body).json["choices"] == first
    assert seen == [1, 1]


def test_features_of_pictures_stay_within_their_bytes():
    from isthmus.serving.engine import PictureFeatures

    model = models()["llava"]
    examples = [
        model.processor.prompt(Record("r", (as_image(picture(n)), Text("what?", role="user")))) for n in range(4)
    ]
    one = PictureFeatures(model, 10**9)
    one.encoded(examples[0])
    small = PictureFeatures(model, 2 * one.held)
    for example in (*examples, examples[3]):
        small.encoded(example)
    assert small.held == 2 * one.held == sum(t.nbytes for t in small.kept.values())
    assert list(small.kept) == [examples[n].visuals[0].content_key() for n in (2, 3)]


@pytest.mark.parametrize("name", ["llava", "flamingo"])
def test_a_conversation_that_goes_on_is_read_from_where_it_went_on(served, name):
    steps = served.app.state.server.scheduler.speakers[name].decoder.language
    turns = asked("what is beside the large blue cube?", 81)
    body = {"model": name, "max_tokens": 6}
    first = served.post(CHAT, body | {"messages": turns}).json
    said = first["choices"][0]["message"]["content"]
    before = steps.taken
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "and its colour?"}]
    found = served.post(CHAT, body | {"messages": turns}).json
    # The question, and of a LLaVA its picture; the answer's cue may be read in one token with the answer.
    assert steps.taken - before >= first["usage"]["prompt_tokens"] - 2 > 8
    own = [dict(t) for t in turns]
    own[0] = {"role": "user", "content": [{"type": "image", "image": picture(81)}, turns[0]["content"][1]]}
    assert found["choices"][0]["message"]["content"] == models()[name].chat(own, max_new_tokens=6)


def test_choices_of_one_request_read_their_prompt_once(served):
    steps = served.app.state.server.scheduler.speakers["llava"].decoder.language
    before = steps.taken
    body = {"model": "llava", "messages": asked("what?", 82), "max_tokens": 4, "n": 3, "temperature": 1.0}
    found = served.post(CHAT, body).json
    assert steps.taken - before >= 2 * found["usage"]["prompt_tokens"]
    assert len({choice["message"]["content"] for choice in found["choices"]}) > 1
