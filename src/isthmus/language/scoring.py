"""Scoring: the likelihoods of many endings of one row, which is read once."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.batch import IGNORE
from isthmus.errors import DataError
from isthmus.language.decoder import Prompt, Read

AT_ONCE = 64
"""Endings in one pass: each holds a copy of the keys and values of the row before it."""


class Continues(Protocol):
    """What scoring needs of a language model."""

    def read(self, prompt: Prompt) -> Read: ...

    def after(self, ids: Int[Tensor, "B T"], read: Read) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits after each of the tokens (B, T) that follow the one row of ``read``."""
        ...


@torch.no_grad()
def score_endings(
    language: Continues, prompt: Prompt, endings: Sequence[Int[Tensor, " _"]], labels: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, " B"]:
    """(B,) sums of log-probabilities of the labelled tokens of B endings of one row.

    ``endings`` are ids (T,), ``labels`` alike with IGNORE. Raises DataError for a prompt of several rows.
    """
    if len(prompt) != 1:
        raise DataError(f"endings are scored after one row, not {len(prompt)}.")
    read = language.read(prompt)
    found = []
    for start in range(0, len(endings), AT_ONCE):
        ids, wanted = _padded(endings[start : start + AT_ONCE], 0), _padded(labels[start : start + AT_ONCE], IGNORE)
        ids, wanted = ids.to(read.logits.device), wanted.to(read.logits.device)
        # The row's last token predicts the first of each ending; what the ending's last one predicts is not needed.
        logits = read.logits[:, None].expand(len(ids), -1, -1)
        if ids.shape[1] > 1:
            logits = torch.cat([logits, language.after(ids[:, :-1], read)], dim=1)
        nll = F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=IGNORE, reduction="none")
        found.append(-nll.sum(1))
    return torch.cat(found)


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
