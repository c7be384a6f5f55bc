"""A toy net with the usual parts and a toy loader, pure in (seed, epoch), for the tests of the training loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from isthmus.batch import IGNORE, Batch, Term, Tokens
from isthmus.net import Net
from tests.narrow import there

VOCAB, WIDTH = 11, 8


class ToyNet(Net):
    """``vision`` (a frozen lookup, with dropout), ``connector`` (linear) and ``language`` (norm, dropout, head)."""

    vision: Any
    language: nn.ModuleDict

    def __init__(self, *, dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vision = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Dropout(0.5))
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.language = nn.ModuleDict(
            {"norm": nn.LayerNorm(WIDTH), "drop": nn.Dropout(dropout), "head": nn.Linear(WIDTH, VOCAB)}
        )
        self.to(dtype)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.connector(self.vision(ids)))
        return self.language["head"](self.language["drop"](self.language["norm"](hidden)))

    def loss(self, batch: Batch) -> dict[str, Term]:
        tokens = batch.text["lm"]
        targets = there(tokens.labels)[:, 1:]
        logits = self.logits(tokens.ids[:, :-1])
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return {"lm": Term(total, int((targets != IGNORE).sum()))}


@dataclass(frozen=True)
class ToyPosition:
    epoch: int
    index: int

    def to_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}


class ToyLoader:
    """``size`` samples of ragged length; each step takes ``batch`` of them, in micro-batches of the sizes ``split``."""

    def __init__(self, *, size: int = 20, batch: int = 4, split: tuple[int, ...] | None = None, seed: int = 0) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.split = split or (batch,)
        self.seen: list[str] = []

    def position(self, saved: Mapping[str, Any]) -> ToyPosition:
        return ToyPosition(saved["epoch"], saved["index"])

    def steps(self, start: ToyPosition) -> Iterator[tuple[ToyPosition, list[Batch]]]:
        epoch, index = start.epoch, start.index
        while True:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            while index + self.batch <= self.size:
                chosen = order[index : index + self.batch]
                index += self.batch
                self.seen.extend(f"s{i}" for i in chosen)
                bounds = pairwise(accumulate(self.split, initial=0))
                yield ToyPosition(epoch, index), [make_batch(chosen[a:b]) for a, b in bounds]
            epoch, index = epoch + 1, 0


def make_batch(samples: list[int]) -> Batch:
    """Sample i: 4-9 tokens drawn from a seed of its own, a prompt of two tokens that is not learnt."""
    rows = []
    for i in samples:
        generator = torch.Generator().manual_seed(i)
        length = 4 + int(torch.randint(6, (), generator=generator))
        rows.append(torch.randint(VOCAB, (length,), generator=generator))
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        labels[n, 2 : len(row)] = row[2:]
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(
        ids=tuple(f"s{i}" for i in samples),
        sources=("toy",) * len(samples),
        text={"lm": Tokens(ids=ids, lengths=lengths, labels=labels)},
    )
