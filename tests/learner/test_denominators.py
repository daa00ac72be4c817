"""What the policy gradient is divided by: exact expectations, by enumerating every group of short completions.

The loss is the product's own, from a rollout of each group to its backward pass.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_policy import ENDED_BY_0, LEARNER, Toy, relative_error

from actors.rollout import Document, Rollout
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout
from learner.batch import MicroBatch, make_micro_batches, policy_gradient_tokens
from learner.config import LearnerConfig, LossNormalization
from learner.credit import assign_credit
from learner.loss import policy_gradient_loss

HORIZON = 2
CONFIG = LearnerConfig(whitening="none")
TOY = Toy(completions=ENDED_BY_0, n=3)


def scored_group(toy: Toy, group: list[int], logprobs: Tensor) -> ScoredRollout:
    """One document with one group, on policy; `logprobs`: of the group's tokens."""
    drawn = [toy.completions[index] for index in group]
    lengths = np.array([[len(tokens) for tokens in drawn]])
    ids, behavior = np.zeros((1, toy.n, HORIZON), dtype=np.int64), np.zeros((1, toy.n, HORIZON), dtype=np.float32)
    is_token = np.arange(HORIZON) < lengths[..., None]
    ids[is_token], behavior[is_token] = np.concatenate(drawn), logprobs.numpy()
    rollout = Rollout(
        ticket_id=0,
        document=Document(
            document_id="d", token_ids=np.ones(4, dtype=np.int64), anchors=np.array([2]), horizon=HORIZON,
            ends_with_eos=True, num_prompt_tokens=0,
        ),
        completion_ids=ids, completion_lengths=lengths, behavior_logprobs=behavior, token_versions=np.zeros_like(ids),
    )  # fmt: skip
    raw = gram_statistics(toy.features[torch.tensor([group])], toy.ground_truth[None])
    return ScoredRollout(rollout=rollout, raw=raw, whitened=None, score_s=0.0)


def step_gradient(batch: MicroBatch, group: list[int], normalization: LossNormalization) -> Tensor:
    """Of the loss of a step that has this group alone."""
    theta = LEARNER.clone().requires_grad_()
    logprobs = group_logprobs(theta, group)
    credit = assign_credit(batch, logprobs, CONFIG, policy_version=0)
    loss = policy_gradient_loss(logprobs, credit.factor, num_tokens=policy_gradient_tokens(batch, normalization))
    loss.backward()
    assert theta.grad is not None
    return theta.grad


def group_logprobs(theta: Tensor, group: list[int]) -> Tensor:
    drawn = [TOY.completions[index] for index in group]
    rows = [row for tokens in drawn for row in (0, *(1 + token for token in tokens[:-1]))]
    return theta.log_softmax(-1)[rows, [token for tokens in drawn for token in tokens]]


def expected_gradient(normalization: LossNormalization) -> Tensor:
    total, probability = torch.zeros_like(LEARNER), 0.0
    for group in TOY.groups.tolist():
        logprobs = group_logprobs(LEARNER, group)
        (batch,) = make_micro_batches([scored_group(TOY, group, logprobs)], documents=1)
        share = float(logprobs.sum().exp())
        total += share * step_gradient(batch, group, normalization)
        probability += share
    assert probability == pytest.approx(1, abs=1e-12)
    return total


def test_the_fixed_denominator_makes_the_expected_gradient_exact() -> None:
    target = -TOY.descent(LEARNER) / HORIZON
    assert relative_error(expected_gradient("horizon"), target) < 1e-6


def test_realised_token_counts_bend_the_expected_gradient() -> None:
    """Whatever it is scaled by: the direction is off."""
    found, target = expected_gradient("sampled_tokens"), -TOY.descent(LEARNER)
    scale = float((found * target).sum() / target.square().sum())
    assert 0.01 < relative_error(found / scale, target) < 0.1


@pytest.mark.parametrize(("normalization", "expected"), [("sampled_tokens", 4), ("horizon", 6)])
def test_denominators_of_one_group(normalization: LossNormalization, expected: int) -> None:
    group = [0, 1, 0]  # 1, 2 and 1 tokens
    (batch,) = make_micro_batches([scored_group(TOY, group, group_logprobs(LEARNER, group))], documents=1)
    assert policy_gradient_tokens(batch, normalization) == expected
    (bare,) = make_micro_batches([batch.scored[0].rollout.document], documents=1)
    assert policy_gradient_tokens(bare, normalization) == 0
