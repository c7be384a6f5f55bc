"""The task class that made a score folder, from its manifest: no model and no data are needed to score it again.

The tasks of the package go by their kind; a user's task by its code, which the user names again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from isthmus.config import fit
from isthmus.errors import ConfigError, nearest
from isthmus.evaluation import rules
from isthmus.evaluation.answer_tasks import BinaryTask, ConversationTask, LikelihoodTask
from isthmus.evaluation.caption_task import CaptionTask
from isthmus.evaluation.embedding_tasks import LinearProbeTask, RetrievalTask, ZeroShotTask
from isthmus.evaluation.grouped import CircularTask, MmeTask
from isthmus.evaluation.judged import JudgedTask
from isthmus.evaluation.matching import MatchingTask
from isthmus.evaluation.outputs import Manifest, ScoredRow
from isthmus.evaluation.rerank import RerankTask
from isthmus.evaluation.tasks import Scores, StandardTask, Task, VqaTask, seed_of
from isthmus.user_code import label, pin, resolve

KINDS: Mapping[str, type[StandardTask]] = {
    task.kind: task
    for task in (
        VqaTask,
        BinaryTask,
        LikelihoodTask,
        ConversationTask,
        MmeTask,
        CircularTask,
        JudgedTask,
        CaptionTask,
        RetrievalTask,
        RerankTask,
        ZeroShotTask,
        LinearProbeTask,
        MatchingTask,
    )
}


def users_task(name: str) -> type[Task]:
    """The class that a pinned name says. Raises ConfigError when it is no task."""
    cls = resolve(name)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ConfigError(f"Task {label(name)!r} must be a class that derives from isthmus.evaluation.tasks.Task.")
    return cls


def task_class(manifest: Manifest, code: Iterable[str | Path] = ()) -> type[Task]:
    """Of a user's task the class in that file of ``code``, whatever it says now: who names it means it.

    Raises ConfigError for an unknown kind of task, and for a user's task whose file is not named.
    """
    if (made_by := manifest.get("code")) is not None:
        name, _, cls = str(made_by).partition("#")[0].rpartition(":")
        for file in map(Path, code):
            if file.name == name:
                return users_task(pin(f"{file.absolute()}:{cls}"))
        raise ConfigError(
            f"This folder was scored by the task {cls} of your {name}: name that file, --code PATH/{name}, or "
            "rescore(..., code=[FILE])."
        )
    kind = str(manifest.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"No scorer for tasks of kind {kind!r}; {nearest(kind, KINDS)}")
    return KINDS[kind]


def score_again(task: type[Task], rows: Sequence[ScoredRow], manifest: Manifest) -> Scores:
    """The scores of a finished folder."""
    if issubclass(task, StandardTask) and task.score is StandardTask.score:
        return task.scored(rows, manifest)
    return _without_data(task, manifest).score(rows)


def _without_data(cls: type[Task], manifest: Manifest) -> Task:
    """The task as it was, but for its records: its options are what the manifest says under a field's name."""
    kinds, options = get_type_hints(cls), {}
    facts: Mapping[str, object] = manifest
    for name in {f.name for f in fields(cls) if f.init} & set(facts) - {"name", "records", "train", "seed"}:  # type: ignore[arg-type]
        try:
            options[name] = fit(kinds[name], facts[name], name)
        except ConfigError:
            continue  # described in another form, such as the hash of a file: not what was set
    none: dict[str, object] = {"train": ()} if "train" in kinds else {}
    try:
        return cls(name=str(manifest.get("task")), records=(), seed=seed_of(manifest), **none, **options)  # type: ignore[call-arg]
    except TypeError as error:
        raise ConfigError(
            f"A task {cls.__name__} cannot be scored again from its folder: {error}. Its describe() must give what its "
            "score reads, under the fields' names."
        ) from None


def scorer_of(kind: str, version: int | None, manifest: Mapping[str, object]) -> dict[str, object]:
    """Name and version of what scores a folder, for its manifest; with the rule's where answers get points by one.
    A kind that is not of the package (a task of the user's own) stands without a version."""
    facts: dict[str, object] = {"name": kind, "version": version}
    if "rule" in manifest:
        facts["rule"] = f"{manifest['rule']} {rules.rule(manifest['rule']).version}"
    return facts
