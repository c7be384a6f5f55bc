"""``--processes N``: one voice, the exit code of who failed, signals passed on. A script stands for the program."""

import sys
from ast import literal_eval
from pathlib import Path

import pytest

from isthmus.cli import main
from isthmus.cli.several import Ended, start
from isthmus.cli.train import run
from isthmus.errors import ConfigError

SCRIPT = """#!{python} -S
import os, signal, sys, time
rank = int(os.environ["RANK"])
print("said by", rank, sys.argv[1:], flush=True)
print("mourned by", rank, file=sys.stderr, flush=True)
if sys.argv[3] == "lost":
    if rank == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    sys.exit(75)
if sys.argv[3] == "stopped":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    if rank == 0:
        time.sleep(0.3)
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    file = tmp_path / "program"
    file.write_text(SCRIPT.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_command_goes_to_each_process_and_the_first_speaks(capfd):
    with pytest.raises(Ended) as ended:
        run("clip-tiny", ["a=1"], Path("out"), tensorboard=True, processes=2, stop_at=3)
    assert ended.value.code == 0
    said, mourned = capfd.readouterr()
    words = ["-m", "isthmus", "train", "clip-tiny", "a=1", "--out", "out", "--stop-at", "3", "--tensorboard"]
    assert said == f"said by 0 {words}\n"
    assert mourned == "mourned by 0\n"


def test_an_evaluation_goes_to_each_process_as_it_was_given(monkeypatch, capfd):
    given = [
        "m",
        "--shots",
        "0",
        "4",
        "8",
        "--set",
        "a=b=1",
        "--set",
        "task.rule=exact",
        "--code",
        "my.py",
        "--unquantised",
    ]
    given += ["--seed", "3", "--json", "facts.json", "--out", "a folder", "--data", "d.json", "--judge-model", "-x"]
    monkeypatch.setattr(sys, "argv", ["isthmus", "eval", "--processes", "2", *given])
    with pytest.raises(Ended) as ended:
        main()
    assert ended.value.code == 0
    said, mourned = capfd.readouterr()
    assert mourned == "mourned by 0\n"
    words = literal_eval(said.removeprefix("said by 0 "))
    assert words[:6] == ["-m", "isthmus", "eval", "m", "4", "8"]
    asked: dict[str, object] = {}
    monkeypatch.setattr("isthmus.cli.evaluate.run", lambda model, **options: asked.update(options, model=model))
    seen = []
    for line in (["eval", *given], words[2:]):  # what a process reads is what was written
        monkeypatch.setattr(sys, "argv", ["isthmus", *line])
        with pytest.raises(SystemExit):
            main()
        seen.append(dict(asked))
    assert seen[0] == seen[1]
    assert seen[0]["more_shots"] == [4, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rescore", "scores"], "--processes is for asking a model"), (["m"], "torchrun says how many processes run")],
)
def test_processes_are_for_a_model_and_not_within_torchrun(monkeypatch, capsys, words, message):
    if "m" in words:
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["isthmus", "eval", "--processes", "2", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--processes 2: each process takes a GPU of its own, and torch sees 1"):
        start(["eval"], 2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_is_named_with_what_the_others_said(capfd, victim):
    assert start(["lost", str(victim)], 2) == 128 + 9
    mourned = capfd.readouterr().err
    assert mourned.count("mourned by 1") == 1
    assert mourned.endswith(f"isthmus: process {victim} (counted from 0) ended with code -9.\n")


def test_a_signal_reaches_all_and_their_code_is_the_commands():
    assert start(["stopped"], 3) == 85
