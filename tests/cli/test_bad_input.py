"""A user's mistakes and bad data, through the program: one clear paragraph or a counted quarantine, nothing lost."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from isthmus import checkpoint
from isthmus.training.loop import _Run
from tests.data.helpers import png, write_tar
from tests.miniature import tree

from .test_cli import run


@pytest.fixture
def place(monkeypatch, story, tmp_path):
    """A working folder with a LLaVA recipe of one stage on 120 rows of the user's own, of which none is bad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(120):
        (tmp_path / "images" / f"{i}.png").write_bytes(png((i, 50, 0), (40, 30)))
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"thing {i % 7}"}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    recipe = tree("llava", story)
    recipe["stages"] = recipe["stages"][:1]
    data = [{"kind": "llava", "file": "rows.json", "image_folder": "images"}]
    recipe["stages"][0] |= {"data": data, "batch_size": 20, "steps": 6, "template": "vicuna_bare"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def spoil(place, numbers, change):
    rows = json.loads((place / "rows.json").read_text())
    for number in numbers:
        change(rows[number])
    (place / "rows.json").write_text(json.dumps(rows))


def more_placeholders(row):
    row["conversations"][0]["value"] = "<image><image>\nwhat?"


def missing(row):
    row["image"] = "gone.png"


def truncated(row):
    raw = png(size=(200, 200))
    with open("images/cut.png", "wb") as file:
        file.write(raw[:-40])
    row["image"] = "cut.png"


def no_answer(row):
    row["conversations"][1]["value"] = "  "


BAD = [
    (more_placeholders, "placeholder mismatch: the text has 2 <image> and the sample 1 pictures"),
    (missing, "missing image: there is no readable file images/gone.png"),
    (truncated, "broken image: images/cut.png is truncated or damaged"),
    (no_answer, "empty answer"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_one_bad_sample_is_counted_and_left_out(monkeypatch, capsys, place, change, reason):
    spoil(place, [7], change)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == 0, said
    assert "Stage align: 1 bad sample was left out" in said
    noted = [json.loads(line) for line in (place / "run/stages/align/quarantine.jsonl").read_text().splitlines()]
    assert len(noted) == 1
    assert reason in noted[0]["reason"]
    assert "7" in noted[0]["id"]


def test_many_bad_samples_stop_the_run_until_more_are_allowed(monkeypatch, capsys, place):
    spoil(place, range(0, 120, 10), missing)
    arguments = ("train", "mine.yaml", "--out", "run")
    code, _, said = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "samples are bad, more than the allowed 1.0%; most often: missing image" in " ".join(said.split())
    before = [path.name for path in Path("run/stages/align/checkpoints").iterdir()]
    assert before
    code, _, said = run(monkeypatch, capsys, *arguments, "stages.align.bad_samples=0.2")
    assert code == 0, said
    assert "12 bad samples were left out (missing image 12)" in said


DATA = "stages.align.data=[{{kind: {}}}]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (DATA.format("webdataset, shards: zero.tar"), "zero.tar is empty (0 bytes)"),
        (DATA.format("webdataset, shards: cut.tar"), "cut.tar is truncated or damaged"),
        (DATA.format("webdataset, shards: 'train-*.tar'"), "no such file: train-*.tar"),
        (DATA.format("llava, file: cut.json"), "cut.json is not valid JSON: it goes wrong at line 1"),
        (DATA.format("llava, file: 7"), "file: int 7 fits none of the allowed forms"),
        (DATA.format("llava, file: rows.json, limit: all"), "limit: expected int"),
        (DATA.format("llava, file: rows.json, weight: x"), "weight: expected float"),
        (DATA.format("llava, file: rows.json, fields: [a]"), "fields: expected keys and values"),
        (DATA.format("llava, file: rows.json, image_folder: imags"), "no such image folder: imags"),
        (DATA.format("scenes, form: captions, count: many"), "count: expected int"),
        (DATA.format("lava, file: rows.json"), "did you mean 'llava'?"),
        (DATA.format("llava, fiel: rows.json"), "did you mean 'file'"),
        ("stages.align.train=[{pattern: 'conector.*', lr: 1e-3}]", "did you mean 'connector.*'"),
        ("stages.align.max_length=8", "raise max_length or shorten the sample"),
        ("stages.align.template=vicunna", "did you mean 'vicuna_v1'?"),
        ("config.projector=nosuch", "known: attention_pool, average_pool, linear, mlp, mlp2x_gelu"),
        ("parts.vision=nowhere", "The part nowhere is not a model folder"),
        ("image={mode: [", "is not valid YAML: line 1"),
    ],
)
def test_a_mistake_is_one_paragraph_and_may_be_mended_in_the_same_folder(monkeypatch, capsys, place, change, words):
    (place / "zero.tar").touch()
    whole = write_tar(place / "whole.tar", [("0.png", png(size=(300, 300))), ("0.txt", b"a")]).read_bytes()
    (place / "cut.tar").write_bytes(whole[:700])
    (place / "cut.json").write_text((place / "rows.json").read_text()[:400])
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", change, "--out", "run")
    assert code == 2
    assert words in " ".join(said.split())
    assert "Traceback" not in said
    assert said.count("isthmus: ") == 1
    if "template" in change:  # one of them goes on to the end: nothing was saved, so the folder is taken over
        code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
        assert code == 0, said


def test_recipes_that_cannot_be_read(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1,\n b: 2")
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "file").touch()
    for name, out, words in (
        ("broken.yaml", "run", "broken.yaml is not valid YAML: line 2, column"),
        ("noise.yaml", "run", "cannot be read: it is not UTF-8 text"),
        ("clip-tiny", "file", "file cannot be a run folder"),
        ("clip-tiny", "file/below", "cannot be a run folder"),
    ):
        code, _, said = run(monkeypatch, capsys, "train", name, "--out", out)
        assert (code, said.count("\n") < 4) == (2, True)
        assert words in " ".join(said.split())


def test_a_disk_that_fills_keeps_what_was_saved(monkeypatch, capsys, place):
    real, free = checkpoint._write_file, [9]

    def write(path, content):
        free[0] -= 1
        if free[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_file", write)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == 2
    assert "What was saved before is intact" in " ".join(said.split())
    assert [p.name for p in (place / "run/stages/align/checkpoints").iterdir()] == ["step-000001"]
    monkeypatch.setattr(checkpoint, "_write_file", real)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == 0, said
    steps = [json.loads(line)["step"] for line in (place / "run/stages/align/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_anywhere_is_told_in_words(monkeypatch, capsys, place):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("isthmus.training.log.MetricLog.write", full)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == 2
    assert "No space left on device (metrics.jsonl). What was saved before is intact" in " ".join(said.split())


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_says_so_and_the_same_command_goes_on(monkeypatch, capsys, place, number, left):
    real = _Run._step

    def step(self, *arguments):
        if self.state.step == 2:
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    monkeypatch.setattr(_Run, "_step", step)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == left
    assert f"Stopped by {number.name} after step 3 of stage 'align'; it is saved" in " ".join(said.split())
    monkeypatch.setattr(_Run, "_step", real)
    code, _, said = run(monkeypatch, capsys, "train", "mine.yaml", "--out", "run")
    assert code == 0, said
