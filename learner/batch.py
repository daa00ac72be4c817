"""From scored rollouts to micro-batches: rewards and advantages are computed here, at every use of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from feature_server.packing import PackedBatch, pack
from feature_server.scored_rollout import ScoredRollout
from learner.advantage import advantage
from learner.config import LearnerConfig
from learner.reward import reward, sibling_similarity
from learner.whitening import WhitenedGroups, feature_space, sample_mixing, unwhitened


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of one rank."""

    packed: PackedBatch
    advantage: Float[Tensor, " completion"]
    """In the order of packed.completions."""
    behavior_logprobs: Float[Tensor, " token"]
    """Nats, in the order of packed.completion_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one rollout's groups earned."""

    alignment: Float[Tensor, "group completion"]
    sibling_similarity: Float[Tensor, "group completion"]
    reward: Float[Tensor, "group completion"]
    advantage: Float[Tensor, "group completion"]


def whiten(scored: ScoredRollout, config: LearnerConfig) -> WhitenedGroups:
    """The groups' alignment and inner products under the configured whitening.

    Raises: ValueError if pooled whitening is asked for and the feature server had no map when it scored.
    """
    if config.whitening == "feature_space":
        return feature_space(scored.raw)
    if config.whitening == "sample_mixing":
        return sample_mixing(scored.raw)
    statistics = scored.raw if config.whitening == "none" else scored.whitened
    if statistics is None:
        raise ValueError(
            f"document {scored.rollout.document.document_id!r} was scored before a pooled whitening map was fitted; "
            "fit one on the feature server first, or set learner.whitening='none'"
        )
    return unwhitened(statistics, alignment=config.alignment)


def judge(scored: ScoredRollout, config: LearnerConfig) -> Judged:
    """Reward and RLOO advantage of every completion of a rollout; empty for a document without completions."""
    if scored.raw.products.numel() == 0:
        nothing = scored.raw.products
        return Judged(alignment=nothing, sibling_similarity=nothing, reward=nothing, advantage=nothing)
    groups = whiten(scored, config)
    coefs = {"alignment_coef": config.alignment_coef, "diversity_coef": config.diversity_coef}
    return Judged(
        alignment=groups.alignment,
        sibling_similarity=sibling_similarity(groups.inner_products),
        reward=reward(groups.alignment, groups.inner_products, **coefs),
        advantage=advantage(groups.alignment, groups.inner_products, **coefs),
    )


def make_micro_batches(
    scored: Sequence[ScoredRollout], judged: Sequence[Judged], *, documents: int
) -> list[MicroBatch]:
    """Cut a rank's share of the step into micro-batches of that many documents."""
    batches = []
    for first in range(0, len(scored), documents):
        rollouts = [s.rollout for s in scored[first : first + documents]]
        advantages = [j.advantage.flatten().float() for j in judged[first : first + documents]]
        batches.append(
            MicroBatch(
                packed=pack(rollouts),
                advantage=torch.cat(advantages),
                behavior_logprobs=torch.cat([_sampled(r.behavior_logprobs, r.completion_lengths) for r in rollouts]),
            )
        )
    return batches


def _sampled(values: np.ndarray, lengths: np.ndarray) -> Float[Tensor, " token"]:
    """The values of real tokens only, in the packed order (group, completion, step)."""
    valid = np.arange(values.shape[-1]) < lengths[..., None]
    return torch.tensor(values[valid])
