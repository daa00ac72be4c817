"""What each sampled token's log-probability is multiplied by: the correction of its completion times its advantage.

Rewards, baselines and corrections all depend on the learner's present log-probs, so they are computed here, between the
forward and the backward pass, at every use of a rollout. Everything in float64 on the CPU: a few thousand numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from feature_server.scored_rollout import ScoredRollout
from learner.batch import GroupRewards, MicroBatch, compute_rewards
from learner.config import LearnerConfig
from learner.objective.off_policy import (
    CORRECTIONS,
    M2PO_SECOND_MOMENT,
    PUBLISHED_BOUNDS,
    Limits,
    SampledTokens,
    largest_lag,
    sequence_log_ratio,
    sequence_weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The verdict on one micro-batch."""

    factor: Float64[Tensor, " token"]
    """Correction times advantage; constant, one for each sampled token."""
    correction: Float64[Tensor, " token"]
    """The correction alone; 1 on policy, 0 where a token is masked."""
    log_ratio: Float64[Tensor, " completion"]
    """log p_learner - log p_behavior of whole completions [nats]."""
    weights: Float64[Tensor, " completion"]
    """Importance weights of whole completions, truncated: what enters the reward."""
    lag: Float64[Tensor, " completion"]
    """Learner steps since the oldest weights that sampled a token of the completion."""
    rewards: Sequence[GroupRewards]
    """One for each rollout that has completions, in order."""


def assign_credit(
    batch: MicroBatch, learner_logprobs: Float[Tensor, " token"], config: LearnerConfig, *, policy_version: int
) -> Credit:
    """Importance weights, rewards, advantages and corrections under the learner's present log-probs.

    Raises: ValueError on log-probs that are not finite or a ratio that overflows.
    """
    windows = batch.packed.completions
    tokens = SampledTokens(
        learner_logprobs=learner_logprobs.detach().double().cpu(),
        behavior_logprobs=batch.behavior_logprobs.double(),
        completion=windows.window,
        num_completions=windows.num_windows,
        lag=(policy_version - batch.sampled_at).double(),
    )
    log_ratio = sequence_log_ratio(tokens)
    weights = sequence_weights(log_ratio, max_importance_weight=config.max_importance_weight)
    rewards = _compute_rewards_of_each([s for s in batch.scored if s.rollout.completion_lengths.size], weights, config)
    advantage = torch.cat([one.advantage.flatten() for one in rewards])
    correction = CORRECTIONS[config.correction](tokens, advantage, limits_of(config))
    return Credit(
        factor=correction * advantage[tokens.completion],
        correction=correction,
        log_ratio=log_ratio,
        weights=weights,
        lag=largest_lag(tokens),
        rewards=rewards,
    )


def limits_of(config: LearnerConfig) -> Limits:
    """The numbers a correction needs: the configured ones, or the published ones where none are configured."""
    low, high = config.ratio_bounds or PUBLISHED_BOUNDS.get(config.correction, (0.0, float("inf")))
    return Limits(
        max_importance_weight=config.max_importance_weight,
        ratio_low=low,
        ratio_high=high,
        second_moment=M2PO_SECOND_MOMENT,
    )


def _compute_rewards_of_each(
    scored: Sequence[ScoredRollout], weights: Float64[Tensor, " completion"], config: LearnerConfig
) -> list[GroupRewards]:
    shapes = [one.rollout.completion_lengths.shape for one in scored]
    parts = weights.split([groups * n for groups, n in shapes])
    return [
        compute_rewards(one, config, part.unflatten(0, shape))
        for one, part, shape in zip(scored, parts, shapes, strict=True)
    ]
