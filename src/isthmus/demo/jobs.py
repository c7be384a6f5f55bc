"""Trainings and their scoring side by side on one machine: each in a process of its own, as soon as what it needs is
there.

A tiny model leaves a second core idle, so two trainings at once finish almost twice as early. Each job is the program's
own ``isthmus train`` or ``isthmus eval`` with its share of the threads; what it prints lands in ``train.log`` or
``eval.log`` in the model's folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from isthmus.checkpoint import MANIFEST
from isthmus.errors import IsthmusError
from isthmus.lifeline import PARENT
from isthmus.recipes.schema import Recipe

_WAIT = 0.3
_WHOLE = 100
"""Steps of a bar for one task that is scored."""


class JobError(IsthmusError):
    """A job that ran beside others failed. What it said is in the message."""


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """``words`` are the arguments of ``isthmus``; ``needs`` the names of jobs that must be finished before."""

    name: str
    words: Sequence[str]
    folder: Path
    needs: Sequence[str] = ()

    @property
    def log(self) -> Path:
        """Where what it says goes."""
        return self.folder / f"{self.words[0]}.log"

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Is all it makes there?"""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Its length, in steps of its bar."""

    @abstractmethod
    def done(self) -> int:
        """Steps so far, by the folder."""


@dataclass(frozen=True, kw_only=True)
class Training(Job):
    """``isthmus train`` of ``recipe`` in ``folder``."""

    recipe: Recipe

    @property
    def finished(self) -> bool:
        return (self.folder / "model" / MANIFEST).is_file()

    @property
    def steps(self) -> int:
        return sum(spec.stage.steps or 0 for spec in self.recipe.stages)

    def done(self) -> int:
        if self.finished:
            return self.steps
        stages = self.folder / "stages"
        return sum(_steps_done(stages / spec.name, spec.stage.steps or 0) for spec in self.recipe.stages)


@dataclass(frozen=True, kw_only=True)
class Scoring(Job):
    """``isthmus eval`` of the model in ``folder`` on the ``tasks`` of its recipe, into ``folder/eval``."""

    tasks: Sequence[str]

    @property
    def finished(self) -> bool:
        return all((self.folder / "eval" / task / "scores.json").is_file() for task in self.tasks)

    @property
    def steps(self) -> int:
        return _WHOLE * len(self.tasks)

    def done(self) -> int:
        return sum(_part_scored(self.folder / "eval" / task) for task in self.tasks)


def run_jobs(
    jobs: Sequence[Job], *, at_once: int, threads: int, ended: Callable[[Job], None] = lambda job: None
) -> None:
    """Run all that are not finished, at most ``at_once`` at a time, ``threads`` each, with a bar for each; ``ended`` is
    called with each that was run to its end, while others go on.

    Raises JobError as soon as one fails; the others get a signal to save and end first, as by Ctrl-C.
    """
    waiting = [job for job in jobs if not job.finished]
    running: dict[str, subprocess.Popen[bytes]] = {}
    over: list[Job] = []
    with _stopping(running), _bars(waiting) as bars:
        while waiting or running or over:
            for job in [j for j in waiting if _ready(j, jobs)][: at_once - len(running)]:
                waiting.remove(job)
                bars.announce(f"{job.name} begins; what it says goes to {job.log}")
                running[job.name] = _start(job, threads)
            if waiting and not running:
                raise JobError(f"{waiting[0].name} waits for {', '.join(waiting[0].needs)}, and nobody makes that.")
            while over:
                ended(over.pop())
            time.sleep(_WAIT)
            for name, process in list(running.items()):
                job = next(j for j in jobs if j.name == name)
                bars.show(job)
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise JobError(f"{name}: {_last_words(job)}\nAll it said is in {job.log}.")
                    bars.announce(f"{name} is done: {job.folder}")
                    over.append(job)


def _ready(job: Job, jobs: Sequence[Job]) -> bool:
    return all(other.finished for other in jobs if other.name in job.needs)


def _start(job: Job, threads: int) -> "subprocess.Popen[bytes]":
    job.folder.mkdir(parents=True, exist_ok=True)
    share = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "isthmus", *job.words],
            env={**os.environ, **share, PARENT: str(os.getpid()), "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )


@contextmanager
def _stopping(running: Mapping[str, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """However this is left, no job is: each may save before it ends. SIGTERM is taken like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def announce(self, what: str) -> None:
        """A line above the bars, or all there is where nobody watches."""
        self.progress.console.print(what, highlight=False, markup=False, soft_wrap=True)

    def show(self, job: Job) -> None:
        if job.name not in self.tasks:
            self.tasks[job.name] = self.progress.add_task(job.name, total=job.steps, completed=job.done())
        self.progress.update(self.tasks[job.name], completed=job.done())


@contextmanager
def _bars(jobs: Sequence[Job]) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(emoji=False)) as progress:
        bars = _Bars(progress)
        for job in jobs:
            if not job.needs:
                bars.show(job)
        yield bars


def _steps_done(stage: Path, steps: int) -> int:
    if (stage / "trained").is_dir():
        return steps
    try:
        with (stage / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return min(int(json.loads(line)["step"]), steps)
        except (ValueError, KeyError, TypeError):  # a line that is being written, or has other content
            continue
    return 0


def _part_scored(folder: Path) -> int:
    """How much of a task is answered, of _WHOLE."""
    if (folder / "scores.json").is_file():
        return _WHOLE
    try:
        items = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["items"]
        with (folder / "outputs.jsonl").open("rb") as file:
            return min(_WHOLE, _WHOLE * sum(1 for _ in file) // max(1, items))
    except (OSError, ValueError, KeyError):  # not begun, or being written
        return 0


def _last_words(job: Job) -> str:
    """The last paragraph of its log: the program's own message."""
    output = job.log.read_text(encoding="utf-8", errors="replace").rstrip()
    return output.rpartition("isthmus: ")[2] if "isthmus: " in output else "\n".join(output.splitlines()[-5:])
