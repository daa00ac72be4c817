"""Importance weights: transcriptions, and the exact bias of each correction by enumeration."""

import itertools
import math

import pytest
import torch

from feature_server.gram import gram_statistics
from learner.advantage import advantage
from learner.off_policy import (
    CORRECTIONS,
    effective_sample_frac,
    no_weights,
    sequence_log_ratio,
    truncated_sequence_weights,
)

LEARNER_THETA = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
BEHAVIOR_THETA = torch.tensor([-0.3, 0.2, 0.5], dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(5)
FEATURES = torch.randn(3, 5, dtype=torch.float64, generator=GENERATOR)
GROUND_TRUTH = torch.randn(5, dtype=torch.float64, generator=GENERATOR)
UNTRUNCATED = 1e6


def test_sequence_log_ratio_sums_own_tokens():
    lengths = [4, 1, 0, 2]
    completion = torch.tensor([3, 0, 1, 0, 0, 3, 0])
    assert [int((completion == i).sum()) for i in range(4)] == lengths
    learner = torch.randn(7, dtype=torch.float64, generator=GENERATOR)
    behavior = torch.randn(7, dtype=torch.float64, generator=GENERATOR)
    expected = [sum(float(learner[t]) - float(behavior[t]) for t in range(7) if completion[t] == i) for i in range(4)]
    actual = sequence_log_ratio(learner, behavior, completion, 4)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_sequence_log_ratio_carries_the_gradient_of_the_learner():
    learner = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_ratio = sequence_log_ratio(learner, torch.zeros(3, dtype=torch.float64), torch.tensor([1, 0, 1]), 2)
    log_ratio[1].backward()
    assert torch.equal(learner.grad, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_log_ratios_that_are_not_finite_name_their_completion(broken):
    learner = torch.tensor([0.0, 0.0, broken, 0.0])
    with pytest.raises(ValueError, match=r"log-ratios must be finite, got .* for completion 1;"):
        sequence_log_ratio(learner, torch.zeros(4), torch.tensor([0, 0, 1, 2]), 3)
    for correction in CORRECTIONS.values():
        with pytest.raises(ValueError, match=r"for completion 2;"):
            correction(torch.tensor([0.0, 0.0, broken]), max_importance_weight=2.0)


def test_truncated_weights_equal_the_transcription():
    log_ratio = torch.tensor([-800.0, -3.0, -0.1, 0.0, 0.5, math.log(2), 0.7, 50.0, 1e4], dtype=torch.float64)
    for bound in (1.0, 2.0, 3.7):
        expected = [math.exp(min(float(x), 1e2)) for x in log_ratio]
        expected = torch.tensor([min(weight, bound) for weight in expected], dtype=torch.float64)
        actual = truncated_sequence_weights(log_ratio, max_importance_weight=bound)
        torch.testing.assert_close(actual, expected, rtol=1e-15, atol=0)
        assert (actual <= bound).all()


def test_weights_do_not_overflow_in_float32_and_carry_no_gradient():
    log_ratio = torch.tensor([-1e4, 0.0, 1e4, 3e38], requires_grad=True)
    for correction in CORRECTIONS.values():
        weights = correction(log_ratio, max_importance_weight=UNTRUNCATED)
        assert torch.isfinite(weights).all()
        assert not weights.requires_grad
        assert weights.dtype == torch.float32


def test_weights_are_one_when_the_policies_agree():
    logprobs = -torch.rand(10)
    log_ratio = sequence_log_ratio(logprobs, logprobs, torch.arange(10) // 2, 5)
    assert set(CORRECTIONS) >= {"none", "truncated_sequence_is"}
    for correction in CORRECTIONS.values():
        assert torch.equal(correction(log_ratio, max_importance_weight=2.0), torch.ones(5))
    assert torch.equal(no_weights(torch.tensor([3.0, -3.0]), max_importance_weight=2.0), torch.ones(2))


@pytest.mark.parametrize("bound", [0.0, 0.99, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_or_too_much_is_refused(bound):
    with pytest.raises(ValueError, match="max_importance_weight must be finite and at least 1, got"):
        truncated_sequence_weights(torch.zeros(2), max_importance_weight=bound)


def expected_estimate(sampling_theta, correction, bound, *, diversity_coef, n=3):
    """Mean corrected policy gradient at LEARNER_THETA over all groups that sampling_theta could draw."""
    tokens = torch.tensor(list(itertools.product(range(3), repeat=n)))
    statistics = gram_statistics(FEATURES[tokens], GROUND_TRUTH.expand(len(tokens), -1))
    advantages = advantage(statistics.products, statistics.gram, alignment_coef=1.0, diversity_coef=diversity_coef)
    learner, behavior = (torch.log_softmax(theta, 0)[tokens] for theta in (LEARNER_THETA, sampling_theta))
    each = torch.arange(tokens.numel())  # one token per completion
    log_ratio = sequence_log_ratio(learner.reshape(-1), behavior.reshape(-1), each, len(each))
    weights = correction(log_ratio, max_importance_weight=bound).reshape(tokens.shape)
    score = torch.eye(3, dtype=torch.float64)[tokens] - torch.softmax(LEARNER_THETA, 0)
    group_probs = behavior.sum(-1).exp()
    return torch.einsum("g,gj,gjv->v", group_probs, weights * advantages, score) / n


def on_policy_gradient(diversity_coef):
    theta = LEARNER_THETA.clone().requires_grad_()
    mean = torch.softmax(theta, 0) @ FEATURES
    (2 * mean @ GROUND_TRUTH - diversity_coef * mean.square().sum()).backward()
    return theta.grad


@pytest.mark.parametrize("n", [2, 3])
def test_untruncated_weights_recover_the_on_policy_gradient_of_the_alignment(n):
    target = on_policy_gradient(0.0)

    def error(correction, bound):
        estimate = expected_estimate(BEHAVIOR_THETA, correction, bound, diversity_coef=0.0, n=n)
        return float((estimate - target).norm() / target.norm())

    assert error(truncated_sequence_weights, UNTRUNCATED) < 1e-14
    assert error(truncated_sequence_weights, 1.0) > 0.05
    assert error(no_weights, UNTRUNCATED) > 0.05


def test_outer_weights_alone_leave_the_diversity_term_stale():
    """They match the mean feature of the behavior policy: the siblings are not weighted."""
    theta = LEARNER_THETA.clone().requires_grad_()
    mean = torch.softmax(theta, 0) @ FEATURES
    stale_mean = torch.softmax(BEHAVIOR_THETA, 0) @ FEATURES
    (2 * mean @ GROUND_TRUTH - 2 * mean @ stale_mean).backward()
    estimate = expected_estimate(BEHAVIOR_THETA, truncated_sequence_weights, UNTRUNCATED, diversity_coef=1.0)
    torch.testing.assert_close(estimate, theta.grad, rtol=0, atol=1e-14)
    assert (estimate - on_policy_gradient(1.0)).norm() > 0.05 * on_policy_gradient(1.0).norm()


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
@pytest.mark.parametrize("diversity_coef", [0.0, 1.0])
def test_every_correction_is_on_policy_when_the_policies_agree(name, diversity_coef):
    estimate = expected_estimate(LEARNER_THETA, CORRECTIONS[name], 2.0, diversity_coef=diversity_coef)
    torch.testing.assert_close(estimate, on_policy_gradient(diversity_coef), rtol=0, atol=1e-14)


def test_effective_sample_frac():
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    w = weights.tolist()
    expected = sum(w) ** 2 / (4 * sum(x * x for x in w))
    assert float(effective_sample_frac(weights)) == pytest.approx(expected, rel=1e-14)
    assert float(effective_sample_frac(torch.full((7,), 1e-30))) == pytest.approx(1)
    assert float(effective_sample_frac(torch.tensor([0.0, 0.0, 3.0, 0.0]))) == pytest.approx(0.25)
    assert float(effective_sample_frac(torch.zeros(4))) == 0
    with pytest.raises(ValueError, match="at least 1 weight, got 0"):
        effective_sample_frac(torch.zeros(0))
