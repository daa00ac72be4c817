"""Intervals against what defines them, and how often they hold the true mean."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from orchestration.evaluation.intervals import clustered_mean, effective_trials, mean_interval, wilson_interval

T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
"""97.5% quantiles of Student's t as printed tables give them, by degrees of freedom."""


def t_quantile(probability: float, *, degrees: int) -> float:
    """The quantile that an interval was made with, of values whose standard error is known."""
    values = np.arange(degrees + 1.0)
    interval = mean_interval(values, alone(values), confidence=2 * probability - 1)
    return (interval.high - interval.mean) / (np.std(values, ddof=1) / math.sqrt(degrees + 1))


def alone(values: Sequence[float]) -> list[str]:
    """Each document is the only one of its text."""
    return [f"text {index}" for index in range(len(values))]


@pytest.mark.parametrize(("degrees", "quantile"), T_TABLE.items())
def test_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees=degrees) == pytest.approx(quantile, abs=6e-4)


def test_t_quantiles_with_a_closed_form() -> None:
    for probability in (0.51, 0.9, 0.995):
        cauchy = math.tan(math.pi * (probability - 0.5))
        assert t_quantile(probability, degrees=1) == pytest.approx(cauchy, rel=1e-9)
        z = 2 * probability - 1
        assert t_quantile(probability, degrees=2) == pytest.approx(z * math.sqrt(2 / (1 - z**2)), rel=1e-9)


def test_of_few_independent_documents_the_quantile_is_students() -> None:
    draw = random.Random(0)
    covered, normal_covered = 0, 0
    for _ in range(2000):
        values = np.array([draw.gauss(3, 2) for _ in range(4)])
        interval = mean_interval(values, alone(values), confidence=0.9)
        assert interval.mean == pytest.approx(sum(values) / 4)
        assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low)
        covered += interval.low <= 3 <= interval.high
        # The negative control: a normal quantile in its place covers too rarely.
        normal_covered += abs(interval.mean - 3) <= 1.645 * values.std(ddof=1) / 2
    assert covered / 2000 == pytest.approx(0.9, abs=0.015)
    assert normal_covered / 2000 < 0.83


def test_one_value_gives_no_error_estimate_and_none_is_refused() -> None:
    interval = mean_interval(np.array([2.0]), ["text"])
    assert interval.mean == 2 and math.isnan(interval.low) and math.isnan(interval.high)
    with pytest.raises(ValueError, match="one value or more"):
        mean_interval(np.array([]), [])


@pytest.mark.parametrize(("successes", "trials"), [(3, 10), (50, 60), (1, 2)])
def test_wilson_bounds_solve_the_equation_that_defines_them(successes: int, trials: int) -> None:
    interval = wilson_interval(successes / trials, trials)
    for bound in (interval.low, interval.high):
        deviation = abs(successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials)
        assert deviation == pytest.approx(1.959964, abs=1e-5)
    assert interval.low < interval.mean < interval.high


def test_wilson_knows_that_a_perfect_score_may_be_luck() -> None:
    none, perfect = wilson_interval(0, 10), wilson_interval(1, 10)
    assert none.mean == none.low == 0 and perfect.mean == perfect.high == 1
    assert none.high == pytest.approx(1 - perfect.low) == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)
    with pytest.raises(ValueError, match=r"got 1\.5 of 2"):
        wilson_interval(1.5, 2)


def test_two_documents_have_an_interval_and_the_default_is_95_percent() -> None:
    interval = mean_interval(np.array([1.0, 3.0]), ["a", "b"])
    assert interval.high - interval.mean == pytest.approx(12.706, rel=1e-4), "t of one degree of freedom times 1"
    assert interval == mean_interval(np.array([1.0, 3.0]), ["a", "b"], confidence=0.95)
    assert wilson_interval(1 / 3, 3) == wilson_interval(1 / 3, 3, confidence=0.95)


def test_one_trial_has_an_interval_and_none_is_refused() -> None:
    assert wilson_interval(1, 1).low == pytest.approx(1 / (1 + 1.959964**2), rel=1e-6)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("sizes", [(3, 1, 2), (1, 1), (4, 4, 4, 4), (1, 9)])
def test_the_error_is_that_of_leaving_clusters_out(sizes: tuple[int, ...]) -> None:
    draw = random.Random(len(sizes))
    clusters = [f"text {text}" for text, size in enumerate(sizes) for _ in range(size)]
    draw.shuffle(clusters)
    values = [draw.gauss(2, 1) for _ in clusters]
    mean = sum(values) / len(values)
    squared = 0.0
    for left_out in set(clusters):
        kept = [value for value, cluster in zip(values, clusters, strict=True) if cluster != left_out]
        squared += (sum(kept) / len(kept) - mean) ** 2
    found = clustered_mean(np.array(values), clusters)
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(squared * (len(sizes) - 1) / len(sizes)))
    assert found.num_clusters == len(sizes)


def test_with_one_document_in_each_text_the_error_is_the_textbooks() -> None:
    values = np.array([1.0, 4.0, 4.0, 9.0, -3.0])
    assert clustered_mean(values, alone(values)).standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_copies_of_documents_add_no_knowledge() -> None:
    values = np.array([1.0, 4.0, 4.0, 9.0, -3.0])
    copied, clusters = np.tile(values, 7), alone(values) * 7
    found, once = clustered_mean(copied, clusters), clustered_mean(values, alone(values))
    assert (found.mean, found.standard_error) == pytest.approx((once.mean, once.standard_error))


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.4])
def test_intervals_cover_the_true_mean_as_often_as_stated(correlation: float, skewed: bool) -> None:
    """Texts of which some have many documents. The negative control takes its documents as independent."""
    draw = np.random.default_rng(0)
    held = np.zeros(2)
    for _ in range(1500):
        sizes = draw.choice([1, 1, 1, 2, 2, 4, 5, 8], size=30)
        shared, own = (
            draw.exponential(size=count) - 1 if skewed else draw.standard_normal(count) for count in (30, sizes.sum())
        )
        values = math.sqrt(correlation) * np.repeat(shared, sizes) + math.sqrt(1 - correlation) * own
        clusters = [str(text) for text, size in enumerate(sizes) for _ in range(size)]
        intervals = mean_interval(values, clusters), mean_interval(values, alone(values))
        held += [interval.low <= 0 <= interval.high for interval in intervals]
    by_text, independent = held / 1500
    assert by_text == pytest.approx(0.94, abs=0.02)
    assert correlation == 0 or independent < 0.9


def test_trials_that_agree_within_clusters_count_once() -> None:
    verdicts = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert effective_trials(verdicts, alone(verdicts)) == pytest.approx(6)
    assert effective_trials(np.repeat(verdicts, 5), [name for name in alone(verdicts) for _ in range(5)]) == (
        pytest.approx(6, rel=0.2)
    )
    assert effective_trials(np.ones(12), ["a", "b", "c"] * 4) == 3, "no variance tells how much the texts decide"
    assert effective_trials(np.array([1.0, 0.0]), ["a", "a"]) == 1
    opposed = np.array([1.0, 0.0] * 6)
    assert effective_trials(opposed, [str(index // 2) for index in range(12)]) == 12, "never more than there are"
