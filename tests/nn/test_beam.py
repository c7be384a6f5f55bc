"""Beam search by hand, against full enumeration, and against transformers' search."""

import itertools

import pytest
import torch

from isthmus.language import Decoding, LanguageModel, write
from isthmus.nn.beam import beam_search
from tests.models.tiny_blip2 import LLAMA, V, redraw

STOP = 0


def markov(seed: int = 0, words: int = 5) -> torch.Tensor:
    """(words, words) log-probabilities of the next token by the last one."""
    return (2 * torch.randn(words, words, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_enough_beams_find_what_enumeration_finds(penalty: float) -> None:
    table, longest = markov(), 4
    best, score = [], -torch.inf
    for length in range(1, longest + 1):
        for text in itertools.product(range(1, 5), repeat=length - 1):
            for last in [STOP] if length < longest else range(5):
                path = [1, *text, last]
                total = sum(float(table[a, b]) for a, b in itertools.pairwise(path))
                if total / length**penalty > score:
                    best, score = [*text, *([last] if last != STOP else [])], total / length**penalty
    found = beam_search(
        lambda ids: table[ids[:, -1]],
        torch.tensor([1, 1]),
        beams=128,
        max_new=longest,
        stop_ids=[STOP],
        length_penalty=penalty,
    )
    assert found == [best, best]


def test_the_penalty_decides_as_computed_by_hand() -> None:
    # "2 stop": ln .6 + ln .5 = -1.204; "3 3 stop": ln .4 + ln .9 + ln .9 = -1.127. Divided by n^p the order turns.
    table = torch.full((4, 4), 1e-9)
    table[1, 2], table[1, 3] = 0.6, 0.4
    table[2, STOP], table[2, 2] = 0.5, 0.5
    table[3, 3], table[3, STOP] = 0.9, 0.1

    def step(ids: torch.Tensor) -> torch.Tensor:
        rows = table[ids[:, -1]].clone()
        if ids.shape[1] == 3:  # after "3 3" the text ends
            rows[ids[:, -1] == 3] = torch.tensor([0.9, 0.0, 0.0, 0.1])
        return rows.log()

    def best(penalty: float) -> list[int]:
        return beam_search(step, torch.tensor([1]), beams=3, max_new=3, stop_ids=[STOP], length_penalty=penalty)[0]

    assert best(1.0) == [3, 3]
    assert best(0.0) == [3, 3]
    assert best(-1.0) == [2]  # -1.204 * 2 > -1.127 * 3


def test_limits_are_kept() -> None:
    table = markov(3)

    def run(**options) -> list[list[int]]:
        return beam_search(lambda ids: table[ids[:, -1]], torch.tensor([1, 2]), beams=2, stop_ids=[STOP], **options)

    assert all(len(text) >= 4 for text in run(max_new=6, min_new=4))
    assert all(len(text) <= 2 for text in run(max_new=2))
    free = run(max_new=5)
    used = {token for text in free for token in text}
    forbidden = next(iter(used))
    assert all(forbidden not in text for text in run(max_new=5, forbidden_ids=[forbidden]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 5, "length_penalty": 0.5},
        {"num_beams": 3, "repetition_penalty": 1.5},
        {"no_repeat_ngram": 1, "min_new_tokens": 3},
        {"repetition_penalty": 1.3, "forbidden_ids": (33, 54)},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": (1, 2, 3, 4, 5, 6)},
    ],
)
def test_it_equals_the_librarys_search(options: dict) -> None:
    net = redraw(LanguageModel.build(LLAMA))
    assert isinstance(net, LanguageModel)
    start = torch.tensor([3, 4, 5, 6, 7, 8])
    for stop in (11, 40, 23):
        decoding = Decoding(max_new_tokens=7, stop_ids=(stop,), **options)
        theirs = net.generate(net.embed(start[:, None]), torch.ones(6, dtype=torch.long), decoding)
        ours = write(lambda ids: net.logits(net.embed(ids))[:, -1], start, decoding)
        assert ours == theirs
        assert all(0 <= token < V for text in ours for token in text)
