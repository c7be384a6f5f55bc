"""``kill -9`` at random steps, half of them inside a save: the run ends with the same bits as an undisturbed one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import isthmus
from isthmus.checkpoint import file_sha256, read_folder
from isthmus.training.log import read_metrics

TARGET = Path(__file__).with_name("kill_target.py")
TIMES = ("seconds", "tokens_per_second", "data_wait")


def drive(folder: Path, kills: int) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(TARGET), str(folder), str(kills), "11"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_eight_kills_end_in_the_same_bits(tmp_path):
    assert drive(tmp_path / "whole", 0) == "killed 0, inside a save 0, status 0, left over 0"
    told = drive(tmp_path / "killed", 8)
    kills, inside, status, left = (int(word) for word in re.findall(r"\d+", told))
    assert (kills, status, left) == (8, 0, 0)
    assert inside >= 4
    ends = [file_sha256(read_folder(tmp_path / name / "final")["net.safetensors"]) for name in ("whole", "killed")]
    assert ends[0] == ends[1]
    logs = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, 41))
