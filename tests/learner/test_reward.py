"""Reward, advantage and CFM against transcriptions that loop over completions."""

import itertools

import pytest
import torch

from feature_server.features.gram import gram_statistics
from learner.objective.advantage import (
    feature_rewards,
    leave_one_out_baseline,
    leave_one_out_pairs_mean,
    scalar_rewards,
)
from learner.objective.reward import (
    alignment_reward,
    cfm_plug_in,
    cfm_unbiased,
    reward,
    sibling_similarity,
    siblings_weight,
)

COEFS = [(1.0, 0.0), (1.0, 0.5), (0.7, 1.0)]


def random_group(n, d=6, num_groups=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    completions = torch.randn(num_groups, n, d, dtype=torch.float64, generator=generator)
    ground_truth = torch.randn(num_groups, d, dtype=torch.float64, generator=generator)
    return completions, ground_truth


def baseline(statistics, weights=None, **coefs):
    aligned = alignment_reward(statistics.ground_truth_products)
    return leave_one_out_baseline(aligned, statistics.gram, weights, **coefs)


def advantage(statistics, weights=None, **coefs):
    return feature_rewards(statistics.ground_truth_products, statistics.gram, weights, **coefs).advantage


def reward_by_loops(alignment, gram, alignment_coef, diversity_coef):
    n = len(alignment)
    rewards = []
    for j in range(n):
        similarity = sum(gram[j][k] for k in range(n) if k != j)
        rewards.append(alignment_coef * 2 * alignment[j] - diversity_coef * 2 / (n - 1) * similarity)
    return torch.tensor(rewards, dtype=torch.float64)


def baseline_by_loops(alignment, gram, alignment_coef, diversity_coef):
    """What the others' rewards would average to, had completion j never been drawn."""
    n = len(alignment)
    baselines = []
    for j in range(n):
        others = [i for i in range(n) if i != j]
        baseline = alignment_coef * sum(2 * alignment[i] for i in others) / (n - 1)
        if diversity_coef:
            pairs = sum(gram[i][k] for i in others for k in others if i != k)
            baseline -= diversity_coef * 2 * pairs / ((n - 1) * (n - 2))
        baselines.append(baseline)
    return torch.tensor(baselines, dtype=torch.float64)


@pytest.mark.parametrize(("alignment_coef", "diversity_coef"), COEFS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_reward_equals_the_transcription(n, alignment_coef, diversity_coef):
    coefs = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}
    statistics = gram_statistics(*random_group(n))
    aligned, similarity = alignment_reward(statistics.ground_truth_products), sibling_similarity(statistics.gram)
    actual = reward(aligned, similarity, **coefs)
    for group in range(3):
        expected = reward_by_loops(
            statistics.ground_truth_products[group].tolist(), statistics.gram[group].tolist(), **coefs
        )
        torch.testing.assert_close(actual[group], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("alignment_coef", "diversity_coef"), COEFS)
@pytest.mark.parametrize("n", [3, 4, 7])
def test_baseline_equals_the_transcription(n, alignment_coef, diversity_coef):
    coefs = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}
    statistics = gram_statistics(*random_group(n))
    actual = baseline(statistics, **coefs)
    for group in range(3):
        expected = baseline_by_loops(
            statistics.ground_truth_products[group].tolist(), statistics.gram[group].tolist(), **coefs
        )
        torch.testing.assert_close(actual[group], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_baseline_does_not_depend_on_its_own_completion(n):
    completions, ground_truth = random_group(n)
    other = completions.clone()
    other[:, 0] = 5.0
    before, after = (gram_statistics(features, ground_truth) for features in (completions, other))
    coefs = {"alignment_coef": 1.0, "diversity_coef": 1.0}
    before = baseline(before, **coefs)
    after = baseline(after, **coefs)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-12)
    assert (after[:, 1:] - before[:, 1:]).abs().min() > 1e-3


