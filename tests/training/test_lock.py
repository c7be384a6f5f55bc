"""One writer per run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import isthmus
from isthmus.training.lock import RunBusyError, RunLock
from tests.narrow import there


def _child(folder: Path, body: str) -> subprocess.Popen:
    script = f"from isthmus.training.lock import *\nimport os, sys, time\nwith RunLock({str(folder)!r}):\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1])},
    )


def test_a_second_writer_is_refused_and_a_stale_lock_never_blocks(tmp_path):
    """The holder also forks a child that outlives it: that must not keep the lock either."""
    body = (
        "    if os.fork() == 0:\n        time.sleep(9); os._exit(0)\n    print('locked', flush=True); time.sleep(9)\n"
    )
    holder = _child(tmp_path, body)
    said = there(holder.stdout)
    try:
        assert said.readline().strip() == "locked"
        started = time.perf_counter()
        with pytest.raises(RunBusyError, match=f"process {holder.pid} on "), RunLock(tmp_path):
            pass
        assert time.perf_counter() - started < 1
        assert RunBusyError.exit_code == 3
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        said.close()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass
