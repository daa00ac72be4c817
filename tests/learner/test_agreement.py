"""How far learner and engine are apart is read from the tokens of the present weights alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.rollout import Rollout
from feature_server.features.gram import GramStatistics
from feature_server.scored_rollout import ScoredRollout
from learner.batch import make_micro_batches
from learner.step_metrics import StepMetrics, describe_agreement


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
    total, count = metrics._sums["off_policy/log_ratio_lag_0_abs/mean"]
    assert (total / count if count else None) == pytest.approx(expected)
