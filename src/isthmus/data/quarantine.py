"""Quarantine: bad samples are written down and counted, and too many of them stop the run."""

import json
from collections import Counter
from pathlib import Path

from isthmus.errors import DataError


class Quarantine:
    """A JSON-lines file of bad samples (``id``, ``source``, ``reason``), each written once even over resumes: what has
    the same three is one sample that is met again. Two samples of one id are told apart by their reasons alone.

    ``count_read(n)`` adds n samples that were read; when more than ``threshold`` of them were bad, and at least
    ``after`` were read, it raises DataError with the counts. Without a path it only counts.
    """

    def __init__(self, path: Path | str | None = None, *, threshold: float = 0.01, after: int = 100) -> None:
        self.path = None if path is None else Path(path)
        self.threshold, self.after = threshold, after
        self.samples = 0
        self.failures = 0
        self._known: dict[tuple[str, str, str], None] = {}  # source, id and reason, in order
        self._line_break = ""
        if self.path is not None and self.path.is_file():
            written = self.path.read_text(encoding="utf-8")
            for line in written.split("\n"):  # not splitlines: a text may hold other ends of lines
                self._recall(line)
            self._line_break = "" if written.endswith("\n") or not written else "\n"

    def _recall(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[row["source"], row["id"], row["reason"]] = None
        except (ValueError, KeyError, TypeError):
            return  # the half-written last line of a killed run; the sample will be met and written again

    def add(self, id: str, source: str, reason: str) -> None:
        """Note one bad sample."""
        self.failures += 1
        if (source, id, reason) in self._known:
            return
        self._known[source, id, reason] = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"id": id, "source": source, "reason": reason}, ensure_ascii=False)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{self._line_break}{line}\n")
            self._line_break = ""

    def count_read(self, count: int) -> None:
        """``count`` more samples were read, the bad ones among them. Raises DataError above the threshold."""
        self.samples += count
        if self.samples >= self.after and self.failures > self.threshold * self.samples:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in self.reasons().most_common(3))
            where = f"all are listed in {self.path}" if self.path else "there is no quarantine file"
            raise DataError(
                f"{self.failures} of {self.samples} samples are bad, more than the allowed "
                f"{self.threshold:.1%}; most often: {reasons}; for example: {self.example()}. Mend the data "
                f"({where}) or raise the allowed fraction (bad_samples of the stage or task)."
            )

    def reasons(self) -> Counter[str]:
        """Different bad samples by kind of reason: what stands before the first colon."""
        return Counter(reason.split(":", 1)[0] for *_, reason in self._known)

    def example(self) -> str:
        """The first reason in full."""
        return next((reason for *_, reason in self._known), "no reason was noted")

    def summary(self) -> str:
        """``3 bad samples were left out (missing image 2, broken image 1), see …``."""
        first, others = self.reasons().most_common(3), len(self)
        reasons = ", ".join(f"{reason} {n}" for reason, n in first)
        others -= sum(n for _, n in first)
        reasons += f", others {others}" if others else ""
        where = f", see {self.path}" if self.path else ""
        return f"{len(self)} bad sample{'s were' if len(self) > 1 else ' was'} left out ({reasons}){where}"

    def __len__(self) -> int:
        return len(self._known)