@pytest.mark.parametrize(("alignment_coef", "diversity_coef"), COEFS)
@pytest.mark.parametrize("n", [3, 4, 9])
def test_advantage_has_the_closed_form(n, alignment_coef, diversity_coef):
    statistics = gram_statistics(*random_group(n))
    actual = advantage(statistics, alignment_coef=alignment_coef, diversity_coef=diversity_coef)
    a, d = alignment_reward(statistics.ground_truth_products), sibling_similarity(statistics.gram)
    expected = alignment_coef * n / (n - 1) * (a - a.mean(-1, keepdim=True))
    expected = expected - diversity_coef * n / (n - 2) * (d - d.mean(-1, keepdim=True))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(actual.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_completions_without_diversity():
    statistics = gram_statistics(*random_group(2))
    actual = advantage(statistics, alignment_coef=1.0, diversity_coef=0.0)
    difference = 2 * (statistics.ground_truth_products[:, 0] - statistics.ground_truth_products[:, 1])
    torch.testing.assert_close(actual, torch.stack([difference, -difference], 1))


def test_one_completion_has_no_baseline_and_no_siblings():
    statistics = gram_statistics(*random_group(1))
    coefs = {"alignment_coef": 1.0, "diversity_coef": 0.0}
    zero = torch.zeros(3, 1, dtype=torch.float64)
    assert torch.equal(baseline(statistics, **coefs), zero)
    assert torch.equal(sibling_similarity(statistics.gram), zero)
    assert torch.equal(advantage(statistics, **coefs), 2 * statistics.ground_truth_products)


@pytest.mark.parametrize("n", [1, 2])
def test_diversity_needs_three_completions(n):
    statistics = gram_statistics(*random_group(n))
    for function in (baseline, advantage):
        with pytest.raises(ValueError, match=rf"diversity_coef > 0 needs .* >= 3 .*got {n}; raise it"):
            function(statistics, alignment_coef=1.0, diversity_coef=0.5)


def test_constant_features_give_zero_advantages():
    feature = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    statistics = gram_statistics(feature.expand(2, 4, 3), torch.ones(2, 3, dtype=torch.float64))
    actual = advantage(statistics, alignment_coef=1.0, diversity_coef=1.0)
    torch.testing.assert_close(actual, torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-14)


def all_groups(num_tokens, n):
    """Every way to draw n completions of one token: [num_tokens^n, n]."""
    return torch.tensor(list(itertools.product(range(num_tokens), repeat=n)))


def expected_over_groups(loss, probs, features, ground_truth, n):
    """Exact expectation of a per-group loss over n independent draws from probs."""
    tokens = all_groups(len(probs), n)
    statistics = gram_statistics(features[tokens], ground_truth.expand(len(tokens), -1))
    return float((probs[tokens].prod(-1) * loss(statistics)).sum())


@pytest.mark.parametrize("n", [2, 3, 4])
def test_unbiased_cfm_is_the_brier_score_for_one_hot_features(n):
    probs = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    data = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    one_hot = torch.eye(3, dtype=torch.float64)
    losses = [expected_over_groups(cfm_unbiased, probs, one_hot, one_hot[y], n) for y in range(3)]
    for y in range(3):
        brier = sum((float(probs[v]) - (v == y)) ** 2 for v in range(3))
        assert losses[y] == pytest.approx(brier, abs=1e-14)
    # Averaged over the data, less the data's own variance: the squared distance of the two distributions.
    variance = 1 - sum(float(p) ** 2 for p in data)
    distance = sum((float(p) - float(q)) ** 2 for p, q in zip(probs, data, strict=True))
    mean = sum(float(data[y]) * losses[y] for y in range(3))
    assert mean - variance == pytest.approx(distance, abs=1e-14)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_plug_in_cfm_is_high_by_the_variance_of_the_mean(n):
    features, ground_truth = random_group(3, num_groups=1)
    features, ground_truth = features[0], ground_truth[0]
    probs = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mean = probs @ features
    loss = float((mean - ground_truth).square().sum())
    variance = float(probs @ (features - mean).square().sum(-1))
    assert expected_over_groups(cfm_unbiased, probs, features, ground_truth, n) == pytest.approx(loss, abs=1e-13)
    plug_in = expected_over_groups(cfm_plug_in, probs, features, ground_truth, n)
    assert plug_in == pytest.approx(loss + variance / n, abs=1e-13)


def test_plug_in_cfm_is_the_distance_of_the_mean():
    completions, ground_truth = random_group(4)
    expected = (completions.mean(1) - ground_truth).square().sum(-1)
    torch.testing.assert_close(cfm_plug_in(gram_statistics(completions, ground_truth)), expected)


def test_unbiased_cfm_can_be_negative_and_is_zero_for_the_ground_truth_itself():
    completions, ground_truth = random_group(4)
    copies = ground_truth.unsqueeze(1).expand(-1, 4, -1)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(cfm_unbiased(gram_statistics(copies, ground_truth)), zero, rtol=0, atol=1e-13)
    around = completions - completions.mean(1, keepdim=True) + copies
    assert (cfm_unbiased(gram_statistics(around, ground_truth)) < 0).all()


def test_unbiased_cfm_needs_a_pair():
    with pytest.raises(ValueError, match=r"completions_per_context >= 2 .*got 1; sample more"):
        cfm_unbiased(gram_statistics(*random_group(1)))


def weighted_by_loops(alignment, gram, weights, alignment_coef, diversity_coef, self_normalised):
    """Rewards and baselines with w_k in front of every sibling, summed one by one."""
    n, rewards, baselines = len(alignment), [], []
    for j in range(n):
        others = [k for k in range(n) if k != j]
        pairs = [(k, m) for k in others for m in others if k != m]
        singles_count = sum(weights[k] for k in others) if self_normalised else n - 1
        pairs_count = sum(weights[k] * weights[m] for k, m in pairs) if self_normalised else (n - 1) * (n - 2)
        similarity = sum(weights[k] * gram[j][k] for k in others) / singles_count
        rewards.append(alignment_coef * 2 * alignment[j] - diversity_coef * 2 * similarity)
        expected = sum(weights[k] * 2 * alignment[k] for k in others) / singles_count
        expected_pairs = sum(weights[k] * weights[m] * gram[k][m] for k, m in pairs) / pairs_count
        baselines.append(alignment_coef * expected - diversity_coef * 2 * expected_pairs)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(baselines, dtype=torch.float64)


@pytest.mark.parametrize("self_normalised", [False, True])
@pytest.mark.parametrize(("alignment_coef", "diversity_coef"), COEFS)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_weighted_reward_and_baseline_equal_the_transcription(n, alignment_coef, diversity_coef, self_normalised):
    coefs = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef, "self_normalised": self_normalised}
    statistics = gram_statistics(*random_group(n))
    weights = torch.rand(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
    found = feature_rewards(statistics.ground_truth_products, statistics.gram, weights, **coefs)
    for group in range(3):
        expected = weighted_by_loops(
            statistics.ground_truth_products[group].tolist(),
            statistics.gram[group].tolist(),
            weights[group].tolist(),
            **coefs,
        )
        torch.testing.assert_close(found.reward[group], expected[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(found.baseline[group], expected[1], rtol=0, atol=1e-13)
        torch.testing.assert_close(found.advantage[group], expected[0] - expected[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("self_normalised", [False, True])
def test_equal_weights_change_nothing_or_scale(self_normalised):
    """Weights of 1 are no weights; a common factor cancels where the weights' own sum divides."""
    statistics = gram_statistics(*random_group(4))
    coefs = {"alignment_coef": 1.0, "diversity_coef": 1.0}
    plain = advantage(statistics, **coefs)
    ones = torch.ones(3, 4, dtype=torch.float64)
    same = advantage(statistics, ones, **coefs, self_normalised=self_normalised)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-14)
    scaled = advantage(statistics, 0.5 * ones, **coefs, self_normalised=self_normalised)
    assert ((scaled - plain).abs().max() < 1e-13) == self_normalised


def test_a_weighted_baseline_does_not_depend_on_its_own_weight():
    statistics = gram_statistics(*random_group(4))
    weights = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    other = weights.clone()
    other[:, 0] = 7.0
    for self_normalised in (False, True):
        coefs = {"alignment_coef": 1.0, "diversity_coef": 1.0, "self_normalised": self_normalised}
        before = baseline(statistics, weights, **coefs)
        after = baseline(statistics, other, **coefs)
        assert torch.equal(before[:, 0], after[:, 0])
        assert (before[:, 1:] - after[:, 1:]).abs().min() > 1e-3


def test_rewards_of_single_completions_have_the_weighted_mean_of_the_others_as_baseline():
    values = torch.tensor([[1.0, 0.0, 0.25]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.5, 2.0]], dtype=torch.float64)
    totals = [0 * 1.5 + 0.25 * 2, 1 * 0.5 + 0.25 * 2, 1 * 0.5 + 0 * 1.5]
    for self_normalised, counts in ((False, [2, 2, 2]), (True, [3.5, 2.5, 2.0])):
        found = scalar_rewards(values, weights, self_normalised=self_normalised)
        expected = [total / count for total, count in zip(totals, counts, strict=True)]
        assert found.baseline[0].tolist() == pytest.approx(expected, rel=1e-14)
        assert found.advantage[0].tolist() == pytest.approx([1 - expected[0], -expected[1], 0.25 - expected[2]])
        assert torch.equal(found.reward, values)
        assert found.alignment is None and found.similarity is None


def test_siblings_weight_keeps_small_weights():
    weights = torch.tensor([[1e12, 1e-6, 2e-6]], dtype=torch.float64)
    assert siblings_weight(weights)[0].tolist() == pytest.approx([3e-6, 1e12, 1e12], rel=1e-12)
    ones = torch.ones(1, 3, 3, dtype=torch.float64)
    pairs = leave_one_out_pairs_mean(ones, weights, self_normalised=True)
    assert pairs[0].tolist() == pytest.approx([1.0, 1.0, 1.0], rel=1e-12)


def test_weights_that_vanish_leave_finite_rewards():
    statistics = gram_statistics(*random_group(3))
    weights = torch.zeros(3, 3, dtype=torch.float64)
    for self_normalised in (False, True):
        coefs = {"alignment_coef": 1.0, "diversity_coef": 1.0, "self_normalised": self_normalised}
        found = advantage(statistics, weights, **coefs)
        assert torch.equal(found, 2 * statistics.ground_truth_products), "no sibling counts: the bare alignment remains"
