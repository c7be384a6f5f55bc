"""BLIP-2's contrast over queries and its hard negatives (Li et al. 2023, 2301.12597, sec. 3.1), on any number of
processes.

Legend: B rows of this process, G rows of all processes, Q queries, E common width, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.batch import Tokens
from isthmus.errors import DataError
from isthmus.nn.losses import gather, gather_around, own_columns, same_picture, widen
from isthmus.processes import talking, world_size


@dataclass(frozen=True, slots=True)
class Contrast:
    """``loss`` (scalar mean over B) and the scaled similarities (B, G) of own images with all texts, own texts with
    all images."""

    loss: Float[Tensor, ""]
    image_to_text: Float[Tensor, "B G"]
    text_to_image: Float[Tensor, "B G"]


def query_contrast(
    images: Float[Tensor, "B Q E"],
    texts: Float[Tensor, "B E"],
    temperature: Float[Tensor, ""],
    *,
    smoothing: float = 0.1,
) -> Contrast:
    """Image-text contrast (ITC) from unit vectors ``images`` (B, Q, E) and ``texts`` (B, E).

    An image is as similar to a text as the best of its queries; that maximum is divided by ``temperature``. The
    loss is the mean of both directions' cross-entropy with label smoothing.

    Values and gradients are those of one process that holds all rows: the other processes' rows are gathered, and
    their losses' gradients come back to the rows' own process.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts, temperature = widen(images), widen(texts), widen(temperature)
        all_images, all_texts = gather(images), gather(texts)
        image_to_text = torch.einsum("bqe,ge->bgq", images, all_texts).amax(-1) / temperature
        text_to_image = torch.einsum("be,gqe->bgq", texts, all_images).amax(-1) / temperature
        target = own_columns(len(images), images.device)
        losses = [F.cross_entropy(s, target, label_smoothing=smoothing) for s in (image_to_text, text_to_image)]
        return Contrast((losses[0] + losses[1]) / 2, image_to_text, text_to_image)


@torch.no_grad()
def hard_negatives(
    contrast: Contrast, keys: Sequence[str], names: Sequence[str]
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """For each own text a wrong image, for each own image a wrong text: (B,), (B,) numbers among the G rows.

    Drawn with the probability the contrast gives them, so that likely mistakes come often. The own pair is never
    drawn, nor a row that shows the same picture (equal non-empty ``keys``). ``names`` are the rows' ids.

    Raises DataError for a row that has no other picture to be drawn.
    """
    sides = (contrast.text_to_image.detach(), contrast.image_to_text.detach())
    barred = barred_pairs(keys, sides[0])
    stuck = torch.nonzero(barred.all(dim=1)).flatten().tolist()
    if stuck:
        raise DataError(
            f"sample {names[stuck[0]]!r} has no negative to be matched with: every pair of the batch shows its "
            "picture. Image-text matching needs at least two different pictures in a batch; raise batch_size."
        )
    images, texts = (torch.multinomial(s.masked_fill(barred, -torch.inf).softmax(1), 1)[:, 0] for s in sides)
    return images, texts


def barred_pairs(keys: Sequence[str], scores: Tensor) -> Tensor:
    """(B, G) bool, true where a column is the row's own pair or shows the same picture."""
    own = own_columns(len(scores), scores.device)
    barred = F.one_hot(own, scores.shape[1]).bool()
    same = same_picture(keys, own)
    return barred if same is None else barred | same


@torch.no_grad()
def gather_tokens(tokens: Tokens) -> Tokens:
    """The token rows of all processes, (G, T) with the longest T of any. Without the labels."""
    if world_size() == 1:
        return Tokens(ids=tokens.ids, lengths=tokens.lengths)
    width = torch.tensor(tokens.ids.shape[1], device=tokens.ids.device)
    with talking():
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
    ids = F.pad(tokens.ids, (0, int(width) - tokens.ids.shape[1]))
    return Tokens(ids=gather_around(ids), lengths=gather_around(tokens.lengths))
