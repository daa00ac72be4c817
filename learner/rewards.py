"""From a scored rollout to rewards: whitening, reward, baseline and advantage under the configured objective.

Recomputed at every use of a rollout, because the importance weights in them are those of the learner's current
weights. Called by learner.credit, once for each rollout of a micro-batch.
"""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from feature_server.features.gram import GramStatistics
from feature_server.scored_rollout import ScoredRollout
from learner.config import LearnerConfig
from learner.objective.advantage import GroupRewards, feature_rewards, scalar_rewards
from learner.objective.whitening import whiten


def compute_rewards(
    scored: ScoredRollout, config: LearnerConfig, importance_weights: Float64[Tensor, "group completion"]
) -> GroupRewards:
    """Reward and RLOO advantage of every completion of a rollout.

    `importance_weights` are p_learner / p_behavior of whole completions, truncated; learner.reward_weights says
    whether and how they enter.

    Raises: ValueError if the rollout lacks what the objective needs: a pooled whitening map, or a verifier's reward.
    """
    weights = None if config.reward_weights == "none" else importance_weights
    self_normalised = config.reward_weights == "self_normalised"
    if config.objective != "ebft":
        return scalar_rewards(_scalar_reward(scored, config), weights, self_normalised=self_normalised)
    pooled = config.whitening == "pooled"
    groups = whiten(
        _pooled_statistics(scored) if pooled else scored.raw,
        weights,
        whitening="none" if pooled else config.whitening,  # the server has mapped the features already
        alignment=config.alignment,
        shrinkage=config.group_shrinkage,
    )
    return feature_rewards(
        groups.alignment,
        groups.inner_products,
        weights,
        alignment_coef=config.alignment_coef,
        diversity_coef=config.diversity_coef,
        self_normalised=self_normalised,
    )


def _pooled_statistics(scored: ScoredRollout) -> GramStatistics:
    if scored.whitened is None:
        raise ValueError(
            f"document {scored.rollout.document.document_id!r} was scored before a pooled whitening map was fitted; "
            "fit one on the feature server first, or set learner.whitening='none'"
        )
    return scored.whitened


def _scalar_reward(scored: ScoredRollout, config: LearnerConfig) -> Float64[Tensor, "group completion"]:
    if config.objective == "self_likelihood":
        rollout = scored.rollout
        return torch.tensor(rollout.behavior_logprobs.sum(-1, dtype=np.float64, where=rollout.is_token))
    if scored.verified is None:
        raise ValueError(
            f"document {scored.rollout.document.document_id!r} comes without a verifier's reward, which "
            "learner.objective='rlvr' needs; score it with a verifier server"
        )
    return scored.verified
