"""CapFilt with a captioner and a judge of known quality."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image as PilImage
from typer.testing import CliRunner

from isthmus.cli.app import app
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, DataError
from isthmus.recipes.capfilt import Mislabelled, capfilt
from tests.data.helpers import png
from tests.narrow import must_be, there

SCENES = {"kind": "scenes", "form": "captions", "count": 60}


class Knows:
    """Captions every third draw rightly; tells true captions from others."""

    def __init__(self) -> None:
        self.truth: dict[str, tuple[str, ...]] = {}
        self.seeds: list[int] = []
        source = open_source(SCENES)
        for i in range(len(source)):
            self.truth[source[i].images[0].content_key()] = must_be(tuple, source[i].texts[0].text)

    def generate(self, records, **decoding):
        assert decoding.keys() == {"seed", "temperature", "top_p", "max_new_tokens"}
        seed = decoding["seed"]
        self.seeds.append(seed)
        assert all(not r.texts for r in records)
        assert decoding["temperature"] == 1.0
        return [
            self.truth[r.images[0].content_key()][seed % 5] if seed % 3 == 0 else f"a thing of seed {seed}"
            for r in records
        ]

    def similarity(self, images, texts):
        (image,) = images
        truth = self.truth[image.content_key()]
        return torch.tensor([[0.3 + 0.001 * len(t) if t in truth else 0.1 for t in texts]])


def test_wrong_captions_are_replaced_by_right_ones(tmp_path) -> None:
    source = Mislabelled(open_source(SCENES), 0.3, seed=1)
    model = Knows()
    report = capfilt(source, model, model, tmp_path / "out", k=4, keep=2, seed=2)
    assert len(model.seeds) == 4
    assert len(set(model.seeds)) == 4
    assert report.pictures == 60
    assert report.captions == 120
    assert report.correct_before is not None
    assert 0.55 < report.correct_before < 0.85
    assert report.correct_after is not None
    assert report.correct_after > report.correct_before
    one = capfilt(source, model, model, tmp_path / "one", k=4, keep=1, seed=2)
    assert (one.correct_before, one.correct_after) == (report.correct_before, 1.0)
    assert one.wrong_web_kept == 0.0
    assert one.right_web_kept is not None
    assert one.web_kept == pytest.approx(one.right_web_kept * there(one.correct_before))
    assert 0 < one.web_kept < 1
    assert report.to_dict() == json.loads((tmp_path / "out" / "report.json").read_text())
    back = open_source(
        {"kind": "jsonl", "file": "captions.jsonl", "image_folder": "images"}, data_root=tmp_path / "out"
    )
    assert len(back) == 60
    assert back[7].images[0].source.read() is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["caption"]) == 2
        assert line["similarity"] == sorted(line["similarity"], reverse=True)
    text = back[7].texts[0].text
    assert list((text,) if isinstance(text, str) else text) == lines[7]["caption"]


def test_the_share_of_wrong_captions_is_the_one_asked_for_and_repeatable() -> None:
    source = open_source({**SCENES, "count": 400})
    for share in (0.0, 0.3, 1.0):
        records = [Mislabelled(source, share, seed=3)[i] for i in range(400)]
        wrong = sum(r.texts[0].text not in must_be(tuple, source[i].texts[0].text) for i, r in enumerate(records)) / 400
        assert abs(wrong - share) < 0.06
        assert records[5] == Mislabelled(source, share, seed=3)[5]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Mislabelled(source, 1.5)


def test_mistakes_leave_nothing_behind(tmp_path) -> None:
    model = Knows()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(DataError, match="not an empty folder"):
        capfilt(open_source(SCENES), model, model, tmp_path / "full")
    with pytest.raises(ConfigError, match="at least one caption"):
        capfilt(open_source(SCENES), model, model, tmp_path / "out", k=0)
    with pytest.raises(DataError, match="has 0 pictures"):
        capfilt(open_source({**SCENES, "form": "fewshot"}), model, model, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "out.quarantine.jsonl"}


def test_a_bad_sample_is_left_out_and_named(tmp_path) -> None:
    (tmp_path / "pictures").mkdir()
    for n in range(4):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png((255, 60 * n, 0)) if n != 2 else b"junk")
    rows = [{"image": f"{n}.png", "caption": "" if n == 3 else f"picture {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Says:
        def generate(self, records, **_):
            return ["a thing"] * len(records)

        def similarity(self, images, texts):
            return torch.tensor([[float(len(t)) for t in texts]])

    source = open_source(
        {"kind": "jsonl", "file": str(tmp_path / "rows.jsonl"), "image_folder": str(tmp_path / "pictures")}
    )
    report = capfilt(source, Says(), Says(), tmp_path / "out", k=1)
    assert (report.pictures, report.bad) == (2, 2)
    reasons = (tmp_path / "out.quarantine.jsonl").read_text()
    assert "2.png" in reasons
    assert "no caption" in reasons or "empty" in reasons
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["00000000.png", "00000001.png"]
    PilImage.new("RGB", (8, 8)).save(tmp_path / "pictures" / "2.png", "GIF")
    shutil.rmtree(tmp_path / "out")
    mended = capfilt(source, Says(), Says(), tmp_path / "out", k=1)
    assert (mended.pictures, mended.bad) == (3, 1)
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "out" / "images" / "00000002.gif").is_file()


def test_a_question_is_no_web_caption(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png((255, 0, 0)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "what is it?", "answer": "a cube"}))
    source = open_source({"kind": "jsonl", "file": str(tmp_path / "rows.jsonl")})
    assert Mislabelled(source, 0.0)[0].texts[0].text == "a cube"


def test_the_command(story, tmp_path) -> None:
    data = tmp_path / "scenes.yaml"
    data.write_text("{kind: scenes, form: captions, count: 6}\n")
    options = ["--captioner", str(story / "llava"), "--clip", str(story / "clip"), "--k", "2", "--wrong", "0.5"]
    options += ["--set", "task.max_new_tokens=4", "--json", str(tmp_path / "facts.json")]
    facts = tmp_path / "facts.json"
    found = CliRunner().invoke(
        app,
        ["data", "capfilt", "--data", str(data), "--out", str(tmp_path / "out"), *options],
    )
    assert found.exit_code == 0, found.output
    assert json.loads(facts.read_text())["pictures"] == 6
    assert "Correct captions" in found.output


def test_code_of_ones_own_is_named_for_both_models(tmp_path, monkeypatch) -> None:
    class Opened(Knows):
        def need(self, capability):
            pass

    given = {}
    monkeypatch.setattr("isthmus.opening.load", lambda name, **how: given.update({name: how}) or Opened())
    data = tmp_path / "scenes.yaml"
    data.write_text("{kind: scenes, form: captions, count: 3}\n")
    words = ["data", "capfilt", "--data", str(data), "--captioner", "writes", "--clip", "ranks", "--k", "1"]
    found = CliRunner().invoke(app, [*words, "--code", "mine.py", "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert given == {"writes": {"code": [Path("mine.py")]}, "ranks": {"code": [Path("mine.py")]}}
