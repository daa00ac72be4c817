"""The policy gradient is the gradient of the loss: exact, by enumerating every group that could be drawn.

With a softmax policy over V completions of one token, all V^n groups can be summed over, instead of sampled.
"""

import itertools

import pytest
import torch

from feature_server.features.gram import gram_statistics
from learner.objective import reward as formulas
from learner.objective.advantage import feature_rewards
from learner.objective.whitening import unwhitened

THETA = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(3)
FEATURES = torch.randn(3, 5, dtype=torch.float64, generator=GENERATOR)
GROUND_TRUTH = torch.randn(5, dtype=torch.float64, generator=GENERATOR)


def reward(alignment, inner_products, **coefs):
    similarity = formulas.sibling_similarity(inner_products)
    return formulas.reward(formulas.alignment_reward(alignment), similarity, **coefs)


def advantage(alignment, inner_products, **coefs):
    return feature_rewards(alignment, inner_products, **coefs).advantage


def all_groups(num_tokens, n):
    return torch.tensor(list(itertools.product(range(num_tokens), repeat=n)))


def cfm_gradient(theta, features, ground_truth, diversity_coef=1.0):
    """d/dtheta of diversity_coef * ||mu||^2 - 2 <mu, phi_y>; the coefficient 1 makes it the CFM loss."""
    theta = theta.clone().requires_grad_()
    mean = torch.softmax(theta, 0) @ features
    (diversity_coef * mean.square().sum() - 2 * mean @ ground_truth).backward()
    return theta.grad


def expected_estimate(theta, features, ground_truth, n, weigh, **coefs):
    """E[(1/n) sum_j A_j grad log p(completion_j)], with A = weigh(alignment, inner_products, **coefs)."""
    tokens = all_groups(len(theta), n)
    groups = unwhitened(
        gram_statistics(features[tokens], ground_truth.expand(len(tokens), -1)), alignment="inner_product"
    )
    weights = weigh(groups.alignment, groups.inner_products, **coefs)
    probs = torch.softmax(theta, 0)
    score = torch.eye(len(theta), dtype=torch.float64)[tokens] - probs  # grad log p = one-hot - p
    return torch.einsum("g,gj,gjv->v", probs[tokens].prod(-1), weights, score) / n


@pytest.mark.parametrize("diversity_coef", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("weigh", "n"), [(reward, 2), (reward, 3), (reward, 4), (advantage, 2), (advantage, 3), (advantage, 4)]
)
def test_reward_and_advantage_descend_the_cfm_loss(weigh, n, diversity_coef):
    if weigh is advantage and n == 2 and diversity_coef > 0:
        diversity_coef = 0.0  # two completions have no baseline for the similarity
    estimate = expected_estimate(
        THETA, FEATURES, GROUND_TRUTH, n, weigh, alignment_coef=1.0, diversity_coef=diversity_coef
    )
    descent = -cfm_gradient(THETA, FEATURES, GROUND_TRUTH, diversity_coef)
    assert descent.norm() > 0.1
    torch.testing.assert_close(estimate, descent, rtol=0, atol=1e-14)


def plain_leave_one_out(alignment, inner_products, **coefs):
    """Reward less the leave-one-out mean of the siblings' whole rewards."""
    total = reward(alignment, inner_products, **coefs)
    n = total.shape[-1]
    return total - (total.sum(-1, keepdim=True) - total) / (n - 1)


@pytest.mark.parametrize("n", [3, 4])
def test_plain_leave_one_out_would_shrink_the_diversity_gradient(n):
    coefs = {"alignment_coef": 1.0, "diversity_coef": 1.0}
    estimate = expected_estimate(THETA, FEATURES, GROUND_TRUTH, n, plain_leave_one_out, **coefs)
    descent = -cfm_gradient(THETA, FEATURES, GROUND_TRUTH)
    alignment_part = -cfm_gradient(THETA, FEATURES, GROUND_TRUTH, diversity_coef=0.0)
    shrunk = alignment_part + (n - 2) / (n - 1) * (descent - alignment_part)
    torch.testing.assert_close(estimate, shrunk, rtol=0, atol=1e-14)
    assert (estimate - descent).norm() > 0.05 * descent.norm()


