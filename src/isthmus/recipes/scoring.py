"""From an evaluation as a recipe (or the command line) names it to a task, and from a model to its scores."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus import checkpoint
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, nearest
from isthmus.evaluation import zero_shot
from isthmus.evaluation.run import Result, evaluate
from isthmus.evaluation.tasks import LinearProbeTask, RetrievalTask, Task, VqaTask, ZeroShotTask
from isthmus.evaluation.vqa import AnswerPrior
from isthmus.model import Model
from isthmus.recipes.schema import EvalSpec, parse_recipe

Progress = Callable[[str, int, int], None]
"""Called with (task, items done, items in all)."""


class _First:
    """The first ``limit`` records of a source."""

    def __init__(self, source: Any, limit: int) -> None:
        self.source, self.limit = source, min(limit, len(source))

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def make_task(spec: EvalSpec, *, seed: int = 0, limit: int | None = None) -> Task:
    """The task that ``spec`` names, on its data. Raises ConfigError for an unknown task or option."""
    records: Any = open_source(spec.data)
    if limit is not None:
        records = _First(records, limit)
    train: Any = open_source(spec.train) if spec.train is not None else None
    options = dict(spec.options)
    try:
        return TASKS[spec.task](spec, records, train, seed, options)
    except KeyError:
        raise ConfigError(f"There is no task {spec.task!r}; {nearest(spec.task, TASKS)}") from None
    except TypeError as error:
        unknown = [name for name in options if repr(name) in str(error)]
        if not unknown:
            raise
        raise ConfigError(f"Task {spec.name!r} ({spec.task}) has no option {unknown[0]!r}.") from None


def _vqa(spec: EvalSpec, records: Any, train: Any, seed: int, options: dict[str, Any]) -> Task:
    prior = AnswerPrior.fit(train[i] for i in range(len(train))) if train is not None else None
    return VqaTask(name=spec.name, records=records, prior=prior, seed=seed, **options)


def _retrieval(spec: EvalSpec, records: Any, train: Any, seed: int, options: dict[str, Any]) -> Task:
    return RetrievalTask(name=spec.name, records=records, seed=seed, **options)


def _zero_shot(spec: EvalSpec, records: Any, train: Any, seed: int, options: dict[str, Any]) -> Task:
    if isinstance(options.get("templates"), str):
        options["templates"] = zero_shot.templates(options["templates"])
    return ZeroShotTask(name=spec.name, records=records, seed=seed, **options)


def _linear_probe(spec: EvalSpec, records: Any, train: Any, seed: int, options: dict[str, Any]) -> Task:
    if train is None:
        raise ConfigError(f"Task {spec.name!r}: a linear probe needs `train`, the data to fit it on.")
    return LinearProbeTask(name=spec.name, records=records, train=train, seed=seed, **options)


TASKS: dict[str, Callable[[EvalSpec, Any, Any, int, dict[str, Any]], Task]] = {
    "vqa": _vqa,
    "retrieval": _retrieval,
    "zero-shot": _zero_shot,
    "linear-probe": _linear_probe,
}


def score_model(
    model: Model,
    specs: Sequence[EvalSpec],
    folder: Path,
    *,
    model_hash: str,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Every task in a folder of its own below ``folder``, going on where an earlier call stopped."""
    found = []
    for spec in specs:
        name = spec.name
        report = (lambda done, total, name=name: progress(name, done, total)) if progress else None
        if spec.task == "retrieval" and model.kind == "clip":
            spec = spec.model_copy(update={"options": {"similarity": model.net.config.similarity, **spec.options}})
        task = make_task(spec, seed=seed, limit=limit)
        found.append(evaluate(model, task, folder / name, model_hash=model_hash, progress=report))
    return found


def own_tasks(folder: Path) -> list[EvalSpec]:
    """The tasks of the recipe that a model folder (or run folder) was trained with; empty without one."""
    for place in (folder / "model" / "recipe.yaml", folder / "recipe.yaml"):
        if place.is_file():
            import yaml

            tree: Mapping[str, Any] = yaml.safe_load(place.read_text(encoding="utf-8"))
            return list(parse_recipe(tree, where=str(place)).evaluate)
    return []


def model_hash(folder: Path) -> str:
    """sha256 that identifies a model's files: of our manifest, or of another format's weights."""
    inner = folder / "model" if (folder / "model").is_dir() else folder
    manifest = inner / checkpoint.MANIFEST
    files = [manifest] if manifest.is_file() else sorted(inner.glob("*.safetensors"))
    return " ".join(checkpoint.file_sha256(f) for f in files)
