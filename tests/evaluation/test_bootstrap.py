import numpy as np
import pytest

from isthmus.evaluation.bootstrap import intervals, resampled_sums


def mean_of(n):
    return lambda sums: sums / n


def test_drawing_rows_by_their_counts_is_drawing_items():
    """Mean and covariance of resampled sums are those of n independent draws of whole rows."""
    rng = np.random.default_rng(0)
    outcomes = (rng.random((200, 3)) < [0.3, 0.5, 0.9]).astype(float)
    outcomes[:, 2] = outcomes[:, 0]
    sums = resampled_sums(outcomes, draws=20_000, seed=1)
    np.testing.assert_allclose(sums.mean(axis=0), outcomes.sum(axis=0), atol=0.3)
    np.testing.assert_allclose(np.cov(sums.T), 200 * np.cov(outcomes.T, bias=True), atol=1.5)
    np.testing.assert_array_equal(sums[:, 0], sums[:, 2])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(300):
        sample = (rng.random((400, 1)) < 0.7).astype(float)
        ((low, high),) = intervals(sample, mean_of(400), seed=seed, draws=500)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_the_width_is_that_of_the_normal_approximation():
    sample = np.r_[np.ones(300), np.zeros(300)][:, None]
    ((low, high),) = intervals(sample, mean_of(600), draws=20_000)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 600**0.5, rel=0.05)


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(5)
    first = (rng.random(500) < 0.6).astype(float)
    second = np.where(rng.random(500) < 0.1, 1 - first, first)
    pairs = np.stack([first, second], axis=1)

    def difference(sums):
        return (sums[:, :1] - sums[:, 1:]) / 500

    broken = pairs.copy()
    rng.shuffle(broken[:, 1])
    ((low, high),) = intervals(pairs, difference)
    ((wide_low, wide_high),) = intervals(broken, difference)
    assert high - low < 0.6 * (wide_high - wide_low)


def test_many_distinct_rows_are_drawn_in_blocks_and_the_seed_decides():
    outcomes = np.random.default_rng(0).random((3000, 2))
    first = resampled_sums(outcomes, draws=3000, seed=4)
    assert first.shape == (3000, 2)
    np.testing.assert_array_equal(first, resampled_sums(outcomes, draws=3000, seed=4))
    np.testing.assert_allclose(first.mean(axis=0), outcomes.sum(axis=0), rtol=1e-2)
