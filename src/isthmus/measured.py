"""What is quicker on this machine: measured once, kept in the user's cache folder."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

Timer = Callable[[], float]

BUDGET = 1.0
"""Seconds that timing may take."""
ROUNDS = 5
"""Rounds at least; no more where the answer is clear."""


def measured_once(
    facts: Sequence[object],
    names: Sequence[str],
    work: Callable[[], Mapping[str, Callable[[], object]]],
    timer: Timer = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each of ``names`` on this machine: kept from an earlier call with such ``facts``, else those of what
    ``work`` makes."""
    key = _key(facts)
    seconds = _recall(key, names)
    if seconds is None:
        seconds = measure(work(), timer)
        _remember(key, seconds)
    return seconds


def _key(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([processor(), torch.__version__, *facts]).encode()).hexdigest()[:16]


def measure(work: Mapping[str, Callable[[], object]], timer: Timer = time.perf_counter) -> dict[str, float]:
    """Seconds: the quickest of several rounds of each, in turns, so that what else runs meets all of them; the first
    round warms up."""
    for run in work.values():
        run()
    best, began, rounds = dict.fromkeys(work, float("inf")), timer(), 0
    while rounds < 2 or (timer() - began < BUDGET and not (rounds >= ROUNDS and _clear(best))):
        rounds += 1
        for name, run in work.items():
            start = timer()
            run()
            best[name] = min(best[name], max(timer() - start, 1e-9))
    return best


def _clear(best: Mapping[str, float]) -> bool:
    low, high = min(best.values()), max(best.values())
    return high / low > 1.15


def processor() -> list[str]:
    """Name and abilities: what distinguishes machines as far as products go."""
    name = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    able = sorted(str(what) for what, has in torch.cpu.get_capabilities().items() if has is True)
    return [name, *able]


def _recall(key: str, names: Sequence[str]) -> dict[str, float] | None:
    """What was measured under ``key``, if it holds a sound figure for each of ``names``."""
    found = _kept().get(key)
    sound = isinstance(found, dict) and all(
        isinstance(found.get(n), float) and 0 < found[n] < float("inf") for n in names
    )
    return found if sound else None


def _remember(key: str, seconds: Mapping[str, float]) -> None:
    """Kept where it can be; without, the next run measures again."""
    with suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(json.dumps(_kept() | {key: dict(seconds)}), encoding="utf-8")
        os.replace(beside, file)


def _file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "isthmus" / "precision.json"


def _kept() -> dict[str, dict[str, float]]:
    """What was measured before; nothing where the file is absent or is not what was written here."""
    with suppress(OSError, ValueError, RuntimeError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}
