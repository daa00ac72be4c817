"""From scored rollouts to micro-batches and advantages: rewards are computed anew at every use of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from actors.rollout import Document
from feature_server.packing import PackedBatch, pack
from feature_server.scored_rollout import ScoredRollout
from learner.config import LearnerConfig
from learner.objective.advantage import advantage, leave_one_out_mean
from learner.objective.reward import reward, sibling_similarity
from learner.objective.whitening import WhitenedGroups, whiten

Example = ScoredRollout | Document
"""What one document of a step comes as: sampled and scored, or by itself in supervised fine-tuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of one rank."""

    packed: PackedBatch
    scored: Sequence[ScoredRollout]
    """Those whose completions `packed.completions` holds, in its order; none in supervised fine-tuning."""
    behavior_logprobs: Float[Tensor, " token"]
    """Nats, in the order of packed.completion_tokens."""
    sampled_at: Int[Tensor, " token"]
    """Policy version that sampled each token, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """What one rollout's groups earned under the learner's current weights."""

    reward: Float64[Tensor, "group completion"]
    advantage: Float64[Tensor, "group completion"]
    groups: WhitenedGroups | None
    """What the reward was made of; None where it does not come from features."""
    similarity: Float64[Tensor, "group completion"] | None
    """sibling_similarity of the groups, weighted."""


def make_micro_batches(examples: Sequence[Example], *, documents: int) -> list[MicroBatch]:
    """Cut a rank's share of the step into micro-batches of that many documents."""
    return [_micro_batch(examples[first : first + documents]) for first in range(0, len(examples), documents)]


def is_sampled(example: Example) -> TypeGuard[ScoredRollout]:
    """It has completions to learn from, rather than the document's cross-entropy alone."""
    return isinstance(example, ScoredRollout)


def whitened_groups(
    scored: ScoredRollout, config: LearnerConfig, weights: Float64[Tensor, "group completion"] | None
) -> WhitenedGroups:
    """The groups' alignment and inner products under the configured whitening; weights enter a group's own moment.

    Raises: ValueError if pooled whitening is asked for and the feature server had no map when it scored.
    """
    pooled = config.whitening == "pooled"
    statistics = scored.whitened if pooled else scored.raw
    if statistics is None:
        raise ValueError(
            f"document {scored.rollout.document.document_id!r} was scored before a pooled whitening map was fitted; "
            "fit one on the feature server first, or set learner.whitening='none'"
        )
    return whiten(
        statistics,
        weights,
        whitening="none" if pooled else config.whitening,  # the server has mapped the features already
        alignment=config.alignment,
        shrinkage=config.group_shrinkage,
    )


def compute_rewards(
    scored: ScoredRollout, config: LearnerConfig, importance_weights: Float64[Tensor, "group completion"]
) -> GroupRewards:
    """Reward and RLOO advantage of every completion of a rollout under the configured objective.

    `importance_weights` are p_learner / p_behavior of whole completions, truncated; learner.reward_weights says
    whether and how they enter.
    """
    self_normalised = config.reward_weights == "self_normalised"
    weights = None if config.reward_weights == "none" else importance_weights
    if config.objective != "ebft":
        earned = _scalar_reward(scored, config)
        baseline = leave_one_out_mean(earned, weights, self_normalised=self_normalised)
        return GroupRewards(reward=earned, advantage=earned - baseline, groups=None, similarity=None)
    groups = whitened_groups(scored, config, weights)
    coefs = {"alignment_coef": config.alignment_coef, "diversity_coef": config.diversity_coef}
    coefs |= {"self_normalised": self_normalised}
    return GroupRewards(
        reward=reward(groups.alignment, groups.inner_products, weights, **coefs),
        advantage=advantage(groups.alignment, groups.inner_products, weights, **coefs),
        groups=groups,
        similarity=sibling_similarity(groups.inner_products, weights, self_normalised=self_normalised),
    )


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


def _micro_batch(examples: Sequence[Example]) -> MicroBatch:
    scored = [example for example in examples if is_sampled(example)]
    rollouts = [one.rollout for one in scored]
    return MicroBatch(
        packed=pack([example.rollout if is_sampled(example) else example for example in examples]),
        scored=scored,
        # In the packed order (group, completion, step), real tokens only.
        behavior_logprobs=_joined([r.behavior_logprobs[r.is_token] for r in rollouts], torch.float32),
        sampled_at=_joined([r.token_versions[r.is_token] for r in rollouts], torch.long),
    )


def _joined(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Shaped[Tensor, " token"]:
    return torch.cat([torch.zeros(0, dtype=dtype), *map(torch.tensor, parts)])
