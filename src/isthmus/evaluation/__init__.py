"""Scores with intervals, controls and raw outputs; the report page. Sees models and records only as protocols."""

from isthmus.evaluation.answer_tasks import BinaryTask, ConversationTask, LikelihoodTask
from isthmus.evaluation.caption_task import CaptionTask
from isthmus.evaluation.embedding_tasks import LinearProbeTask, RetrievalTask, ZeroShotTask
from isthmus.evaluation.matching import MatchingHeadTask, MatchingTask
from isthmus.evaluation.rescore import compare, rescore
from isthmus.evaluation.results import Results
from isthmus.evaluation.run import Result, evaluate
from isthmus.evaluation.tasks import VqaTask
from isthmus.evaluation.vqa import AnswerPrior, Score, VqaScores

__all__ = [
    "AnswerPrior",
    "BinaryTask",
    "CaptionTask",
    "ConversationTask",
    "LikelihoodTask",
    "LinearProbeTask",
    "MatchingHeadTask",
    "MatchingTask",
    "Result",
    "Results",
    "RetrievalTask",
    "Score",
    "VqaScores",
    "VqaTask",
    "ZeroShotTask",
    "compare",
    "evaluate",
    "rescore",
]
