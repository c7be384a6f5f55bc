"""Scores of files: official references and predictions in, ``corpus`` and ``per_item`` out, no model needed."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, get_args

import numpy as np

from isthmus.checkpoint import file_sha256
from isthmus.errors import ConfigError, nearest
from isthmus.evaluation import official, rules
from isthmus.evaluation.bootstrap import intervals
from isthmus.evaluation.captions import java, score_captions
from isthmus.evaluation.captions.score import VERSION as CAPTION_VERSION
from isthmus.evaluation.doubts import warn_of
from isthmus.evaluation.outputs import AnswerRow, Manifest
from isthmus.evaluation.results import versions, write_json, write_text
from isthmus.evaluation.scorers import KINDS, scorer_of
from isthmus.evaluation.vqa import Rule

FileTask = Literal["caption", "vqa", "ok-vqa"]


class FileFacts(TypedDict):
    """What ``isthmus score --json`` writes."""

    task: str
    left_out: int
    n: int
    empty: int
    corpus: Mapping[str, float]
    intervals: Mapping[str, list[float]]
    by_answer_type: NotRequired[dict[str, float]]
    by_question_type: NotRequired[dict[str, float]]
    per_item: Mapping[str, Mapping[str, float]]
    scorer: dict[str, object]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class FileScores:
    """``rows`` are the items as a score folder keeps them."""

    facts: FileFacts
    rows: list[AnswerRow]


def score_files(
    references: Path,
    predictions: Path,
    task: str,
    *,
    subset: bool = False,
    metrics: Sequence[str] = (),
    seed: int = 0,
) -> FileScores:
    """Score official files.

    Args:
        task: ``caption`` (COCO formats), ``vqa`` (VQA v2 formats) or ``ok-vqa`` (the same, answers stemmed).
        subset: score only the items that have a prediction; how many were left out is in the facts.
        metrics: ``METEOR``, ``SPICE``: what needs Java.

    Raises ConfigError (unknown task or metric), DataError (the files), MissingExtraError (Java).
    """
    if task not in get_args(FileTask):
        raise ConfigError(f"There is no file task {task!r}; {nearest(task, get_args(FileTask))}")
    for name in metrics:
        if name not in java.JAVA_NAMES:
            raise ConfigError(f"There is no metric {name!r} to add; {nearest(name, java.JAVA_NAMES)}")
        if task != "caption":
            raise ConfigError(f"{name} scores captions; the task is {task!r}.")
        java.check(name)
    if task == "caption":
        return _captions(references, predictions, subset, metrics, seed)
    return _vqa(references, predictions, rules.rule(task), subset, seed)


def _captions(references: Path, predictions: Path, subset: bool, metrics: Sequence[str], seed: int) -> FileScores:
    theirs = official.caption_references(references)
    given = official.predictions(predictions, "image_id", "caption")
    ids = official.match(theirs, given, what="image_id", subset=subset)
    chosen = {i: theirs[i] for i in ids}
    extra = {name: java.java_scores(name, chosen, given) for name in metrics}
    scores = score_captions(chosen, given, extra=extra, seed=seed)
    rows = [_row(i, "other", theirs[i], given[i]) for i in ids]
    warn_of(rows, captions=True)
    facts: FileFacts = {
        "task": "caption",
        "left_out": len(theirs) - len(ids),
        "n": scores.n,
        "corpus": scores.corpus,
        "intervals": {name: list(ends) for name, ends in scores.intervals.items()},
        "per_item": scores.per_item,
        "empty": scores.empty,
        "scorer": {"name": "caption", "version": CAPTION_VERSION},
        "versions": versions(),
    }
    return FileScores(facts, rows)


def _row(name: str, kind: str, truth: list[str], answer: str) -> AnswerRow:
    """Neither question nor controls are in such files."""
    return {"id": name, "kind": kind, "truth": truth, "answer": answer}


def _vqa(references: Path, predictions: Path, rule: Rule, subset: bool, seed: int) -> FileScores:
    theirs = official.vqa_references(references)
    key = official.vqa_key(references)
    given = official.predictions(predictions, key, "answer")
    ids = official.match(theirs, given, what=key, subset=subset)
    rows = [_row(i, theirs[i].answer_type, list(theirs[i].answers), given[i]) for i in ids]
    warn_of(rows)
    points = np.array([rule.points(row["answer"], row) for row in rows])
    spread = intervals(points[:, None], lambda sums: sums / len(ids), seed=seed)
    groups: dict[str, defaultdict[str, list[float]]] = {
        "by_answer_type": defaultdict(list),
        "by_question_type": defaultdict(list),
    }
    for i, value in zip(ids, points, strict=True):
        groups["by_answer_type"][theirs[i].answer_type].append(float(value))
        groups["by_question_type"][theirs[i].question_type].append(float(value))
    by = {name: {k: float(np.mean(v)) for k, v in group.items()} for name, group in groups.items()}
    facts: FileFacts = {
        "task": rule.name,
        "left_out": len(theirs) - len(ids),
        "n": len(ids),
        "empty": sum(not given[i].strip() for i in ids),
        "corpus": {"vqa_accuracy": float(points.mean())},
        "intervals": {"vqa_accuracy": list(spread[0])},
        "by_answer_type": by["by_answer_type"],
        "by_question_type": by["by_question_type"],
        "per_item": {i: {"vqa_accuracy": float(v)} for i, v in zip(ids, points, strict=True)},
        "scorer": {"name": rule.name, "version": rule.version},
        "versions": versions(),
    }
    return FileScores(facts, rows)


def write_folder(folder: Path, scores: FileScores, references: Path, predictions: Path, *, seed: int = 0) -> None:
    """The scores as a score folder, so that they can be scored again and paired with others.

    Raises ConfigError when there is something in the folder already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; scores are never written over others.")
    kind = "caption" if scores.facts["task"] == "caption" else "vqa"
    own: Manifest = {"task": scores.facts["task"], "kind": kind, "seed": seed, "items": len(scores.rows)}
    if kind != "caption":
        own["rule"] = scores.facts["task"]
    manifest = {
        **own,
        "scorer": scorer_of(kind, KINDS[kind].version, own),
        "data": file_sha256(references),
        "model": f"predictions {file_sha256(predictions)}",
        "versions": scores.facts["versions"],
    }
    write_json(folder / "manifest.json", manifest)
    write_text(folder / "outputs.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in scores.rows))
    found = KINDS[kind].scored(scores.rows, own)
    write_json(folder / "scores.json", {"task": scores.facts["task"], "kind": kind, **found.to_dict()})
