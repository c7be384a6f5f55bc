"""Caption metrics of our own, in pure Python: BLEU-1..4, ROUGE-L, CIDEr-D, and the tokenizer they are counted with."""

from isthmus.evaluation.captions.score import NAMES, CaptionScorer, CaptionScores, score_captions
from isthmus.evaluation.captions.tokens import tokens

__all__ = ["NAMES", "CaptionScorer", "CaptionScores", "score_captions", "tokens"]
