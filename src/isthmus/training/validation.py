"""Validation on the way: what is measured every so often, which step was the best, and when there is no use going on.

All that is remembered stands in ``metrics.jsonl``: a resumed run reads there what was found up to its checkpoint, so it
keeps and stops where an uninterrupted one does.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy
import torch

from isthmus.errors import ConfigError, nearest
from isthmus.training.log import MetricLine

KEY: Final = "validation"
"""Where a line of ``metrics.jsonl`` has what was found after its step."""


@dataclass
class Validation:
    """``measure`` gives the numbers of the net as it is, by name; it runs at step 0, every ``every`` steps and at the
    stage's end.

    With a ``metric``, one of their names, the best step so far is kept by ``keep(step, numbers)``: the lowest where
    the name ends in ``loss``, else the highest. After ``patience`` validations in a row without a better one the stage
    ends. ``kept`` gives the step that ``keep`` kept last.
    """

    every: int
    measure: Callable[[], Mapping[str, float]]
    metric: str | None = None
    patience: int | None = None
    keep: Callable[[int, Mapping[str, float]], None] = lambda step, numbers: None
    kept: Callable[[], int | None] = lambda: None
    found: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def begin(self, lines: Iterable[MetricLine], step: int) -> None:
        """Remember what a run found up to ``step``."""
        self.found = {line["step"]: line[KEY] for line in lines if KEY in line and line["step"] <= step}

    def due(self, step: int, *, last: bool) -> bool:
        return step not in self.found and (last or step % self.every == 0)

    def validate(self, step: int) -> Mapping[str, float]:
        """Measure after ``step``. The random generators are left as they were.

        Raises ConfigError for a ``metric`` that is none of the numbers, or is no number here.
        """
        with undisturbed(), torch.no_grad():
            numbers = dict(self.measure())
        if self.metric is not None and not math.isfinite(numbers.get(self.metric, math.nan)):
            among = [name for name, value in numbers.items() if math.isfinite(value)]
            what = "is not finite" if self.metric in numbers else "is given by none of the tasks"
            raise ConfigError(
                f"validate.keep_best: the metric {self.metric!r} {what} after step {step}; "
                f"{nearest(self.metric, among, many=5)}"
            )
        self.found[step] = numbers
        return numbers

    @property
    def best(self) -> int | None:
        """The first step with the best metric; none before any."""
        metric = self.metric
        if metric is None or not self.found:
            return None
        sign = 1 if metric.endswith("loss") else -1
        return min(self.found, key=lambda step: (sign * self.found[step][metric], step))

    @property
    def over(self) -> bool:
        """Whether so many validations came after the best one that the stage is to end."""
        best = self.best
        return best is not None and self.patience is not None and sum(s > best for s in self.found) >= self.patience


@contextmanager
def undisturbed() -> Iterator[None]:
    """While inside, random numbers may be drawn that nothing outside notices."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
