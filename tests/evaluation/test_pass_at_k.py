"""pass@k against the enumeration of all subsets, and intervals against what defines them."""

import math
import random
from itertools import combinations

import numpy as np
import pytest

from orchestration.evaluation.intervals import mean_interval, wilson_interval
from orchestration.evaluation.pass_at_k import pass_at_k

T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
"""97.5% quantiles of Student's t as printed tables give them, by degrees of freedom."""


def t_quantile(probability: float, *, degrees: int) -> float:
    """The quantile that an interval was made with, of values whose standard error is known."""
    values = np.arange(degrees + 1.0)
    interval = mean_interval(values, confidence=2 * probability - 1)
    return (interval.high - interval.mean) / (np.std(values, ddof=1) / math.sqrt(degrees + 1))


def share_of_subsets(num_samples: int, num_correct: int, k: int) -> float:
    """Of all k-subsets of the samples, those that hold one of the correct."""
    correct = set(range(num_correct))
    subsets = list(combinations(range(num_samples), k))
    return sum(not correct.isdisjoint(subset) for subset in subsets) / len(subsets)


def test_pass_at_k_counts_the_subsets() -> None:
    for num_samples in range(1, 8):
        for num_correct in range(num_samples + 1):
            for k in range(1, num_samples + 1):
                expected = share_of_subsets(num_samples, num_correct, k)
                assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("probability", "num_samples", "k"), [(0.1, 6, 3), (0.5, 5, 1), (0.8, 4, 4)])
def test_pass_at_k_is_unbiased_and_the_naive_power_is_not(probability: float, num_samples: int, k: int) -> None:
    mean, naive = 0.0, 0.0
    for correct in range(num_samples + 1):
        weight = math.comb(num_samples, correct) * probability**correct * (1 - probability) ** (num_samples - correct)
        mean += weight * pass_at_k(num_samples, correct, k)
        naive += weight * (1 - (1 - correct / num_samples) ** k)
    truth = 1 - (1 - probability) ** k
    assert mean == pytest.approx(truth, abs=1e-12)
    assert k == 1 or naive < truth - 1e-3


def test_pass_at_k_is_exact_for_more_samples_than_floats_have_factorials_for() -> None:
    assert pass_at_k(5000, 1, 2500) == 0.5
    assert pass_at_k(5000, 0, 2500) == 0
    assert pass_at_k(5000, 5000, 1) == 1


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_counts_that_cannot_be_are_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@\d|num_correct="):
        pass_at_k(num_samples, num_correct, k)


@pytest.mark.parametrize(("degrees", "quantile"), T_TABLE.items())
def test_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees=degrees) == pytest.approx(quantile, abs=6e-4)


def test_t_quantiles_with_a_closed_form() -> None:
    for probability in (0.51, 0.9, 0.995):
        cauchy = math.tan(math.pi * (probability - 0.5))
        assert t_quantile(probability, degrees=1) == pytest.approx(cauchy, rel=1e-9)
        z = 2 * probability - 1
        assert t_quantile(probability, degrees=2) == pytest.approx(z * math.sqrt(2 / (1 - z**2)), rel=1e-9)


def test_mean_interval_covers_the_true_mean_as_often_as_stated() -> None:
    draw = random.Random(0)
    covered, normal_covered = 0, 0
    for _ in range(2000):
        values = np.array([draw.gauss(3, 2) for _ in range(4)])
        interval = mean_interval(values, confidence=0.9)
        assert interval.mean == pytest.approx(sum(values) / 4)
        assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low)
        covered += interval.low <= 3 <= interval.high
        # The negative control: a normal quantile in its place covers too rarely.
        normal_covered += abs(interval.mean - 3) <= 1.645 * values.std(ddof=1) / 2
    assert covered / 2000 == pytest.approx(0.9, abs=0.015)
    assert normal_covered / 2000 < 0.83


def test_one_value_gives_no_error_estimate_and_none_is_refused() -> None:
    interval = mean_interval(np.array([2.0]))
    assert interval.mean == 2 and math.isnan(interval.low) and math.isnan(interval.high)
    with pytest.raises(ValueError, match="one value or more"):
        mean_interval(np.array([]))


@pytest.mark.parametrize(("successes", "trials"), [(3, 10), (50, 60), (1, 2)])
def test_wilson_bounds_solve_the_equation_that_defines_them(successes: int, trials: int) -> None:
    interval = wilson_interval(successes, trials)
    for bound in (interval.low, interval.high):
        deviation = abs(successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials)
        assert deviation == pytest.approx(1.959964, abs=1e-5)
    assert interval.low < interval.mean < interval.high


def test_wilson_knows_that_a_perfect_score_may_be_luck() -> None:
    none, perfect = wilson_interval(0, 10), wilson_interval(10, 10)
    assert none.mean == none.low == 0 and perfect.mean == perfect.high == 1
    assert none.high == pytest.approx(1 - perfect.low) == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_two_documents_have_an_interval_and_the_default_is_95_percent() -> None:
    interval = mean_interval(np.array([1.0, 3.0]))
    assert interval.high - interval.mean == pytest.approx(12.706, rel=1e-4), "t of one degree of freedom times 1"
    assert interval == mean_interval(np.array([1.0, 3.0]), confidence=0.95)
    assert wilson_interval(1, 3) == wilson_interval(1, 3, confidence=0.95)


def test_one_trial_has_an_interval_and_none_is_refused() -> None:
    assert wilson_interval(1, 1).low == pytest.approx(1 / (1 + 1.959964**2), rel=1e-6)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson_interval(0, 0)
