"""results.json: what a run found out, as fractions, with what is needed to read it.

{"models": {"llava": {"accuracy": 0.71, "blind": 0.28, ..., "kinds": {...}}, "clip": {"recall_at_1": 0.87, ...}},
 "seed": 0, "seconds": {"clip": 151.2, ...}, "versions": {...}, "machine": {...}}
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from isthmus.errors import DataError
from isthmus.evaluation.tasks import Scores


def versions() -> dict[str, str]:
    """Of Python and of the packages whose release can move a score; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("isthmus", "torch", "transformers", "tokenizers", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """What the speed, and in the last digits the results, depend on; not the machine's name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


@dataclass(kw_only=True)
class Results:
    """See the head of this file. ``seconds`` are wall-clock seconds by stage."""

    seed: int
    models: dict[str, dict[str, object]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, object] = field(default_factory=machine)

    def add(self, model: str, scores: Scores) -> None:
        """A task's scores under ``models.<model>``, beside those of other tasks. Raises DataError when a name such
        as ``accuracy`` is taken: two tasks of one kind need names of their own."""
        entry = self.models.setdefault(model, {})
        facts = scores.to_dict()
        taken = sorted(entry.keys() & facts.keys())
        if taken:
            raise DataError(
                f"The results of {model!r} already hold {', '.join(taken)}; "
                "put the second task's scores under another model name, such as "
                f"'{model}-heldout'."
            )
        entry.update(facts)

    def write(self, path: str | Path) -> Path:
        """As JSON, written aside and renamed."""
        facts = {
            "models": self.models,
            "seed": self.seed,
            "seconds": self.seconds,
            "versions": self.versions,
            "machine": self.machine,
        }
        return write_json(path, facts)

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Raises DataError: no such file, or not one of ours."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"There are no results at {path}.")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                models=facts["models"],
                seed=facts["seed"],
                seconds=facts["seconds"],
                versions=facts["versions"],
                machine=facts["machine"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a results file of isthmus: {error!r}.") from error


def write_json(path: str | Path, facts: Mapping[str, object]) -> Path:
    """Readable JSON, written aside and renamed, so that there is never half a file."""
    return write_text(path, json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """UTF-8 text, written aside and renamed; half a surrogate pair is written as JSON does, ``\\ud83d``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")  # several processes may write to one comparison
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)
    return path
