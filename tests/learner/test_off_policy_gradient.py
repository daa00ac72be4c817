"""Importance weights inside the reward make the off-policy gradient that of the CFM loss: exact, by enumeration.

An older policy draws the groups. Outer weights turn each completion's own term back into the learner's; its siblings,
who stand for the learner's mean feature, need weights of their own.
"""

import math

import pytest
import torch
from toy_policy import BEHAVIOR, ENDED_BY_0, LEARNER, LENGTH_1, LENGTH_2, Toy, relative_error

from learner.objective.advantage import feature_rewards, leave_one_out_mean
from learner.objective.importance import (
    SampledTokens,
    sequence_log_ratio,
    sequence_weights,
)
from learner.objective.off_policy import (
    CORRECTIONS,
    Limits,
)

COEFS = {"alignment_coef": 1.0, "diversity_coef": 1.0}
OPEN = Limits(max_importance_weight=math.inf, ratio_low=0.0, ratio_high=math.inf, second_moment=math.inf)

SPACES = pytest.mark.parametrize(
    "toy",
    [
        pytest.param(Toy(completions=LENGTH_1, n=3), id="1 token, n=3"),
        pytest.param(Toy(completions=LENGTH_1, n=4), id="1 token, n=4"),
        pytest.param(Toy(completions=LENGTH_2, n=3), id="2 tokens, n=3"),
        pytest.param(Toy(completions=LENGTH_2, n=4), id="2 tokens, n=4"),
        pytest.param(Toy(completions=ENDED_BY_0, n=3), id="1 or 2 tokens, n=3"),
    ],
)


def advantage(alignment, inner_products, weights=None, **coefs):
    return feature_rewards(alignment, inner_products, weights, **coefs).advantage


def pair_weights(toy: Toy, tokens: SampledTokens, bound: float = math.inf) -> torch.Tensor:
    return sequence_weights(sequence_log_ratio(tokens), max_importance_weight=bound).reshape(toy.groups.shape)


def estimate(toy, advantages, *, correction="sequence_is", limits=OPEN, learner=LEARNER, behavior=BEHAVIOR):
    factor = CORRECTIONS[correction](toy.sampled(learner, behavior), advantages.flatten(), limits)
    return toy.expected(factor, advantages, learner=learner, behavior=behavior)


@SPACES
def test_pairwise_and_outer_weights_descend_the_cfm_loss_off_policy(toy):
    weights = pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR))
    assert weights.log().abs().max() > 0.3
    target = toy.descent(LEARNER)
    assert target.norm() > 0.1
    rewards = feature_rewards(*toy.statistics(), weights, **COEFS)
    for factor in (rewards.advantage, rewards.reward):  # the baseline changes nothing on average
        found = estimate(toy, factor)
        torch.testing.assert_close(found, target, rtol=0, atol=1e-12)


@SPACES
@pytest.mark.parametrize("diversity_coef", [0.0, 0.5])
def test_other_diversity_coefficients_are_exact_too(toy, diversity_coef):
    weights = pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR))
    advantages = advantage(*toy.statistics(), weights, alignment_coef=1.0, diversity_coef=diversity_coef)
    target = toy.descent(LEARNER, diversity_coef=diversity_coef)
    torch.testing.assert_close(estimate(toy, advantages), target, rtol=0, atol=1e-12)


@SPACES
def test_either_set_of_weights_alone_is_biased(toy):
    target = toy.descent(LEARNER)
    weights = pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR))
    weighted, plain = advantage(*toy.statistics(), weights, **COEFS), advantage(*toy.statistics(), **COEFS)
    assert relative_error(estimate(toy, weighted, correction="none"), target) > 1e-3
    assert relative_error(estimate(toy, plain), target) > 1e-3
    assert relative_error(estimate(toy, plain, correction="none"), target) > 1e-3


