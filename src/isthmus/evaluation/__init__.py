"""Scores with intervals, controls and raw outputs; the report page. Sees models and records only as protocols."""

from isthmus.evaluation.results import Results
from isthmus.evaluation.run import Result, evaluate
from isthmus.evaluation.tasks import LinearProbeTask, RetrievalTask, VqaTask, ZeroShotTask
from isthmus.evaluation.vqa import AnswerPrior, Score, VqaScores

__all__ = [
    "AnswerPrior",
    "LinearProbeTask",
    "Result",
    "Results",
    "RetrievalTask",
    "Score",
    "VqaScores",
    "VqaTask",
    "ZeroShotTask",
    "evaluate",
]
