"""``--processes N``: one voice, the exit code of who failed, signals passed on. A script stands for the program."""

import sys
from pathlib import Path

import pytest

from isthmus.cli.several import Ended, start
from isthmus.cli.train import run

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


def test_the_command_goes_to_each_process_and_the_first_speaks(capfd):
    with pytest.raises(Ended) as ended:
        run("clip-tiny", ["a=1"], Path("out"), tensorboard=True, processes=2, stop_at=3)
    assert ended.value.code == 0
    said, mourned = capfd.readouterr()
    words = ["-m", "isthmus", "train", "clip-tiny", "a=1", "--out", "out", "--stop-at", "3", "--tensorboard"]
    assert said == f"said by 0 {words}\n"
    assert mourned == "mourned by 0\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_is_named_with_what_the_others_said(capfd, victim):
    assert start(["lost", str(victim)], 2) == 128 + 9
    mourned = capfd.readouterr().err
    assert mourned.count("mourned by 1") == 1
    assert mourned.endswith(f"isthmus: process {victim} (counted from 0) ended with code -9.\n")


def test_a_signal_reaches_all_and_their_code_is_the_commands():
    assert start(["stopped"], 3) == 85
