"""Micro-batches: some documents of a step as one packed batch, and what is known of their sampled tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from actors.rollout import Document
from feature_server.packing import PackedBatch, pack
from feature_server.scored_rollout import ScoredRollout
from learner.config import LossNormalization

Example = ScoredRollout | Document
"""One document of a step: sampled and scored, or bare in supervised fine-tuning."""


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


def make_micro_batches(examples: Sequence[Example], *, documents: int) -> list[MicroBatch]:
    """Cut a rank's share of the step into micro-batches of that many documents."""
    return [_micro_batch(examples[first : first + documents]) for first in range(0, len(examples), documents)]


def policy_gradient_tokens(batch: MicroBatch, normalization: LossNormalization) -> int:
    """This batch's part of the policy gradient's denominator.

    `horizon`: groups x completions x horizon, which depends on the documents alone.
    Test: test_denominators.py
    """
    if normalization == "horizon":
        return sum(one.rollout.completion_ids.size for one in batch.scored)
    return len(batch.packed.completion_tokens.target)


def _micro_batch(examples: Sequence[Example]) -> MicroBatch:
    scored = [example for example in examples if isinstance(example, ScoredRollout)]
    rollouts = [one.rollout for one in scored]
    return MicroBatch(
        packed=pack([example.rollout if isinstance(example, ScoredRollout) else example for example in examples]),
        scored=scored,
        # In the packed order (group, completion, step), real tokens only.
        behavior_logprobs=_joined([r.behavior_logprobs[r.is_token] for r in rollouts], torch.float32),
        sampled_at=_joined([r.token_versions[r.is_token] for r in rollouts], torch.long),
    )


def _joined(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Shaped[Tensor, " token"]:
    return torch.cat([torch.zeros(0, dtype=dtype), *map(torch.tensor, parts)])
