"""Confidence intervals of means over documents, some of which come from one text (pure)."""

import math
from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class ClusteredMean:
    """A mean over documents, and how far it may be off."""

    mean: float
    standard_error: float
    """NaN with one cluster, which says nothing about the error."""
    num_clusters: int


def clustered_mean(values: Float64[np.ndarray, " document"], clusters: Sequence[str]) -> ClusteredMean:
    """The mean over documents, with the jackknife's error over clusters: what it changes by when one is left out.

    error^2 = (G - 1) / G sum_g (mean without cluster g - mean)^2, for G independent clusters of any sizes, whatever
    the correlation within them. With one document in each it is s^2 / N.

    Units: those of the values.
    Raises: ValueError without values.
    Source: Efron (1982), The jackknife, the bootstrap and other resampling plans; of clusters: the CR3 of Bell and
    McCaffrey (2002), Bias reduction in standard errors for linear regression with multi-stage samples.
    Test: test_intervals.py::test_the_error_is_that_of_leaving_clusters_out
    """
    if len(values) == 0:
        raise ValueError("an interval needs one value or more, got none; evaluate a document or more")
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sizes, sums = np.bincount(members), np.bincount(members, weights=values)
    mean, num_clusters = float(values.mean()), len(sizes)
    if num_clusters == 1:
        return ClusteredMean(mean, math.nan, 1)
    without = (mean * len(values) - sums) / (len(values) - sizes)
    error = math.sqrt((num_clusters - 1) / num_clusters * float(((without - mean) ** 2).sum()))
    return ClusteredMean(mean, error, num_clusters)


def mean_interval(
    values: Float64[np.ndarray, " document"], clusters: Sequence[str], *, confidence: float = 0.95
) -> Interval:
    """mean +- t error: `clustered_mean`, and the quantile of Student's t with one degree of freedom less than clusters.

    Units: those of the values. One cluster says nothing about the error: its bounds are NaN.
    Raises: ValueError without values.
    Source: Student (1908), The probable error of a mean.
    Test: test_intervals.py::test_intervals_cover_the_true_mean_as_often_as_stated
    """
    from scipy.special import stdtrit  # imported late (0.5 s): a refused configuration need not wait for it

    estimate = clustered_mean(values, clusters)
    if estimate.num_clusters == 1:
        return Interval(estimate.mean, math.nan, math.nan)
    reach = float(stdtrit(estimate.num_clusters - 1, (1 + confidence) / 2)) * estimate.standard_error
    return Interval(estimate.mean, estimate.mean - reach, estimate.mean + reach)


def effective_trials(values: Float64[np.ndarray, " document"], clusters: Sequence[str]) -> float:
    """How many independent trials would tell as much as these, of which some share a cluster: N over the design effect.

    The design effect is the squared error over that of independent trials, and at least 1. Where all trials agree it
    is not known, and each cluster counts as one.

    Source: Kish (1965), Survey sampling.
    Test: test_intervals.py::test_trials_that_agree_within_clusters_count_once
    """
    independent = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    estimate = clustered_mean(values, clusters)
    if independent == 0 or estimate.num_clusters == 1:
        return float(estimate.num_clusters)
    return len(values) / max(1.0, (estimate.standard_error / independent) ** 2)


def wilson_interval(mean: float, num_trials: float, *, confidence: float = 0.95) -> Interval:
    """All p with |mean - p| <= z sqrt(p (1-p) / N), for that mean of N trials; right at 0 and 1 too, where s vanishes.

    Units: a probability. `num_trials`: `effective_trials` where some depend on each other.
    Raises: ValueError unless 0 <= mean <= 1 and num_trials >= 1.
    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    Test: test_intervals.py::test_wilson_bounds_solve_the_equation_that_defines_them
    """
    if num_trials < 1 or not 0 <= mean <= 1:
        raise ValueError(f"needs a mean from 0 to 1 and a trial, got {mean} of {num_trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z**2 / num_trials
    centre = (mean + z**2 / (2 * num_trials)) / shrink
    reach = z * math.sqrt(mean * (1 - mean) / num_trials + z**2 / (4 * num_trials**2)) / shrink
    return Interval(mean, max(0.0, min(mean, centre - reach)), min(1.0, max(mean, centre + reach)))
