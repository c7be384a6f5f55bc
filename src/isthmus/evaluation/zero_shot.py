"""Zero-shot classification by prompt ensembles.

For class c and templates t: u_ct = unit(text(t(c))), w_c = unit(mean over t of u_ct), and the prediction is the class
with the highest cosine between w_c and the picture (Radford et al. 2021, section 3.1.4). A model trained with dot
products or distances is ranked by these, and its vectors keep their lengths: w_c = mean over t of text(t(c)).
Embeddings are averaged, never probabilities. Shapes: N pictures, C classes, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isthmus.data.sources.files import read_lines
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.bootstrap import Interval, intervals
from isthmus.evaluation.embedding import around, embed, unit
from isthmus.evaluation.outputs import ClassRow
from isthmus.evaluation.protocols import Embeds
from isthmus.nn.losses import Similarity, similarity

PLAIN = ("a photo of a {}.",)
SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The subset of CLIP's templates found by forward selection on ImageNet; slightly better there than all eighty."""

TEMPLATES: dict[str, tuple[str, ...]] = {"plain": PLAIN, "seven": SEVEN}


def templates(name_or_file: str | Path) -> tuple[str, ...]:
    """``plain``, ``seven``, or the lines of a text file, each with one ``{}`` for the class name.

    Raises ConfigError: no such file, no line, or a line without exactly one ``{}``. DataError: it is not UTF-8.
    """
    if str(name_or_file) in TEMPLATES:
        return TEMPLATES[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        raise ConfigError(f"No templates at {path}: give {' or '.join(TEMPLATES)}, or a text file of one per line.")
    lines = read_lines(path)
    if not lines:
        raise ConfigError(f"{path} holds no template; write one per line, for example: {PLAIN[0]}")
    check_templates(lines, f"{path}: ")
    return tuple(lines)


def check_templates(lines: Sequence[str], where: str = "") -> None:
    """Raises ConfigError for a template without exactly one ``{}``, and for a text where a list of them should be."""
    if isinstance(lines, str) or not lines:
        raise ConfigError(f"{where}templates must be a list of texts such as {PLAIN[0]!r}, not {lines!r}.")
    for line in lines:
        if line.count("{}") != 1:
            raise ConfigError(f"{where}the template {line!r} needs exactly one {{}} where the class name goes.")


def class_vectors(
    model: Embeds, classes: Sequence[str], prompts: Sequence[str] = PLAIN, *, metric: Similarity = "cosine"
) -> Tensor:
    """(C, D) vectors w_c of the classes: of length one for ``cosine``, as long as they come for the other metrics."""
    texts = [t.replace("{}", c) for c in classes for t in prompts]
    vectors = embed(model.embed_texts, texts, what="prompts")
    if metric != "cosine":
        return vectors.view(len(classes), len(prompts), -1).mean(dim=1)
    return unit(unit(vectors).view(len(classes), len(prompts), -1).mean(dim=1))


def classify(images: Tensor, classes: Tensor, truth: Tensor, *, metric: Similarity = "cosine") -> tuple[Tensor, Tensor]:
    """:func:`by_score` of the similarities of (N, D) pictures with (C, D) class vectors."""
    return by_score(similarity(images, classes, metric), truth)


def by_score(values: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) values and (N,) true classes -> classes by falling value (N, C), the truth's rank from 0 (N,).

    A tie counts against us: an equally good wrong class stands above the right one.
    """
    above, tied = around(values, values.gather(1, truth[:, None]))
    rank = (above | tied).sum(dim=1) - 1
    return torch.argsort(values, dim=1, descending=True, stable=True), rank


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """Fractions of pictures whose class is the first, or among the first five; ``majority`` is the share of the
    commonest class, which needs no picture."""

    n: int
    classes: int
    top_1: float
    top_1_interval: Interval
    top_5: float
    top_5_interval: Interval
    majority: float

    def to_dict(self) -> dict[str, object]:
        return {
            "top_1": self.top_1,
            "top_1_interval": list(self.top_1_interval),
            "top_5": self.top_5,
            "top_5_interval": list(self.top_5_interval),
            "majority": self.majority,
            "gain": self.top_1 - self.majority,
            "n": self.n,
            "classes": self.classes,
        }


def score(rows: Sequence[ClassRow], *, classes: int, seed: int = 0) -> ClassScores:
    """From output rows with ``truth`` and ``rank``. Raises DataError when there are none."""
    if not rows:
        raise DataError("There is nothing to classify: the data set is empty.")
    hits = np.array([[r["rank"] < 1, r["rank"] < 5] for r in rows], dtype=np.float64)
    spread = intervals(hits, lambda sums: sums / len(rows), seed=seed)
    truths = [r["truth"] for r in rows]
    return ClassScores(
        n=len(rows),
        classes=classes,
        top_1=float(hits[:, 0].mean()),
        top_1_interval=spread[0],
        top_5=float(hits[:, 1].mean()),
        top_5_interval=spread[1],
        majority=max(map(truths.count, set(truths))) / len(rows),
    )
