"""Scores that are right by the rule and say little: what the user should know beside them, one warning each."""

import re
import warnings
from collections.abc import Mapping, Sequence

from isthmus.errors import IsthmusWarning

_STOP = re.compile(
    r"(?:</s>|<eos>|<end_of_turn>|<end_of_utterance>|<\|(?:im_end|endoftext|eot_id|end|endofchunk|end_of_text|eom_id)\|>|"
    r"\[SEP\]|<pad>)\s*$"
)


def warn_of(rows: Sequence[Mapping[str, object]], *, captions: bool = False) -> None:
    """Warns of answers that are all empty or end in the text of a stop token, and of CIDEr over one picture."""
    said = [answer for row in rows if isinstance(answer := row.get("answer"), str)]
    for doubt in (_empty(said), _stopped(said), _one_picture(rows) if captions else ""):
        if doubt:
            warnings.warn(doubt, IsthmusWarning, stacklevel=2)


def _empty(said: Sequence[str]) -> str:
    if not said or any(text.strip() for text in said):
        return ""
    return (
        f"All {len(said)} answers are empty, so the scores say nothing. A model that was trained for a few steps only "
        "often ends at once; in a file of predictions look whether the text after the prompt was lost."
    )


def _stopped(said: Sequence[str]) -> str:
    ends = [found[0].strip() for text in said if (found := _STOP.search(text))]
    if not ends:
        return ""
    return (
        f"{len(ends)} of {len(said)} answers end in the text of a stop token ({ends[0]}), which is scored as a part of "
        "the answer; write them without it."
    )


def _one_picture(rows: Sequence[Mapping[str, object]]) -> str:
    if len(rows) != 1:
        return ""
    return (
        "CIDEr weighs words by how few of the pictures' captions hold them: with one picture all weights are 0, and so "
        "is CIDEr, whatever was said."
    )
