"""Clips of a conversation: read as one visual by models that can, refused in words elsewhere, within the limits."""

import base64
from dataclasses import replace

import pytest

from isthmus.data.record import Record, Text
from isthmus.data.video import as_video
from tests.serving.helpers import encoded, models, picture, shown

CHAT = "/v1/chat/completions"


def film(*frames: bytes, kind: str = "png"):
    data = ",".join(base64.b64encode(frame).decode() for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:video/{kind};base64,{data}"}}


def asked(*parts, model="flamingo", **options):
    content = [*parts, {"type": "text", "text": "what happens?"}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}


FRAMES = [encoded(picture(n)) for n in range(3)]


def test_a_clip_is_answered_as_the_model_answers_it(served):
    found = served.post(CHAT, asked(film(*FRAMES)))
    assert found.status == 200, found.raw
    record = Record(id="", parts=(as_video([picture(n) for n in range(3)]), Text("what happens?", role="user")))
    told = models()["flamingo"].generate([record], max_new_tokens=8)[0]
    assert found.json["choices"][0]["message"]["content"] == told
    assert {each["id"]: each["clips"] for each in served.get("/v1/models").json["data"]}["flamingo"]
    backwards = served.post("/isthmus/look", asked(film(*FRAMES[::-1])))
    forwards = served.post("/isthmus/look", asked(film(*FRAMES)))
    assert backwards.json != forwards.json  # their order counts
    assert len(forwards.json["pictures"]) == 3
    for word in range(len(forwards.json["words"])):  # a clip's map is one, over all its frames
        assert sum(sum(frame["maps"][word]) for frame in forwards.json["pictures"]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (asked(film(*FRAMES), model="llava"), "no_clips"),
        (asked(film(*FRAMES), model="blip2"), "no_clips"),
        (asked(film(*FRAMES), model="lm"), "no_vision"),
        (asked(film(*FRAMES * 3)), "too_many_pictures"),
        (asked(film(*FRAMES * 2), *(shown(n) for n in range(3))), "too_many_pictures"),
        (asked(film(FRAMES[0], encoded(picture(1, (30, 30))))), "invalid_video"),
        (asked(film(FRAMES[0], FRAMES[1][:50])), "invalid_image"),
        (asked(film(FRAMES[0], b"")), "invalid_image"),
        (asked(film(*FRAMES, kind="mp4")), "invalid_video_url"),
        (asked({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}), "invalid_video_url"),
        (asked({"type": "video_url", "video_url": {"url": "data:video/png;base64,?"}}), "invalid_base64"),
    ],
)
def test_a_clip_that_cannot_be_is_refused_in_words(served, body, code):
    found = served.post(CHAT, body)
    assert (found.status, found.code) == (400, code)


def test_only_conversations_hold_clips(served):
    body = {"model": "clip", "input": [film(*FRAMES)]}
    for path, more in (("/v1/embeddings", {}), ("/v1/classify", {"labels": ["a"]}), ("/isthmus/search", {})):
        assert served.post(path, body | more).code == "invalid_value"


def test_a_flamingo_without_times_reads_no_clips():
    config = models()["flamingo"].net.config
    net = type(models()["flamingo"].net)(replace(config, resampler=replace(config.resampler, frames=0)))
    assert models()["flamingo"].net.reads_clips
    assert not net.reads_clips
