"""pass@k against the enumeration of all subsets."""

import math
from itertools import combinations

import pytest

from orchestration.evaluation.pass_at_k import pass_at_k


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
