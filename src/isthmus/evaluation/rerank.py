"""Two-step retrieval: the best k by embeddings, put in order by a model that reads picture and text together.

BLIP-2's protocol (2301.12597, sec. 4.3): a pair among the first k scores its similarity plus the matching logit, every
other pair -100. Scored beside the first step alone, on the same pictures, so that the gain has a paired interval.

Shapes: N pictures, M captions, K of each picture's or caption's candidates.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import CapabilityError, ConfigError
from isthmus.evaluation import retrieval
from isthmus.evaluation.bootstrap import Array, Interval, intervals
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.embedding_tasks import RetrievalTask
from isthmus.evaluation.outputs import Manifest, RerankRow
from isthmus.evaluation.protocols import MatchesPairs
from isthmus.evaluation.retrieval import RetrievalScores
from isthmus.evaluation.tasks import seed_of
from isthmus.nn.losses import similarity
from isthmus.processes import all_of, apart, rank, world_size

OTHERS = -100.0
_PAIRS, _PICTURES = 256, 128
"""Pairs and pictures that a Model reads at a time."""
P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)


class MatchLogits(Protocol[P_contra]):
    """The second step of a model: what :class:`.protocols.MatchesPairs` asks beside embeddings, for pictures of any
    kind."""

    def match_logits(self, images: Sequence[P_contra], texts: Sequence[str], pairs: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Gain:
    """Recall@1 after reranking less recall@1 before, with its 95 % interval over resampled pictures."""

    value: float
    interval: Interval

    def to_dict(self) -> dict[str, object]:
        return {"value": self.value, "interval": list(self.interval)}


@dataclass(frozen=True, slots=True)
class RerankScores(RetrievalScores):
    """Both directions after reranking; ``first`` are those of the first step alone."""

    first: RetrievalScores
    image_to_text_gain: Gain
    text_to_image_gain: Gain

    def to_dict(self) -> dict[str, object]:
        both = {"image_to_text": self.image_to_text.to_dict(), "text_to_image": self.text_to_image.to_dict()}
        top = {f"recall_at_{k}": value for k, value in self.image_to_text.recall.items()}
        gains = {"image_to_text": self.image_to_text_gain.to_dict(), "text_to_image": self.text_to_image_gain.to_dict()}
        return {**top, **both, "first_step": self.first.to_dict(), "gain_at_1": gains}


@dataclass(frozen=True, kw_only=True)
class RerankTask(RetrievalTask):
    """Retrieval in two steps; ``rerank`` is k. See the head of this file."""

    kind: ClassVar[str] = "rerank"
    version: ClassVar[int] = 2
    needs: ClassVar[type] = MatchesPairs

    rerank: int = 128

    def __post_init__(self) -> None:
        RetrievalTask.__post_init__(self)
        if self.rerank < 1:
            raise ConfigError(f"Task {self.name!r}: rerank is {self.rerank}; it must be at least 1 candidate.")

    def describe(self) -> dict[str, object]:
        return {**RetrievalTask.describe(self), "rerank": self.rerank}

    def rows(self, model: MatchesPairs, done: Collection[str], *, chunk: int) -> Iterator[list[RerankRow]]:
        pairs = list(self._pairs.values())
        pictures = [picture for _, picture, _ in pairs]
        texts = [self.prefix + c for _, _, captions in pairs for c in captions]
        owner = torch.tensor([i for i, (_, _, captions) in enumerate(pairs) for _ in captions])
        first = similarity(
            embed(model.embed_images, pictures, what="pictures", chunk=chunk),
            embed(model.embed_texts, texts, what="captions", chunk=chunk),
            self.similarity,
        )
        by_image, by_text = two_step(model, pictures, texts, first, self.rerank)
        right = retrieval.owned(owner, retrieval.numbered(texts), torch.arange(len(pairs)), torch.arange(len(texts)))
        of_texts, of_pictures = retrieval.lots(len(texts)), retrieval.lots(len(pairs))
        ranks = [retrieval.rank(values, right, of_texts).tolist() for values in (first, by_image)]
        of_captions = [iter(retrieval.rank(v.T, right.T, of_pictures).tolist()) for v in (first, by_text)]
        rows: list[RerankRow] = [
            {
                "id": name,
                "captions": captions,
                "rank": ranks[1][i],
                "caption_ranks": [next(of_captions[1]) for _ in captions],
                "first_rank": ranks[0][i],
                "first_caption_ranks": [next(of_captions[0]) for _ in captions],
            }
            for i, (name, _, captions) in enumerate(pairs)
        ]
        yield [row for row in rows if row["id"] not in done]

    @classmethod
    def scored(cls, rows: Sequence[RerankRow], manifest: Manifest) -> RerankScores:
        return score(rows, seed=seed_of(manifest))


def score(rows: Sequence[RerankRow], *, seed: int = 0) -> RerankScores:
    """From output rows with the ranks of both steps. Raises DataError when there are none."""
    captions = [r["captions"] for r in rows]
    after, before = (
        retrieval.score(of_images, of_texts, captions, seed=seed)
        for of_images, of_texts in (
            ([r["rank"] for r in rows], [r["caption_ranks"] for r in rows]),
            ([r["first_rank"] for r in rows], [r["first_caption_ranks"] for r in rows]),
        )
    )
    images = np.array([[r["rank"] == 0, r["first_rank"] == 0, 1] for r in rows], dtype=np.float64)
    texts = np.array(
        [[_firsts(r["caption_ranks"]), _firsts(r["first_caption_ranks"]), len(r["captions"])] for r in rows],
        dtype=np.float64,
    )
    gains = [_gain(outcomes, seed) for outcomes in (images, texts)]
    return RerankScores(after.image_to_text, after.text_to_image, before, *gains)


def two_step(
    model: MatchLogits[P], images: Sequence[P], texts: Sequence[str], first: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """(N, M) scores for ranking texts of a picture, and for ranking pictures of a text, from ``first`` (N, M)."""
    of_images = torch.zeros_like(first, dtype=torch.bool)
    of_images.scatter_(1, first.topk(min(k, first.shape[1]), dim=1).indices, True)
    of_texts = torch.zeros_like(first, dtype=torch.bool)
    of_texts.scatter_(0, first.topk(min(k, first.shape[0]), dim=0).indices, True)
    pairs = torch.nonzero(of_images | of_texts)
    logits = _logits(model, images, texts, pairs)
    both = torch.full_like(first, OTHERS)
    both[pairs[:, 0], pairs[:, 1]] = first[pairs[:, 0], pairs[:, 1]] + logits
    return both.masked_fill(~of_images, OTHERS), both.masked_fill(~of_texts, OTHERS)


def _logits(model: MatchLogits[P], images: Sequence[P], texts: Sequence[str], pairs: Tensor) -> Tensor:
    """(n,) logits of ``pairs`` (n, 2), which are in the order of their pictures. Each process takes a run of them, and
    the pictures of these, both cut where a Model's batches begin: these are then those of one process."""
    run = -(-len(pairs) // (_PAIRS * world_size())) * _PAIRS
    mine = pairs[rank() * run :][:run]

    def own() -> Tensor:
        if not len(mine):
            return torch.zeros(0)
        begin, end = int(mine[0, 0]) // _PICTURES * _PICTURES, -(-(int(mine[-1, 0]) + 1) // _PICTURES) * _PICTURES
        with apart():
            logits = model.match_logits(images[begin:end], texts, mine - torch.tensor([begin, 0])).float().cpu()
        if len(logits) != len(mine) or not bool(logits.isfinite().all()):
            raise CapabilityError(
                "The model's matching logits are not one finite number per pair; it cannot be ranked."
            )
        return logits

    return torch.cat(all_of(own))


def _firsts(ranks: Sequence[int]) -> int:
    return sum(rank == 0 for rank in ranks)


def _gain(outcomes: Array, seed: int) -> Gain:
    """From per-picture (hits after, hits before, items)."""

    def difference(sums: Array) -> Array:
        return (sums[:, :1] - sums[:, 1:2]) / sums[:, 2:]

    (spread,) = intervals(outcomes, difference, seed=seed)
    return Gain(float(difference(outcomes.sum(0, keepdims=True))[0, 0]), spread)
