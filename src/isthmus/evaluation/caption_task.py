"""Captioning: one caption per picture, against all of its references, beside what can be written without the
picture."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.bootstrap import Array, Interval, Outcomes, intervals
from isthmus.evaluation.captions import NAMES, CaptionScorer, CaptionScores, score_captions
from isthmus.evaluation.captions.bleu import ngrams
from isthmus.evaluation.captions.score import VERSION, from_sums
from isthmus.evaluation.captions.tokens import tokens
from isthmus.evaluation.controls import Control, ControlPlan, answers_with_controls, check_controls, shuffled_among
from isthmus.evaluation.outputs import Manifest, SaidRow, Way, said
from isthmus.evaluation.protocols import Answers, Records, S, Sample, TextPart
from isthmus.evaluation.tasks import StandardTask, fingerprint, listed, seed_of, unique
from isthmus.evaluation.turns import captions_of
from isthmus.evaluation.vqa import controls_of

MAIN = "CIDEr"
"""The score that the gain is given in."""


def typical_caption(records: Sequence[Sample]) -> str:
    """The training caption that says what most captions say: a constant answer that needs no picture.

    Of the captions at least as long as the median, the one whose n-grams occur in most captions on average; of equal
    ones the alphabetically first. Raises DataError without captions.
    """
    captions = sorted({c for r in records for c in captions_of(r) if tokens(c)})
    if not captions:
        raise DataError("The prior needs training captions, and there are none.")
    cut = {c: tokens(c) for c in captions}
    counts: Counter[tuple[str, ...]] = Counter()
    for words in cut.values():
        counts.update({g for order in ngrams(words) for g in order})
    median = sorted(map(len, cut.values()))[len(cut) // 2]
    long_enough = [c for c in captions if len(cut[c]) >= median]

    def commonness(caption: str) -> float:
        grams = [g for order in ngrams(cut[caption]) for g in order]
        return sum(counts[g] for g in grams) / len(grams)

    return min(long_enough, key=lambda c: (-commonness(c), c))


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTaskScores:
    """Corpus scores with intervals, the same of each control, and the gain in CIDEr above the best of these."""

    answer: CaptionScores
    controls: Mapping[str, Mapping[str, float]]
    gain: float | None = None
    gain_interval: Interval | None = None

    def to_dict(self) -> dict[str, object]:
        facts: dict[str, object] = {"n": self.answer.n, "empty": self.answer.empty}
        for name, value in self.answer.corpus.items():
            facts |= {name: value, f"{name}_interval": list(self.answer.intervals[name])}
        best = max((c[MAIN] for c in self.controls.values()), default=None)
        return facts | {
            "controls": {name: dict(scores) for name, scores in self.controls.items()},
            "best_without_looking": best,
            "gain": self.gain,
            "gain_interval": list(self.gain_interval) if self.gain_interval else None,
        }


def score(rows: Sequence[SaidRow], *, seed: int = 0) -> CaptionTaskScores:
    """From output rows with ``id``, ``truth``, ``answer`` and the controls' captions (or none). Raises DataError when
    there are none."""
    references = {r["id"]: r["truth"] for r in rows}
    ways: list[Way] = ["answer", *controls_of(rows)]
    found = {w: score_captions(references, {r["id"]: said(r, w) for r in rows}, seed=seed) for w in ways}
    controls = {w: found[w].corpus for w in ways[1:]}
    if not controls:
        return CaptionTaskScores(answer=found["answer"], controls={})
    points = np.array([[found[w].per_item[i][MAIN] for w in ways] for i in references])

    def statistic(sums: Array) -> Array:
        return (sums[..., :1] - sums[..., 1:].max(axis=-1, keepdims=True)) / len(points)

    return CaptionTaskScores(
        answer=found["answer"],
        controls=controls,
        gain=float(statistic(points.sum(axis=0))[0]),
        gain_interval=intervals(points, statistic, seed=seed)[0],
    )


@dataclass(frozen=True, kw_only=True)
class CaptionTask(StandardTask[SaidRow]):
    """Captions scored by BLEU, ROUGE-L and CIDEr-D; the records of one picture count as one with all their captions.

    ``prompt`` is the user's text; empty for models that caption a bare picture, which have no blind control.
    ``prior`` is a constant caption, see :func:`typical_caption`.
    """

    kind: ClassVar[str] = "caption"
    version: ClassVar[int] = VERSION
    needs: ClassVar[type] = Answers

    name: str
    records: Records[Sample]
    prompt: str = ""
    prior: str | None = None
    controls: Sequence[Control] = ("blind", "shuffled")
    decoding: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_controls(self.controls)
        if not self.prompt and "blind" in self.controls:
            raise ConfigError(
                f"Task {self.name!r}: without a prompt nothing is left of the question when the picture is taken away; "
                "give one (task.prompt=...), or leave the control out (task.controls=[shuffled])."
            )

    @cached_property
    def _pictures(self) -> dict[str, tuple[Sample, list[str]]]:
        """Content key -> (first record, all captions)."""
        found: dict[str, tuple[Sample, list[str]]] = {}
        for record in listed(self.records):
            if len(record.images) != 1:
                raise DataError(
                    f"Task {self.name!r}: sample {record.id!r} has {len(record.images)} pictures; exactly one is due."
                )
            captions = captions_of(record)
            if not any(tokens(c) for c in captions):
                raise DataError(f"Task {self.name!r}: sample {record.id!r} has no caption with a word in it.")
            found.setdefault(record.images[0].content_key(), (record, []))[1].extend(captions)
        return found

    @cached_property
    def ids(self) -> list[str]:
        return unique([record.id for record, _ in self._pictures.values()], self.name)

    def describe(self) -> dict[str, object]:
        return {
            "question": self.prompt,
            "controls": list(self.controls),
            "prior": self.prior,
            "decoding": dict(self.decoding),
            "data": fingerprint(self.records),
            **shuffled_among(self.controls, len(self.ids)),
        }

    def prompts(self) -> Iterator[Sample]:
        return (self._prompt(record) for record, _ in self._pictures.values())

    def _prompt(self, record: S) -> S:
        """The picture and the prompt; nothing of the caption is left."""
        text = next(p for p in record.parts if isinstance(p, TextPart))
        question = (replace(text, text=self.prompt, role="user", learn=False),) if self.prompt else ()
        return replace(record, parts=(record.images[0], *question))

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[SaidRow]]:
        records = [record for record, _ in self._pictures.values()]
        captions = [c for _, c in self._pictures.values()]
        shuffled = "shuffled" in self.controls
        plan = ControlPlan.of(list(self._pictures), self.controls, self.seed)
        todo = [i for i, name in enumerate(self.ids) if name not in done]
        for places in plan.chunks(todo, chunk):
            prompts, others = [self._prompt(records[i]) for i in places], [records[plan.other[i]] for i in places]
            answers = answers_with_controls(model, prompts, others, self.controls, self.decoding)
            yield [
                {
                    "id": records[i].id,
                    "truth": captions[i],
                    "answer": answers["answer"][j],
                    "blind": answers["blind"][j] if "blind" in answers else None,
                    "shuffled": answers["shuffled"][j] if shuffled else None,
                    "prior": self.prior,
                }
                for j, i in enumerate(places)
            ]

    @classmethod
    def scored(cls, rows: Sequence[SaidRow], manifest: Manifest) -> CaptionTaskScores:
        return score(rows, seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[SaidRow], manifest: Manifest) -> Outcomes:
        columns = CaptionScorer({r["id"]: r["truth"] for r in rows}).outcomes({r["id"]: r["answer"] for r in rows})
        return Outcomes(columns, lambda sums: from_sums(sums, len(rows)), NAMES)
