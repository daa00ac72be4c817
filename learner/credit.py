"""What each sampled token's log-probability is multiplied by: the correction of its completion times its advantage.

Rewards, baselines and corrections all depend on the learner's current log-probs, so they are computed here, between the
forward and the backward pass, at every use of a rollout, each once: what is reported of a step is read from the fields.
Everything in float64 on the CPU: a few thousand numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from learner.batch import MicroBatch
from learner.config import LearnerConfig
from learner.objective.advantage import GroupRewards
from learner.objective.importance import (
    SampledTokens,
    largest_lag,
    sequence_log_ratio,
    sequence_weights,
)
from learner.objective.off_policy import CORRECTIONS, M2PO_SECOND_MOMENT, PUBLISHED_BOUNDS, Limits
from learner.objective.reward import cfm_unbiased
from learner.rewards import compute_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Gradient factors of the sampled tokens of one micro-batch, and what they are computed from."""

    lag: Float64[Tensor, " completion"]
    """Learner steps since the oldest weights that sampled a token of the completion."""
    log_ratio: Float64[Tensor, " completion"]
    """log p_learner - log p_behavior of whole completions [nats]."""
    weights: Float64[Tensor, " completion"]
    """Importance weights of whole completions, truncated: what enters the reward."""
    is_truncated: Bool[Tensor, " completion"]
    """Whether truncation lowered the completion's weight."""
    rewards: Sequence[GroupRewards]
    """One for each scored rollout, in order."""
    cfm_losses: Sequence[Float64[Tensor, " _group"]]
    """Unbiased CFM of the raw features, for each rollout that has features and pairs of completions."""
    correction: Float64[Tensor, " token"]
    """Factor of the token's gradient; 1 on policy, 0 where a token is masked."""
    factor: Float64[Tensor, " token"]
    """Correction times advantage; constant, one for each sampled token."""


def assign_credit(
    batch: MicroBatch, learner_logprobs: Float[Tensor, " token"], config: LearnerConfig, *, policy_version: int
) -> Credit:
    """Importance weights, rewards, advantages and corrections under the learner's current log-probs.

    Raises: ValueError on log-probs that are not finite or a ratio that overflows, and as `compute_rewards`.
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
    rewards = _rewards_of_each(batch, weights, config)
    advantage = torch.cat([one.advantage.flatten() for one in rewards])
    correction = CORRECTIONS[config.correction](tokens, advantage, limits_of(config))
    return Credit(
        lag=largest_lag(tokens),
        log_ratio=log_ratio,
        weights=weights,
        is_truncated=log_ratio.exp() > weights,
        rewards=rewards,
        cfm_losses=[cfm_unbiased(one.raw) for one in batch.scored if one.raw.gram.shape[-1] > 1],
        correction=correction,
        factor=correction * advantage[tokens.completion],
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


def _rewards_of_each(
    batch: MicroBatch, weights: Float64[Tensor, " completion"], config: LearnerConfig
) -> list[GroupRewards]:
    shapes = [one.rollout.completion_lengths.shape for one in batch.scored]
    parts = weights.split([groups * n for groups, n in shapes])
    return [
        compute_rewards(one, config, part.unflatten(0, shape))
        for one, part, shape in zip(batch.scored, parts, shapes, strict=True)
    ]
