"""What turns the rows of a score folder into scores, by the kind of task: no model and no data are needed.

Beside the scores, each kind says how it can be compared pair by pair: its outcomes per item as columns, and the
statistic of their sums (see :mod:`.paired`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.errors import ConfigError, nearest
from isthmus.evaluation import (
    answer_tasks,
    binary,
    caption_task,
    choice,
    grouped,
    judged,
    matching,
    rerank,
    retrieval,
    rules,
    vqa,
    zero_shot,
)
from isthmus.evaluation.bootstrap import Array
from isthmus.evaluation.captions import NAMES
from isthmus.evaluation.captions.score import VERSION as CAPTION_VERSION
from isthmus.evaluation.captions.score import CaptionScorer, from_sums
from isthmus.evaluation.tasks import Row, Scores

Manifest = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """(n, C) ``columns`` per item; ``statistic`` maps their sums over n items to the scores named ``names``."""

    columns: Array
    statistic: Callable[[Array], Array]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """``version`` is raised with every change that can move a score. ``outcomes`` is none where the score is no
    function of sums over items (an AUC)."""

    version: int
    score: Callable[[Rows, Manifest], Scores]
    outcomes: Callable[[Rows, Manifest], Outcomes] | None = None


def _rule(manifest: Manifest) -> vqa.Rule:
    return rules.rule(str(manifest.get("rule", "exact")))


def _seed(manifest: Manifest) -> int:
    return int(manifest.get("seed", 0))


def _points(rule: vqa.Rule, rows: Rows) -> Outcomes:
    points = np.array([[rule.points(r["answer"], r)] for r in rows], dtype=np.float64)
    return Outcomes(points, lambda sums: sums / len(rows), ("accuracy",))


def _binary(rows: Rows, manifest: Manifest) -> Outcomes:
    return Outcomes(binary.table(rows), lambda s: binary.rates(s)[..., [0, 3]], ("accuracy", "f1"))


def _captions(rows: Rows, manifest: Manifest) -> Outcomes:
    scorer = CaptionScorer({r["id"]: r["truth"] for r in rows})
    columns = scorer.outcomes({r["id"]: r["answer"] for r in rows})
    return Outcomes(columns, lambda sums: from_sums(sums, len(rows)), NAMES)


def _retrieval(rows: Rows, manifest: Manifest) -> Outcomes:
    columns = [[r["rank"] < 1, sum(k < 1 for k in r["caption_ranks"]), len(r["caption_ranks"])] for r in rows]
    names = ("image to text R@1", "text to image R@1")

    def statistic(sums: Array) -> Array:
        return np.stack([sums[..., 0] / len(rows), sums[..., 1] / sums[..., 2]], axis=-1)

    return Outcomes(np.array(columns, dtype=np.float64), statistic, names)


def _ranks(rows: Rows, manifest: Manifest) -> Outcomes:
    columns = np.array([[r["rank"] < 1, r["rank"] < 5] for r in rows], dtype=np.float64)
    return Outcomes(columns, lambda sums: sums / len(rows), ("top_1", "top_5"))


def _classes(rows: Rows, manifest: Manifest) -> Scores:
    return zero_shot.score(rows, classes=len(manifest["classes"]), seed=_seed(manifest))


SCORERS: dict[str, Scorer] = {
    "vqa": Scorer(
        version=1,
        score=lambda rows, m: vqa.score(rows, rule=_rule(m), seed=_seed(m)),
        outcomes=lambda rows, m: _points(_rule(m), rows),
    ),
    "binary": Scorer(version=1, score=lambda rows, m: binary.score(rows, seed=_seed(m)), outcomes=_binary),
    "likelihood": Scorer(
        version=1,
        score=lambda rows, m: vqa.score(rows, rule=choice.CHOICE, seed=_seed(m)),
        outcomes=lambda rows, m: _points(choice.CHOICE, rows),
    ),
    "conversation": Scorer(
        version=1,
        score=lambda rows, m: answer_tasks.score_conversation(rows, rule=_rule(m), seed=_seed(m)),
        outcomes=lambda rows, m: _points(_rule(m), rows),
    ),
    "mme": Scorer(
        version=1,
        score=lambda rows, m: grouped.score_mme(rows, seed=_seed(m)),
        outcomes=lambda rows, m: _points(_rule(m), rows),
    ),
    "circular": Scorer(
        version=1,
        score=lambda rows, m: grouped.score_circular(rows, seed=_seed(m)),
        outcomes=lambda rows, m: _points(_rule(m), rows),
    ),
    "judged": Scorer(
        version=1,
        score=lambda rows, m: judged.score(rows, seed=_seed(m)),
        outcomes=lambda rows, m: Outcomes(judged.columns(rows), lambda s: judged.ratio(s), ("relative",)),
    ),
    "caption": Scorer(
        version=CAPTION_VERSION,
        score=lambda rows, m: caption_task.score(rows, seed=_seed(m)),
        outcomes=_captions,
    ),
    "retrieval": Scorer(
        version=3,
        score=lambda rows, m: retrieval.score(
            [r["rank"] for r in rows],
            [r["caption_ranks"] for r in rows],
            [r["captions"] for r in rows],
            seed=_seed(m),
        ),
        outcomes=_retrieval,
    ),
    "rerank": Scorer(version=2, score=lambda rows, m: rerank.score(rows, seed=_seed(m)), outcomes=_retrieval),
    "zero_shot": Scorer(version=1, score=_classes, outcomes=_ranks),
    "linear_probe": Scorer(version=1, score=_classes, outcomes=_ranks),
    "matching": Scorer(version=1, score=lambda rows, m: matching.score(rows, seed=_seed(m))),
}


def scorer(kind: str) -> Scorer:
    """Raises ConfigError for an unknown kind of task."""
    if kind not in SCORERS:
        raise ConfigError(f"No scorer for tasks of kind {kind!r}; {nearest(kind, SCORERS)}")
    return SCORERS[kind]


def scorer_of(kind: str, manifest: Manifest) -> dict[str, Any]:
    """Name and version of what scores a folder, for its manifest; with the rule's where answers get points by one.
    A kind that is not of the package (a task of the user's own) stands without a version."""
    facts: dict[str, Any] = {"name": kind, "version": SCORERS[kind].version if kind in SCORERS else None}
    if "rule" in manifest:
        facts["rule"] = f"{manifest['rule']} {rules.rule(manifest['rule']).version}"
    return facts
