"""ROUGE-L (Lin 2004) as the COCO caption scorer counts it: the longest common subsequence with each reference, the
best precision and the best recall over the references (not of one reference), joined with beta = 1.2."""

from collections.abc import Sequence

BETA = 1.2


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """In 0 … 1. An empty candidate scores 0."""
    if not candidate:
        return 0.0
    common = [longest_common(candidate, r) for r in references]
    precision = max(common) / len(candidate)
    recall = max((c / len(r) for c, r in zip(common, references, strict=True) if r), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        corner = 0
        for i, theirs in enumerate(other, start=1):
            corner, row[i] = row[i], corner + 1 if token == theirs else max(row[i], row[i - 1])
    return row[-1]
