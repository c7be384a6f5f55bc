"""The page's files and routes without a browser: sizes, addresses, headers, scenes, maps, scores."""

import base64
import io
import json
import re
from importlib.resources import files

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image as PilImage

from isthmus.data.attention import Attention
from isthmus.data.images import ImageTransform
from isthmus.serving.api import create_app
from isthmus.serving.page import PAGE
from isthmus.weights import state_tensors
from tests.data.helpers import pixel
from tests.serving.helpers import asked, models


def static():
    return {name: files("isthmus.serving").joinpath("static", name).read_text() for name, _ in PAGE.values()}


def test_the_page_is_small_and_names_no_other_host():
    texts = static()
    assert sum(len(text.encode()) for text in texts.values()) < 150_000
    for name, text in texts.items():
        assert not re.search(r"https?:|//[\w-]+\.|@import|\burl\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|<style|style=", texts["index.html"])


def test_the_page_comes_with_its_policy_and_without_a_key(served):
    for path, (_, kind) in PAGE.items():
        found = served.get(path)
        assert (found.status, found.headers["content-type"].split(";")[0]) == (200, kind)
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
    with TestClient(create_app({"lm": models()["lm"]}, key="secret")) as client:
        assert client.get("/").status_code == 200
        for path in ("/isthmus/runs", "/isthmus/scene", "/v1/models"):
            assert client.get(path).status_code == 401


def test_a_scene_has_its_picture_and_its_truth(served):
    one, other = (served.get(f"/isthmus/scene?number={n}").json for n in (7, 8))
    head, _, data = one["picture"].partition(",")
    assert head == "data:image/png;base64"
    assert PilImage.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    assert one["truth"] != other["truth"]
    assert one["questions"]
    assert all(each["question"] and each["answer"] for each in one["questions"])
    assert served.get("/isthmus/scene?number=7").json == one
    assert served.get("/isthmus/scene?number=-1").code == "invalid_value"


def test_a_clip_has_its_frames_and_a_question(served):
    one = served.get("/isthmus/clip?number=7").json
    assert {PilImage.open(io.BytesIO(base64.b64decode(f.partition(",")[2]))).size for f in one["frames"]} == {(64, 64)}
    assert len(one["frames"]) == len(set(one["frames"])) == 4
    assert all(each["question"] and each["answer"] for each in one["questions"])
    assert served.get("/isthmus/clip?number=8").json["frames"] != one["frames"]
    assert served.get("/isthmus/clip?number=-1").code == "invalid_value"


@pytest.mark.parametrize("name", ["llava", "flamingo", "blip2"])
def test_a_look_is_a_map_per_word_and_picture(served, name):
    found = served.post("/isthmus/look", {"model": name, "messages": asked("what?", 1), "max_tokens": 6})
    assert found.status == 200, found.raw
    facts = found.json
    chat = served.post("/v1/chat/completions", {"model": name, "messages": asked("what?", 1), "max_tokens": 6}).json
    assert facts["text"] == chat["choices"][0]["message"]["content"]
    assert "".join(facts["words"]) == "".join(facts["text"].split())
    (picture,) = facts["pictures"]
    assert len(picture["maps"]) == len(facts["words"]) > 0
    for heat in picture["maps"]:
        assert len(heat) == picture["rows"] * picture["columns"]
        assert sum(heat) == pytest.approx(1, abs=1e-2)


def test_a_look_that_cannot_be_is_refused_in_words(served):
    for name, code in (("clip", "model_cannot"), ("nothing", "model_not_found")):
        assert served.post("/isthmus/look", {"model": name, "messages": asked()}).code == code
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
    assert served.post("/isthmus/look", {"model": "llava", "messages": broken}).code == "invalid_image"


def test_runs_tell_parts_counts_and_scores(tmp_path):
    for task, text in (("vqa", json.dumps({"task": "vqa", "accuracy": 0.5})), ("torn", "{")):
        (tmp_path / "eval" / task).mkdir(parents=True)
        (tmp_path / "eval" / task / "scores.json").write_text(text)
    some = {name: models()[name] for name in ("llava", "clip")}
    with TestClient(create_app(some, places={"llava": tmp_path})) as client:
        facts = client.get("/isthmus/runs").json()
    llava, clip = facts["models"]
    assert sum(llava["parts"].values()) == sum(p.numel() for p in some["llava"].net.parameters())
    for name, told in (("llava", llava), ("clip", clip)):  # a head that is tied is there once, as `isthmus show` says
        assert told["weight_bytes"] == sum(4 * tensor.numel() for tensor in state_tensors(some[name].net).values())
    torn, vqa = llava["scores"]
    assert torn["problem"] == "its scores.json cannot be read"
    assert (vqa["columns"], vqa["rows"]) == (["score", "value"], [["accuracy", "50.0"]])
    assert clip["scores"] == clip["stages"] == llava["stages"] == []
    assert not llava["shipped"]
    assert "visual tokens" in llava["visual_tokens"]


def test_words_of_an_answer_take_all_tokens_with_them():
    tokens = ("a", " r", "ed", " ", "cube", "\ufffd", ".")
    found = Attention("a red cube.", tokens, (torch.arange(7.0).view(1, 7, 1, 1, 1),))
    assert found.words() == [("a", (0,)), ("red", (1, 2, 3)), ("cube.", (4, 5, 6))]
    assert [float(heat) for heat in found.heat(0)] == [0, 2, 5]
    assert Attention("", ("",), ()).words() == []


@pytest.mark.parametrize("mode", ["square", "pad", "squash"])
@pytest.mark.parametrize("size", [(90, 30), (30, 90), (40, 40)])
def test_the_box_is_where_the_model_sees(mode, size):
    transform = ImageTransform(size=30, mode=mode)
    left, top, right, bottom = transform.box(*size)
    picture = PilImage.new("RGB", size, "red")
    # A dot's centre in the picture lies at the same share of the box as of what the model sees.
    dot = (size[0] // 2 - 6, size[1] // 2 + 6)
    picture.paste((0, 0, 255), (dot[0] - 2, dot[1] - 2, dot[0] + 3, dot[1] + 3))
    pixels = transform.fit(picture)
    places = [(x, y) for x in range(30) for y in range(30)]
    blue = [place for place in places if pixel(pixels, place)[2] - pixel(pixels, place)[0] > 60]
    seen = [(sum(axis) / len(blue) + 0.5) / 30 for axis in zip(*blue, strict=True)]
    told = [((dot[0] + 0.5) / size[0] - left) / (right - left), ((dot[1] + 0.5) / size[1] - top) / (bottom - top)]
    assert seen == pytest.approx(told, abs=0.04)
