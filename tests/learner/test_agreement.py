"""How far learner and engine are apart is read from the tokens of the present weights alone, and judged."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.rollout import Rollout
from actors.weights.manifest import WeightMismatchError
from feature_server.features.gram import GramStatistics
from feature_server.scored_rollout import ScoredRollout
from learner.agreement import MIN_TOKENS, Agreement
from learner.batch import make_micro_batches
from learner.step_metrics import LAG_0, StepMetrics, describe_agreement


@pytest.mark.parametrize(("policy_version", "expected"), [(3, 0.25), (2, 0.5), (4, None)])
def test_agreement_counts_tokens_of_lag_0_alone(
    policy_version: int, expected: float | None, make_rollout: Callable[..., Rollout]
) -> None:
    """Five tokens: the first of each completion sampled by version 2, 0.5 nats off; the others by 3, 0.25 off."""
    rollout = make_rollout(num_tokens=8, anchors=[4], lengths=[[2, 3]], horizon=3)
    rollout = replace(rollout, token_versions=np.array([[[2, 3, 0], [2, 3, 3]]]))
    empty = torch.zeros(1, 2, 2, dtype=torch.float64)
    raw = GramStatistics(gram=empty, ground_truth_products=empty[:, 0], ground_truth_norm_sq=empty[:, 0, 0])
    (batch,) = make_micro_batches([ScoredRollout(rollout=rollout, raw=raw, whitened=None, score_s=0.0)], documents=1)
    learner = batch.behavior_logprobs + torch.tensor([0.5, -0.25, -0.5, 0.25, 0.25])
    metrics = StepMetrics()
    describe_agreement(batch, learner, metrics, policy_version=policy_version)
    total, count = metrics.sum_and_count(LAG_0)
    assert (total / count if count else None) == pytest.approx(expected)


def agreement(**settings: object) -> Agreement:
    return Agreement(**{"dtype": "float32", "temperature": 1.0, "configured": None, "model_type": "llama"} | settings)


def largest_allowed(of: Agreement) -> float:
    """Mean difference up to which it judges that all is well, by trying."""
    for difference in np.geomspace(1e-6, 10, 1401):
        try:
            of.judge(difference * MIN_TOKENS, MIN_TOKENS, step=2)
        except WeightMismatchError:
            return float(difference)
    return np.inf


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 2.5e-4),
        ({"dtype": "bfloat16"}, 0.0625),
        ({"configured": 0.02}, 0.005),
        ({"temperature": 0.5}, 5e-4),
        ({"temperature": 2.0}, 2.5e-4),
    ],
)
def test_before_the_first_update_the_limit_is_that_of_the_dtype(settings: dict[str, object], limit: float) -> None:
    for excess in (0.99, 1.01):
        judging = agreement(**settings)
        if excess < 1:
            judging.judge(excess * limit * MIN_TOKENS, MIN_TOKENS, step=1)
        else:
            with pytest.raises(WeightMismatchError, match=r"step 1: at equal weights .* 64 sampled tokens .*'llama'"):
                judging.judge(excess * limit * MIN_TOKENS, MIN_TOKENS, step=1)


@pytest.mark.parametrize(("first", "later"), [(0.0, 5e-5), (1e-5, 5e-5), (5e-5, 2e-4), (2e-4, 2.5e-4)])
def test_later_steps_are_allowed_a_few_times_the_first_ones_difference(first: float, later: float) -> None:
    judging = agreement()
    judging.judge(first * MIN_TOKENS, MIN_TOKENS, step=1)
    assert largest_allowed(judging) == pytest.approx(later, rel=0.02)


def test_few_tokens_are_judged_loosely_and_again_with_the_next() -> None:
    """2.5e-4 nats are allowed in the mean, four times as much of few tokens."""
    judging = agreement()
    judging.judge(9e-4, 1, step=1)
    judging.judge(0.0, 0, step=2)
    judging.judge(8e-4 * 40, 40, step=3)
    with pytest.raises(WeightMismatchError, match=r"step 4: .* 64 sampled tokens .* 0.000514 nats .* are 0.00025 "):
        judging.judge(0.0, MIN_TOKENS - 41, step=4)
    with pytest.raises(WeightMismatchError, match=r"step 1: .* 63 sampled tokens .* 0.0011 nats .* are 0.001 "):
        agreement().judge(63 * 1.1e-3, 63, step=1)


def test_at_a_low_temperature_all_limits_are_wider() -> None:
    judging = agreement(temperature=0.1)
    judging.judge(0.0, MIN_TOKENS, step=1)
    assert largest_allowed(judging) == pytest.approx(5e-4, rel=0.02)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(WeightMismatchError, match="nan nats"):
        agreement().judge(float("nan"), MIN_TOKENS, step=1)