@SPACES
def test_outer_weights_alone_match_the_mean_feature_of_the_behavior_policy(toy):
    """What they descend is known: -2 <mean, phi_y> + 2 <mean, stale mean>, the stale mean held fixed."""
    found = estimate(toy, advantage(*toy.statistics(), **COEFS))
    theta = LEARNER.clone().requires_grad_()
    mean, stale_mean = toy.mean_feature(theta), toy.mean_feature(BEHAVIOR)
    (2 * mean @ toy.ground_truth - 2 * mean @ stale_mean).backward()
    torch.testing.assert_close(found, theta.grad, rtol=0, atol=1e-12)


def transcribed(toy, weights, *, pairs_divisor, plain_baseline=False):
    """r_j - b_j with Python loops over members, 2 / pairs_divisor in front of the siblings' sum."""
    alignment, gram = toy.statistics()
    n = toy.n
    rewards, baselines = torch.zeros_like(alignment), torch.zeros_like(alignment)
    for j in range(n):
        others = [k for k in range(n) if k != j]
        siblings = sum(weights[:, k] * gram[:, j, k] for k in others)
        rewards[:, j] = 2 * alignment[:, j] - 2 / pairs_divisor * siblings
        between = sum(weights[:, k] * weights[:, m] * gram[:, k, m] for k in others for m in others if m != k)
        baselines[:, j] = 2 / (n - 1) * sum(weights[:, k] * alignment[:, k] for k in others)
        baselines[:, j] -= 2 / ((n - 1) * (n - 2)) * between
    return rewards - (leave_one_out_mean(rewards, weights) if plain_baseline else baselines)


@SPACES
def test_near_misses_of_the_estimator_are_biased(toy):
    """n in place of n - 1, plain RLOO, and the wrong sign of the log-ratio inside the reward or outside."""
    target = toy.descent(LEARNER)
    weights = pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR))
    assert relative_error(estimate(toy, transcribed(toy, weights, pairs_divisor=toy.n - 1)), target) < 1e-12
    assert relative_error(estimate(toy, transcribed(toy, weights, pairs_divisor=toy.n)), target) > 1e-3
    plain = transcribed(toy, weights, pairs_divisor=toy.n - 1, plain_baseline=True)
    assert relative_error(estimate(toy, plain), target) > 1e-3
    inverted = pair_weights(toy, toy.sampled(BEHAVIOR, LEARNER))
    assert relative_error(estimate(toy, advantage(*toy.statistics(), inverted, **COEFS)), target) > 1e-3
    swapped = CORRECTIONS["sequence_is"](toy.sampled(BEHAVIOR, LEARNER), torch.zeros(toy.groups.numel()), OPEN)
    advantages = advantage(*toy.statistics(), weights, **COEFS)
    outside = toy.expected(swapped, advantages, learner=LEARNER, behavior=BEHAVIOR)
    assert relative_error(outside, target) > 1e-3


@SPACES
def test_truncation_and_self_normalisation_are_biased_but_exact_on_policy(toy):
    advantages = advantage(
        *toy.statistics(), pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR)), self_normalised=True, **COEFS
    )
    assert relative_error(estimate(toy, advantages), toy.descent(LEARNER)) > 1e-3
    capped = pair_weights(toy, toy.sampled(LEARNER, BEHAVIOR), bound=1.1)
    limits = Limits(max_importance_weight=1.1, ratio_low=0.0, ratio_high=math.inf, second_moment=math.inf)
    truncated = estimate(
        toy, advantage(*toy.statistics(), capped, **COEFS), correction="truncated_sequence_is", limits=limits
    )
    assert relative_error(truncated, toy.descent(LEARNER)) > 1e-3
    ones = pair_weights(toy, toy.sampled(LEARNER, LEARNER), bound=1.0)
    for self_normalised in (False, True):
        advantages = advantage(*toy.statistics(), ones, self_normalised=self_normalised, **COEFS)
        found = estimate(toy, advantages, behavior=LEARNER)
        torch.testing.assert_close(found, toy.descent(LEARNER), rtol=0, atol=1e-12)
