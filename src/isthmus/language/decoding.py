"""Decoding: how new tokens are chosen, and what that does to the scores of a step."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isthmus.errors import ConfigError, nearest
from isthmus.nn.beam import Step, beam_search

MOST = 2**62
"""Stands for any limit where rows are compared whose limits do not matter."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How new tokens are chosen.

    ``temperature`` 0 is greedy (or beam search with ``num_beams`` > 1); above 0 tokens are drawn, ``top_k`` 0 and
    ``top_p`` 1 meaning no cut. ``stop_ids`` end an answer and are not part of it; without any, an answer ends only at
    ``max_new_tokens``, and none before ``min_new_tokens``. With beams a text of n new tokens scores
    Σ log p / n^``length_penalty``, so a negative penalty favours short answers. ``repetition_penalty`` counts the
    new tokens only. One ``seed`` serves every row alike, so that a row's answer does not depend on its neighbours; a
    tuple gives each row its own.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()
    seed: int | tuple[int, ...] = 0

    @classmethod
    def of(cls, options: Mapping[str, object]) -> "Decoding":
        """From options by name, as users write them. Raises ConfigError naming the nearest field for an unknown one."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in fields:
                raise ConfigError(f"decoding has no field {name!r}; {nearest(name, fields)}")
        return dataclasses.replace(cls(), **options)

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no cut) or above"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "0 (off) or above"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise ConfigError(f"decoding.{name} is {getattr(self, name)}; it must be {allowed}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError(
                f"decoding has {self.num_beams} beams and temperature {self.temperature}; beam "
                "search does not draw. Set temperature: 0 or num_beams: 1."
            )
        if both := set(self.stop_ids) & set(self.forbidden_ids):
            raise ConfigError(f"decoding both stops at and forbids the token ids {sorted(both)}; keep one of the two.")


class Rules:
    """What is done to the scores (n, V) of every step of rows of one decoding, by the library's processors: bars,
    repetition, then the cuts of a random draw."""

    def __init__(self, decoding: Decoding, device: torch.device | str) -> None:
        self._barred = torch.tensor(sorted(set(decoding.forbidden_ids)), dtype=torch.long, device=device)
        self._steps = logits_processors(decoding)
        self.draws = decoding.temperature > 0
        self.looks_back = _looks_back(decoding)

    @staticmethod
    def key(decoding: Decoding, count: int) -> Hashable:
        """Equal for rows whose scores can be changed in one tensor; ``count`` tokens are written."""
        shared = dataclasses.replace(decoding, seed=0, max_new_tokens=MOST)
        return (shared, count) if _looks_back(decoding) else dataclasses.replace(shared, stop_ids=())

    def __call__(self, written: Tensor | None, scores: Tensor) -> Tensor:
        """``written`` (n, t) are the new tokens, if the rules look back at all; ``scores`` are overwritten."""
        if len(self._barred):
            scores.index_fill_(1, self._barred, -torch.inf)
        return self._steps(written, scores) if self._steps else scores  # type: ignore[arg-type]


def _looks_back(decoding: Decoding) -> bool:
    least = decoding.min_new_tokens and decoding.stop_ids
    return bool(least or decoding.no_repeat_ngram or decoding.repetition_penalty != 1)


def drawn(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """(n, V) whose largest entries are a draw from softmax(scores), each row by its own generator.

    The largest of ``score + Gumbel`` is distributed as softmax(score), so that drawing never touches PyTorch's global
    random state.
    """
    width = scores.shape[-1]
    noise = torch.stack([torch.empty(width).exponential_(generator=g) for g in generators])
    return scores.float() - noise.log().to(scores.device)


class _Draw(LogitsProcessor):
    """Turns the greedy choice of the library's loop into a draw."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return drawn(scores, self.generators)


def check_ids(decoding: Decoding, vocab_size: int) -> None:
    """Raises ConfigError for ids outside the vocabulary."""
    outside = [i for i in (*decoding.stop_ids, *decoding.forbidden_ids) if not 0 <= i < vocab_size]
    if outside:
        raise ConfigError(f"decoding names the token ids {outside}, outside the LM's vocabulary of {vocab_size}.")


def generation_config(decoding: Decoding, vocab_size: int) -> GenerationConfig:
    """The library's settings for ``decoding``. Raises ConfigError for ids outside the vocabulary."""
    check_ids(decoding, vocab_size)
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        suppress_tokens=list(decoding.forbidden_ids) or None,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.stop_ids[0] if decoding.stop_ids else 0,
    )


def logits_processors(decoding: Decoding, *, started: int = 0) -> LogitsProcessorList:
    """What is done to the scores of every step but bars and draws: repetition first, then the cuts of a random draw.

    The repetition rules are handed over ready-made: set by its configuration, the library would spare as many
    *new* tokens as the row has padding, so that an answer would depend on the neighbours. ``started`` tokens of what
    is written were given (an encoder-decoder's start token).
    """
    steps = LogitsProcessorList()
    if decoding.min_new_tokens and decoding.stop_ids:
        stops = list(decoding.stop_ids)
        steps.append(MinNewTokensLengthLogitsProcessor(started, decoding.min_new_tokens, stops))
    if decoding.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.no_repeat_ngram:
        steps.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    if decoding.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.temperature and decoding.top_k:
        steps.append(TopKLogitsWarper(top_k=decoding.top_k))
    if decoding.temperature and decoding.top_p < 1:
        steps.append(TopPLogitsWarper(top_p=decoding.top_p))
    return steps


def seeds_of(decoding: Decoding, rows: int) -> tuple[int, ...]:
    """One seed per row. Raises ConfigError where a tuple has other than as many."""
    seeds = decoding.seed if isinstance(decoding.seed, tuple) else (decoding.seed,) * rows
    if len(seeds) != rows:
        raise ConfigError(f"decoding.seed holds {len(seeds)} seeds for {rows} rows; give one number or one per row.")
    return seeds


class _Generates(Protocol):
    """The library's own loop, as it is used here."""

    def generate(self, **settings: object) -> Tensor: ...


def library_loop(lm: _Generates, decoding: Decoding, vocab_size: int, rows: int, **inputs: Tensor) -> list[list[int]]:
    """What the library's own loop writes: the new tokens of each row, without the stop token."""
    processors = logits_processors(decoding)
    if decoding.temperature:
        processors.append(_Draw(seeds_of(decoding, rows)))
    found = lm.generate(
        generation_config=generation_config(decoding, vocab_size), logits_processor=processors, **inputs
    )
    return [until_stop(row, decoding.stop_ids) for row in found.tolist()]


def write(step: Step, start: Tensor, decoding: Decoding) -> list[list[int]]:
    """What ``decoding`` writes by a next-token function that the library does not know, after one token per row,
    ``start`` (B,): the new tokens only, without the stop token. ``step`` hands out logits; see :func:`beam_search`."""
    rules = Rules(decoding, start.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds_of(decoding, len(start))]

    def scores(ids: Tensor) -> Tensor:
        # The library's order: beams are scored by log-probabilities, so there the rules meet those.
        logits, new = step(ids).float().clone(), ids[:, 1:]
        if decoding.num_beams > 1:
            return rules(new, logits.log_softmax(-1))
        changed = rules(new, logits)
        return (drawn(changed, generators) if rules.draws else changed).log_softmax(-1)

    return beam_search(
        scores,
        start,
        beams=decoding.num_beams,
        max_new=decoding.max_new_tokens,
        stop_ids=decoding.stop_ids,
        length_penalty=decoding.length_penalty,
    )


def until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """``ids`` up to the first stop token."""
    stops = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[0]] if stops else ids
