"""What a run says while it trains: JSON lines always, trackers on request, a progress bar with time left."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NotRequired, TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from isthmus.training.trackers import open_trackers


class StepFacts(TypedDict):
    """What a step says of itself. ``loss`` is none where the step was skipped."""

    loss: Mapping[str, float] | None
    lr: NotRequired[Mapping[str, float]]
    grad_norm: NotRequired[Mapping[str, float]]
    skipped: NotRequired[bool]
    order: NotRequired[str]
    validation: NotRequired[Mapping[str, float]]


class MetricLine(StepFacts):
    """A line of ``metrics.jsonl``. That of step 0, before any loss, holds what validation found."""

    step: int
    samples: int
    seconds: float
    epoch: NotRequired[object]
    tokens_per_second: NotRequired[float]
    supervised: NotRequired[float]
    data_wait: NotRequired[float]


class MetricLog:
    """``metrics.jsonl``, one line per logged step. Opened for a run at ``step``: later lines are cut away.

    With ``writes`` false it does nothing: of several processes one writes.
    """

    def __init__(self, folder: Path, step: int, *, report_to: Sequence[str] = (), writes: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        if writes:
            self._truncate(step)
        self._file = self.path.open("a", encoding="utf-8") if writes else None
        self._trackers = open_trackers(report_to, folder, step) if writes else []

    def write(self, line: MetricLine) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._trackers:
            numbers = dict(_flat(line))
            for tracker in self._trackers:
                tracker.log(numbers, line["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _truncate(self, step: int) -> None:
        """Drop lines after ``step`` and a last line that a kill cut short, in one atomic replacement."""
        if not self.path.exists():
            return
        kept = [text for text, line in _lines(self.path) if line["step"] <= step]
        aside = self.path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)


def read_metrics(path: str | Path) -> list[MetricLine]:
    """The lines of a ``metrics.jsonl``; an unfinished last line is left out."""
    return [line for _, line in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[str, MetricLine]]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line: MetricLine = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield text, line


def _flat(line: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            yield f"{prefix}{name}", value


class Bar:
    """One line of a progress display."""

    def __init__(self, display: Progress | None, title: str, total: int, done: int) -> None:
        self._display = display
        self._task = display.add_task(title, total=total, completed=done, note="") if display else None

    def show(self, done: int, losses: Mapping[str, float]) -> None:
        if self._display is not None and self._task is not None:
            note = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            self._display.update(self._task, completed=done, note=note)


@contextmanager
def progress_bar(progress: Progress | bool, title: str, total: int, done: int) -> Iterator[Bar]:
    """A bar in the given display, in one of its own (true), or none (false)."""
    display = make_progress() if progress is True else progress or None
    # A display handed in is already running and belongs to the caller.
    with display if progress is True and display is not None else nullcontext():
        yield Bar(display, title, total, done)


def make_progress() -> Progress:
    """The project's display: title, bar, count, elapsed, time left, and a free ``note`` field."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
