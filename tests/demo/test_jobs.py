"""Trainings side by side: order, stopping, what a failed one said; each by the program's own command."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

from isthmus.demo.jobs import JobError, Scoring, Training, run_jobs
from isthmus.opening import load
from isthmus.recipes.run import train
from isthmus.recipes.schema import read_recipe
from tests.miniature import tree


def job(tmp_path, name, *, steps=3, needs=(), **changes):
    values = tree(name)
    values["parts"] = dict(zip(("vision", "language"), (str(tmp_path / "runs" / part) for part in needs), strict=False))
    for stage in values["stages"]:
        stage |= {"steps": steps, **changes}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    folder = tmp_path / "runs" / name
    words = ["train", str(file), "--out", str(folder)]
    return Training(name=name, words=words, folder=folder, recipe=read_recipe(file), needs=needs)


def test_jobs_side_by_side_wait_for_what_they_need_and_train_as_alone(tmp_path):
    clip, lm = job(tmp_path, "clip"), job(tmp_path, "lm")
    llava = job(tmp_path, "llava", needs=("clip", "lm"))
    tasks = [spec.name for spec in clip.recipe.evaluate]
    words = ["eval", str(clip.folder), "--out", str(clip.folder / "eval")]
    scores = Scoring(name="scoring clip", words=words, folder=clip.folder, tasks=tasks, needs=["clip"])
    assert (scores.finished, scores.done(), scores.steps) == (False, 0, 100 * len(tasks))
    jobs, ended = [llava, scores, clip, lm], []
    run_jobs(jobs, at_once=2, threads=1, ended=lambda job: ended.append(job.name))
    assert sorted(ended) == ["clip", "llava", "lm", "scoring clip"]
    assert ended.index("clip") < ended.index("scoring clip")
    assert max(ended.index("clip"), ended.index("lm")) < ended.index("llava")
    assert all(j.finished and j.done() == j.steps for j in jobs)
    assert clip.steps == 3
    assert tasks[0] in scores.log.read_text()
    train(clip.recipe.model_copy(update={"threads": None}), tmp_path / "alone")
    ours, alone = (load(f).net.state_dict() for f in (clip.folder, tmp_path / "alone"))
    assert all((ours[n] - alone[n]).abs().max() < 1e-4 for n in ours)  # of another number of threads
    before = clip.log.stat().st_mtime_ns
    run_jobs(jobs, at_once=2, threads=1)  # all is there already
    assert clip.log.stat().st_mtime_ns == before


def test_a_failure_stops_the_others_and_says_why(tmp_path):
    slow = job(tmp_path, "lm", steps=100_000)
    broken = job(tmp_path, "clip", data=[{"kind": "csv", "file": str(tmp_path / "none.csv")}])
    with pytest.raises(JobError, match=r"(?s)^clip: .*none\.csv") as caught:
        run_jobs([slow, broken], at_once=2, threads=1)
    assert str(broken.log) in str(caught.value)
    assert not slow.finished
    assert "Stopped by SIGTERM" in slow.log.read_text() or slow.done() == 0
    assert (
        b"isthmus.cli"
        not in subprocess.run(["ps", "-o", "args", "--ppid", str(os.getpid())], capture_output=True).stdout
    )


def test_jobs_that_wait_for_each_other_are_named(tmp_path):
    one, other = job(tmp_path, "clip"), job(tmp_path, "lm")
    circle = [replace(one, needs=("lm",)), replace(other, needs=("clip",))]
    with pytest.raises(JobError, match="clip waits for lm"):
        run_jobs(circle, at_once=2, threads=1)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a job ends with its parent on Linux only")
def test_no_job_outlives_a_parent_that_was_killed(tmp_path):
    slow = job(tmp_path, "lm", steps=100_000)
    code = (
        "import sys; from pathlib import Path; from isthmus.demo.jobs import Training, run_jobs; "
        "from isthmus.recipes.schema import read_recipe; f = Path(sys.argv[1]); "
        "j = Training(name='lm', words=sys.argv[2:], folder=f, recipe=read_recipe(sys.argv[3])); "
        "run_jobs([j], at_once=1, threads=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(slow.folder), *slow.words], stdout=subprocess.DEVNULL)
    try:
        _until(lambda: slow.done() > 0)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _until(lambda: "Stopped by SIGTERM" in slow.log.read_text())


def _until(happened, seconds=180):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)
