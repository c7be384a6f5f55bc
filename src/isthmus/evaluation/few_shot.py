"""Few-shot evaluation: examples before each question, or picture to caption (2204.14198, sec. 4.1, appendix B.2).

Shots are drawn from a pool of support samples, by chance or by RICES: those whose pictures are nearest to the
question's by the frozen vision features, the nearest last; or the same ones for all questions, which are then read
once. Zero shots means two examples in words alone, pictures taken out. With given candidates the answer is the
likeliest one, its log-likelihood averaged over permutations of the shots, and zero shots means none at all: the
candidates already show the form of an answer.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from isthmus.data.record import Image, Part, Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation.caption_task import CaptionTask
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.outputs import R
from isthmus.evaluation.protocols import Answers, HasVisionFeatures, Records, Sample, Weighs
from isthmus.evaluation.tasks import Scores, Task, fingerprint, listed
from isthmus.evaluation.turns import last_turn

POOL = 2048
"""Support samples drawn once per seed, as in the papers."""
TEXT_SHOTS = 2
"""Examples without pictures that stand before a zero-shot question."""

Select = Literal["random", "rices", "same"]
Features = Callable[[Sequence[Image]], Tensor]


class Support:
    """The pool of examples, and the choice among them for one question."""

    def __init__(self, records: Records[Record], *, seed: int = 0, pool: int = POOL) -> None:
        """Raises DataError when there are no records."""
        if not len(records):
            raise DataError("few-shot evaluation needs support samples, and there are none.")
        places = random.Random(f"pool/{seed}").sample(range(len(records)), min(pool, len(records)))
        self.records: list[Record] = [records[i] for i in places]
        self.seed = seed
        # A picture's key may cost reading its file, so each is computed once.
        self._keys = [frozenset(p.content_key() for p in record.images) for record in self.records]
        self._features: Tensor | None = None

    def choose(
        self, record: Record, shots: int, features: Features | None = None, *, same: bool = False
    ) -> list[Record]:
        """``shots`` samples for a question, in the order in which they stand before it; never the question's own.

        With ``features`` and a picture to compare, the nearest ones, the nearest last; else by chance: ``same`` draws
        one row of samples for all questions, of which each takes the first that are not its own.
        Raises DataError when the pool is too small.
        """
        keys = {p.content_key() for p in record.images}
        usable = [i for i, other in enumerate(self.records) if other.id != record.id and keys.isdisjoint(self._keys[i])]
        if len(usable) < shots:
            raise DataError(f"sample {record.id!r} needs {shots} shots and the support set has {len(usable)} others.")
        if same:
            order = random.Random(f"{self.seed}/same").sample(range(len(self.records)), len(self.records))
            allowed = set(usable)
            chosen = [i for i in order if i in allowed][:shots]
        elif features is None or not record.images:
            chosen = random.Random(f"{self.seed}/{record.id}").sample(usable, shots)
        else:
            near = self.encode(features)[usable] @ normalize(features(record.images[-1:]).float().cpu(), dim=-1)[0]
            best = near.topk(shots).indices.tolist() if shots else []
            chosen = [usable[i] for i in reversed(best)]
        return [self.records[i] for i in chosen]

    def encode(self, features: Features, *, chunk: int = 256) -> Tensor:
        """The pool's (N, D) vectors of length one, made once: by all processes together, where there are several."""
        if self._features is None:
            pictures = [record.images[-1:] for record in self.records]
            if not all(pictures):
                raise DataError("RICES compares pictures, and a support sample has none; use random selection.")
            found = embed(features, [p for (p,) in pictures], what="support pictures", chunk=chunk)
            self._features = normalize(found, dim=-1)
        return self._features


def as_shot(record: Record, *, pictures: bool = True, question: str | None = None) -> list[Part]:
    """A support sample as a finished turn: its pictures, its last question (if any; or ``question``), its first
    accepted answer."""
    turn = last_turn(record)
    text = turn.question if question is None else question
    shown: list[Part] = [replace(p, role="user") for p in record.images] if pictures else []
    user_text: list[Part] = [Text(text, role="user")] if text or not shown else []
    return [*shown, *user_text, Text(turn.answers[0], role="assistant")]


def with_shots(
    record: Record, shots: Sequence[Record], *, pictures: bool = True, question: str | None = None
) -> Record:
    """The question with its examples before it."""
    own = [replace(p, role="user") if isinstance(p, Image) else p for p in record.parts]
    before = [part for shot in shots for part in as_shot(shot, pictures=pictures, question=question)]
    return replace(record, parts=(*before, *own))


def permuted_answers(shots: Sequence[Record], seed: str) -> list[Record]:
    """The same shots with their answers shuffled among them: what is left when the examples teach nothing."""
    answers = [last_turn(shot).answers[0] for shot in shots]
    random.Random(seed).shuffle(answers)
    found = []
    for shot, answer in zip(shots, answers, strict=True):
        at = last_turn(shot).at
        parts = (*shot.parts[:at], Text(answer, role="assistant"), *shot.parts[at + 1 :])
        meta = {k: v for k, v in shot.meta.items() if k != "answers"}
        found.append(replace(shot, parts=parts, meta=meta))
    return found


def orders(shots: Sequence[Record], count: int, seed: str) -> list[list[Record]]:
    """The shots as given, then other permutations of them, all different, ``count`` in all or as many as there are."""
    rng = random.Random(seed)
    found = [list(range(len(shots)))]
    most = 1
    for n in range(2, len(shots) + 1):
        most = min(most * n, count)
    while len(found) < min(count, most):
        order = rng.sample(range(len(shots)), len(shots))
        if order not in found:
            found.append(order)
    return [[shots[i] for i in order] for order in found]


