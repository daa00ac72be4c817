"""Confidence intervals of means over documents (pure)."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the bounds that contain the true one with the requested confidence."""

    mean: float
    low: float
    high: float


def mean_interval(values: Float64[np.ndarray, " document"], *, confidence: float = 0.95) -> Interval:
    """mean +- t s / sqrt(N): s the standard deviation over N independent documents, t the quantile of Student's t.

    Units: those of the values. One document says nothing about the error: its bounds are NaN.
    Raises: ValueError without values.
    Source: Student (1908), The probable error of a mean.
    Test: test_pass_at_k.py::test_mean_interval_covers_the_true_mean_as_often_as_stated
    """
    from scipy.special import stdtrit  # imported late (0.5 s): a refused configuration need not wait for it

    if len(values) == 0:
        raise ValueError("an interval needs one value or more, got none; evaluate a document or more")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def wilson_interval(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> Interval:
    """All p with |c/N - p| <= z sqrt(p (1-p) / N), for c successes of N; right at 0 and 1 too, where s vanishes.

    Units: a probability.
    Raises: ValueError unless 0 <= num_successes <= num_trials and num_trials >= 1.
    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    Test: test_pass_at_k.py::test_wilson_bounds_solve_the_equation_that_defines_them
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"needs 0 <= successes <= trials and a trial, got {num_successes} of {num_trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    mean, shrink = num_successes / num_trials, 1 + z**2 / num_trials
    centre = (mean + z**2 / (2 * num_trials)) / shrink
    reach = z * math.sqrt(mean * (1 - mean) / num_trials + z**2 / (4 * num_trials**2)) / shrink
    return Interval(mean, max(0.0, min(mean, centre - reach)), min(1.0, max(mean, centre + reach)))
