"""Search of a folder and matching: equal to the model's own figures, within the folder, within the limits."""

import base64
import io
import os

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image as PilImage

from isthmus.data.images import ImageLimits
from isthmus.errors import ConfigError
from isthmus.serving import pictures
from isthmus.serving.api import create_app
from isthmus.serving.pictures import Pictures
from tests.serving.helpers import encoded, models, picture, shown
from tests.serving.test_pictures import LEAKS

FILES = [*(f"picture{n}.png" for n in range(9)), "torn.png", "picture9.png"]
SOUND = [n for n, name in enumerate(FILES) if name != "torn.png"]


def paths(album, numbers=SOUND):
    return [album / ("more" if FILES[n] == "picture9.png" else "") / FILES[n] for n in numbers]


def search(served, **asked):
    found = served.post("/isthmus/search", asked)
    assert found.status == 200, found.raw
    return found.json


@pytest.mark.parametrize("name", ["clip", "matcher"])
def test_a_text_finds_what_is_most_similar_to_it(served, album, name):
    found = search(served, model=name, input="a red cube", top=24)
    assert (found["pictures"], found["unreadable"], found["reranked"]) == (11, 1, 0)
    told = models()[name].similarity(paths(album), ["a red cube"])[:, 0]
    order = told.argsort(descending=True)
    assert [hit["number"] for hit in found["data"]] == [SOUND[i] for i in order]
    assert [hit["score"] for hit in found["data"]] == pytest.approx(told[order].tolist(), abs=1e-4)
    assert [hit["name"] for hit in found["data"]] == [FILES[SOUND[i]] for i in order]
    assert search(served, model=name, input="a red cube", top=2)["data"] == found["data"][:2]


@pytest.mark.parametrize("name", ["clip", "matcher"])
def test_a_picture_finds_itself_first(served, name):
    found = search(served, model=name, input=[shown(4)], top=3)
    one = encoded(picture(4, (200, 150)))
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(one).decode()}"}}
    same = search(served, model=name, input=[part], top=3)["data"][0]
    assert same["name"] == "picture4.png"
    assert same["score"] == pytest.approx(1, abs=1e-4)
    assert len(found["data"]) == 3


def test_the_best_are_put_in_order_by_matching(served, album):
    plain = search(served, model="matcher", input="a ring", top=24)["data"]
    found = search(served, model="matcher", input="a ring", top=24, rerank=4)
    assert found["reranked"] == 4
    first = [hit["number"] for hit in plain[:4]]
    pairs = torch.tensor([[n, 0] for n in range(4)])
    logits = models()["matcher"].match_logits(paths(album, first), ["a ring"], pairs).tolist()
    both = {n: hit["score"] + logit for n, hit, logit in zip(first, plain, logits, strict=False)}
    order = sorted(first, key=lambda n: -both[n])
    assert [hit["number"] for hit in found["data"]] == [*order, *(hit["number"] for hit in plain[4:])]
    assert [hit["score"] for hit in found["data"][:4]] == pytest.approx([both[n] for n in order], abs=1e-3)


def test_pictures_are_small_copies_of_files_within_the_folder(served):
    hit = search(served, model="clip", input="a red cube", top=1)["data"][0]
    whole = served.get(f"/isthmus/picture?number={hit['number']}").json
    for url, size in ((hit["thumbnail"], (160, 120)), (whole["picture"], (200, 150))):
        assert PilImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == size
    assert whole["name"] == hit["name"]
    assert served.get("/isthmus/picture?number=11").code == "no_such_picture"  # neither the link nor what is beyond it
    torn = served.get(f"/isthmus/picture?number={FILES.index('torn.png')}")
    assert torn.code == "invalid_image"
    assert not LEAKS.search(torn.raw.decode())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "lm"}, "model_cannot"),
        ({"model": "clip", "rerank": 4}, "model_cannot"),
        ({"model": "matcher", "input": [shown(1)], "rerank": 4}, "invalid_value"),
        ({"top": 25}, "invalid_value"),
        ({"rerank": 65}, "invalid_value"),
        ({"input": [shown(1), shown(2)]}, "invalid_value"),
        ({"input": ""}, "invalid_value"),
        ({"folder": "/etc"}, "unknown_field"),
        ({"input": "\U0010fffd"}, "reserved_character"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_words(served, changes, code):
    asked = {"model": "clip", "input": "a red cube"} | changes
    assert served.post("/isthmus/search", asked).code == code


def test_no_folder_nothing_to_search():
    with TestClient(create_app({"clip": models()["clip"]})) as client:
        assert client.get("/isthmus/runs").json()["pictures"] == 0
        for found in (
            client.get("/isthmus/picture"),
            client.post("/isthmus/search", json={"model": "clip", "input": "a"}),
        ):
            assert found.status_code == 404
            assert found.json()["error"]["code"] == "no_pictures"


def test_folders_that_cannot_be_searched(tmp_path, monkeypatch):
    limits = ImageLimits()
    for folder, words in ((tmp_path / "nowhere", "no folder"), (tmp_path, "holds no picture")):
        with pytest.raises(ConfigError, match=words):
            Pictures(folder, limits)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
    os.rename(os.fsencode(tmp_path / "3.png"), os.fsencode(tmp_path) + b"/\xff.png")
    found = Pictures(tmp_path, limits)
    assert [found.name(n) for n in range(len(found.files))] == ["0.png", "1.png", "2.png", "?.png"]
    monkeypatch.setattr(pictures, "MOST_PICTURES", 3)
    with pytest.raises(ConfigError, match="more than 3 pictures"):
        Pictures(tmp_path, limits)


def test_matching_holds_each_picture_against_each_text(served):
    texts = ["a red cube", "a blue ring", "two"]
    for name, measure in (("matcher", "match"), ("clip", "similarity")):
        asked = {"model": name, "pictures": [shown(1), shown(2)], "texts": texts}
        found = served.post("/isthmus/match", asked).json
        assert found["measure"] == measure
        for number, row in zip((1, 2), found["data"], strict=True):
            one = picture(number)
            if measure == "match":
                told = [models()[name].match(one, text) for text in texts]
            else:
                told = models()[name].similarity([one], texts)[0].tolist()
            assert row["scores"] == pytest.approx(told, abs=1e-4)
    assert served.post("/isthmus/match", asked | {"measure": "match"}).code == "model_cannot"
    assert served.post("/isthmus/match", asked | {"texts": []}).code == "invalid_value"
    words = [{"type": "text", "text": "a"}]
    assert served.post("/isthmus/match", asked | {"pictures": words}).code == "only_pictures"
    assert served.post("/isthmus/match", asked | {"pictures": [shown(1)] * 9}).code == "too_many_pictures"