@dataclass(frozen=True, kw_only=True)
class FewShotTask(Task[R]):
    """A task of questions or captions with ``shots`` examples before each.

    Args:
        task: the questions, or pictures to caption, and how they are scored.
        support: where the examples come from.
        select: ``random`` or ``rices``; ``same`` for shots that all questions share, but for a question among them.
        permuted: shuffle the examples' answers, a control.
        candidates: closed answers to rank; then ``ensemble`` permutations of the shots are averaged.

    The controls of the task change the question's picture only, and RICES then searches by that picture.
    """

    task: Task[R]
    support: Records[Record]
    shots: int = 4
    select: Select = "random"
    permuted: bool = False
    candidates: Sequence[str] = ()
    ensemble: int = 1

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise ConfigError(f"Unknown selection {self.select!r} of shots; known: {', '.join(get_args(Select))}.")
        if self.shots < 0 or self.ensemble < 1:
            raise ConfigError(f"shots must be 0 or more and ensemble 1 or more, not {self.shots} and {self.ensemble}.")
        if self.ensemble > 1 and not self.candidates:
            raise ConfigError("ensemble averages likelihoods of given candidates; give task.candidates too.")
        odd = [c for c in self.candidates if not isinstance(c, str) or not c.strip()]
        if isinstance(self.candidates, str) or odd:
            # YAML reads a bare yes or no as true or false.
            raise ConfigError(
                f"task.candidates must be texts, not {odd or self.candidates!r}; quote them: ['yes', 'no']."
            )

    @property
    def kind(self) -> str:
        return self.task.kind

    @property
    def version(self) -> int | None:
        return self.task.version

    @property
    def needs(self) -> type:
        return self.task.needs

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def seed(self) -> int:
        return self.task.seed

    @property
    def decoding(self) -> Mapping[str, object]:
        return self.task.decoding

    @property
    def ids(self) -> Sequence[str]:
        return self.task.ids

    @cached_property
    def pool(self) -> Support:
        return Support(self.support, seed=self.seed)

    def describe(self) -> dict[str, object]:
        return {
            **self.task.describe(),
            "shots": self.shots,
            "select": self.select,
            "permuted": self.permuted,
            "candidates": list(self.candidates),
            "ensemble": self.ensemble,
            "support": fingerprint(self.support),
        }

    def prompts(self) -> Iterable[Sample]:
        return self.task.prompts()

    def prepare(self, model: Answers, *, chunk: int) -> None:
        self.task.prepare(model, chunk=chunk)
        features = self._features(model)
        if features is not None and self.shots and any(r.images for r in listed(self.task.records)):
            self.pool.encode(features, chunk=chunk)

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[R]]:
        return self.task.rows(_Shown(self, model, self._features(model)), done, chunk=chunk)

    def _features(self, model: Answers) -> Features | None:
        """What RICES compares pictures by, where that chooses the shots."""
        if self.select != "rices":
            return None
        if not isinstance(model, HasVisionFeatures):
            raise CapabilityError("RICES needs a model that can give vision_features; take select: random.")
        return model.vision_features

    def score(self, rows: Sequence[R]) -> Scores:
        return self.task.score(rows)

    def prompts_of(self, record: Record, features: Features | None) -> Iterator[Record]:
        """The question after its examples, in ``ensemble`` orders of these; with ``features`` after the nearest."""
        return self._after_shots(record, self._shots(record, features))

    def _shots(self, record: Record, features: Features | None) -> list[Record]:
        if not self.shots and self.candidates:
            return []
        same = self.select == "same"
        if not self.shots:
            return self.pool.choose(record, min(TEXT_SHOTS, len(self.pool.records)), same=same)
        shots = self.pool.choose(record, self.shots, features, same=same)
        return permuted_answers(shots, f"{self.seed}/{'same' if same else record.id}") if self.permuted else shots

    def _after_shots(self, record: Record, shots: list[Record]) -> Iterator[Record]:
        # The prompt of a caption is the same everywhere, and there is none where the model needs none.
        question = self.task.prompt if isinstance(self.task, CaptionTask) else None
        own = "same" if self.select == "same" else record.id
        for order in orders(shots, self.ensemble, f"{self.seed}/{own}/order"):
            yield with_shots(record, order, pictures=self.shots > 0, question=question)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A model as the questions of a task see it: after that task's examples."""

    task: FewShotTask
    model: Answers
    features: Features | None

    def answer_records(self, records: Sequence[Sample], **decoding: object) -> list[str]:
        """What the model says to each question, which is a Record as the examples are."""
        found = [self.task.prompts_of(record, self.features) for record in cast(Sequence[Record], records)]
        if not self.task.candidates:
            return self.model.answer_records([next(prompts) for prompts in found], **decoding)
        model = self.model
        if not isinstance(model, Weighs):
            raise CapabilityError(
                f"Task {self.task.name!r}: this model gives no log-likelihoods of candidates; leave the option out."
            )
        return [self._likeliest(model, prompts) for prompts in found]

    def _likeliest(self, model: Weighs, prompts: Iterator[Record]) -> str:
        """The candidate of the highest mean log-likelihood over permutations of the shots."""
        candidates = self.task.candidates
        scores = [torch.tensor(model.score(prompt.parts, candidates)) for prompt in prompts]
        return candidates[int(torch.stack(scores).mean(0).argmax())]
