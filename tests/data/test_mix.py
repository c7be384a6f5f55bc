"""Mix: every sample as often as its weight says, in an order that depends on (seed, epoch) alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.mix import Mix, Source, key, permutation
from isthmus.data.record import Record, Text
from isthmus.errors import ConfigError, DataError


class Numbers(Source):
    def __init__(self, count: int, name: str = "numbers") -> None:
        self.count, self.name = count, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return Record(f"{self.name}/{index}", (Text(str(index), learn=True),), self.name)


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_permutation_is_one(count, seed):
    order = permutation(count, seed)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, permutation(count, seed))


def test_order_is_fixed_for_all_times():
    assert permutation(8, 1).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]
    assert key("a", 1) == 9331952569449725121
    assert key("a", 1) != key("a1")


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 10), st.integers(0, 5))
def test_each_sample_once_an_epoch(counts, seed, epoch):
    visits = Mix([Numbers(n) for n in counts]).epoch(seed, epoch)
    seen = Counter((s, i) for s, i, _ in visits.tolist())
    assert seen == Counter((s, i) for s, n in enumerate(counts) for i in range(n))
    assert np.array_equal(visits, Mix([Numbers(n) for n in counts]).epoch(seed, epoch))


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.25, 0.5, 1.5, 2.0, 2.5, 0.1]), st.integers(0, 3))
def test_weights_are_exact_over_epochs(count, weight, seed):
    mix = Mix([Numbers(count)], [weight])
    epochs = 20
    seen = Counter(i for e in range(epochs) for _, i, _ in mix.epoch(seed, e).tolist())
    expected = weight * epochs
    assert all(abs(seen[i] - expected) < 1 + 1e-9 for i in range(count))


def test_epochs_and_seeds_differ_and_turns_count_visits():
    mix = Mix([Numbers(50)], [2.0])
    first, second = mix.epoch(0, 0), mix.epoch(0, 1)
    assert not np.array_equal(first[:, 1], second[:, 1])
    assert not np.array_equal(first[:, 1], mix.epoch(1, 0)[:, 1])
    assert set(first[:, 2].tolist()) == {0, 1}
    assert set(second[:, 2].tolist()) == {2, 3}
    assert Mix([Numbers(3), Numbers(2)]).epoch(0, 0, shuffle=False)[:, :2].tolist() == [
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 0],
        [1, 1],
    ]


def test_errors():
    with pytest.raises(ConfigError, match="at least one source"):
        Mix([])
    with pytest.raises(ConfigError, match="as many weights"):
        Mix([Numbers(1)], [1, 2])
    with pytest.raises(ConfigError, match="positive"):
        Mix([Numbers(1)], [0])
    with pytest.raises(DataError, match="'none' holds no sample"):
        Mix([Numbers(0, "none")])