def reward_with(alignment, inner_products, *, scale):
    """2 alignment_j + scale * sum of the siblings' inner products."""
    own = inner_products.diagonal(dim1=-2, dim2=-1)
    return 2 * alignment + scale * (inner_products.sum(-1) - own)


@pytest.mark.parametrize("n", [3, 4])
def test_other_scales_of_the_diversity_term_miss_the_gradient(n):
    descent = -cfm_gradient(THETA, FEATURES, GROUND_TRUTH)

    def error(scale):
        estimate = expected_estimate(THETA, FEATURES, GROUND_TRUTH, n, reward_with, scale=scale)
        return float((estimate - descent).norm() / descent.norm())

    assert error(-2 / (n - 1)) < 1e-14
    assert error(2 / (n - 1)) > 0.5  # wrong sign
    assert error(-2 / n) > 0.05  # n instead of n - 1
    assert error(-1 / (n - 1)) > 0.05  # the 2 forgotten


def test_loss_over_all_ground_truths_has_the_gradient_of_feature_matching():
    data = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    conditional = sum(data[y] * cfm_gradient(THETA, FEATURES, FEATURES[y]) for y in range(3))
    torch.testing.assert_close(conditional, cfm_gradient(THETA, FEATURES, data @ FEATURES), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [3, 4])
def test_expected_gradient_is_zero_at_the_data_distribution_only_with_full_diversity(n):
    data = torch.softmax(THETA, 0)

    def estimate(diversity_coef):
        coefs = {"alignment_coef": 1.0, "diversity_coef": diversity_coef}
        return sum(data[y] * expected_estimate(THETA, FEATURES, FEATURES[y], n, advantage, **coefs) for y in range(3))

    assert estimate(1.0).norm() < 1e-14
    assert estimate(0.5).norm() > 0.01
    assert estimate(0.0).norm() > 0.01


def trained(features, data, diversity_coef, *, theta, learning_rate=3.0, num_steps=3000, n=3):
    """Final probabilities of a tabular policy trained with the exact expected policy gradient."""
    tokens = all_groups(len(theta), n)
    one_hot = torch.eye(len(theta), dtype=torch.float64)[tokens]
    advantages = torch.zeros(tokens.shape, dtype=torch.float64)
    # Advantages are linear in the ground truth's features, so they can be averaged over the data beforehand.
    for prob, ground_truth in zip(data, features, strict=True):
        statistics = gram_statistics(features[tokens], ground_truth.expand(len(tokens), -1))
        coefs = {"alignment_coef": 1.0, "diversity_coef": diversity_coef}
        advantages += prob * advantage(statistics.ground_truth_products, statistics.gram, **coefs)
    for _ in range(num_steps):
        probs = torch.softmax(theta, 0)
        weights = probs[tokens].prod(-1, keepdim=True) * advantages / n
        theta = theta + learning_rate * torch.einsum("gj,gjv->v", weights, one_hot - probs)
    return torch.softmax(theta, 0)


def test_one_hot_features_teach_the_data_distribution_only_with_diversity():
    data = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    start = torch.tensor([-1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    one_hot = torch.eye(4, dtype=torch.float64)
    matched = trained(one_hot, data, 1.0, theta=start)
    torch.testing.assert_close(matched, data, rtol=0, atol=1e-6)
    collapsed = trained(one_hot, data, 0.0, theta=start)
    assert collapsed[0] > 0.98


def test_planted_duplicates_vanish_only_with_diversity():
    """The third completion resembles every ground truth and is none; the policy starts out repeating it."""
    features = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    data = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    start = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.softmax(start, 0)[2] > 0.75
    diverse = trained(features, data, 1.0, theta=start)
    assert diverse[2] < 0.01
    torch.testing.assert_close(diverse[0], diverse[1])
    assert trained(features, data, 0.0, theta=start)[2] > 0.99
