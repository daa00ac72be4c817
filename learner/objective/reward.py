"""The reward of a completion, and the loss that it descends (pure).

Guarantees: every function takes alignments and inner products as `learner.objective.whitening` gives them; the factor 2
of the reward's two terms lives here and nowhere else. The reward is not the loss (it counts diversity twice):
report the CFM.

Siblings stand for the policy's mean feature. Where an older policy sampled them, `weights` turns them back into
the learner's: w_k = p_learner / p_behavior of whole completions. Without weights all are 1.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from feature_server.features.gram import GramStatistics


def alignment_reward(alignment: Float[Tensor, "group completion"]) -> Float[Tensor, "group completion"]:
    """First term of the reward, a_j = 2 alignment_j. No sibling enters, so there is nothing to weight.

    Units: those of the alignment.
    Source: EBFT (arXiv:2603.12248), reward.
    Test: test_reward.py::test_reward_equals_the_transcription
    """
    return 2 * alignment


def sibling_similarity(
    inner_products: Float[Tensor, "group completion completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    self_normalised: bool = False,
) -> Float[Tensor, "group completion"]:
    """Second term of the reward, d_j = 2 / (n-1) * sum_{k != j} w_k <phi_j, phi_k>; subtracted. 0 for n = 1.

    The 2 is that of the gradient of a square: d_j is TWICE the mean inner product with the siblings.
    self_normalised: divided by sum_{k != j} w_k instead of n-1, which is biased but never larger than the largest
    inner product; 0 where the siblings' weights sum to 0.

    Units: those of the inner products.
    Source: EBFT (arXiv:2603.12248), reward; weights: importance sampling of the second completion of a pair.
    Test: test_reward.py::test_reward_equals_the_transcription
    """
    n = inner_products.shape[-1]
    weights = inner_products.new_ones(inner_products.shape[:-1]) if weights is None else weights
    own = weights * inner_products.diagonal(dim1=-2, dim2=-1)
    total = (inner_products * weights.unsqueeze(-2)).sum(-1) - own
    count = siblings_weight(weights) if self_normalised else weights.new_tensor(max(n - 1, 1))
    return 2 * quotient_or_zero(total, count)


def reward(
    alignment_rewards: Float[Tensor, "group completion"],
    similarity: Float[Tensor, "group completion"],
    *,
    alignment_coef: float,
    diversity_coef: float,
) -> Float[Tensor, "group completion"]:
    """r_j = alignment_coef * a_j - diversity_coef * d_j, of `alignment_reward` and `sibling_similarity`.

    With both coefficients 1, unwhitened inner products and exact weights,
    grad L_CFM = -E[(1/n) sum_j w_j r_j grad log p(completion_j)].

    Units: those of the inner products.
    Source: EBFT (arXiv:2603.12248), reward.
    Test: test_gradient_identity.py::test_reward_and_advantage_descend_the_cfm_loss
    """
    return alignment_coef * alignment_rewards - diversity_coef * similarity


def siblings_weight(weights: Float[Tensor, "group completion"]) -> Float[Tensor, "group completion"]:
    """sum_{k != j} w_k for each j, as a sum of the others, never as a difference.

    A difference would lose small weights next to a large one.

    Units: those of the weights.
    Source: leave-one-out sums of RLOO (arXiv:2402.14740).
    Test: test_reward.py::test_siblings_weight_keeps_small_weights
    """
    others = 1 - torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return weights @ others


def quotient_or_zero(
    numerator: Float[Tensor, "*shape"], denominator: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """numerator / denominator, and 0 where the denominator is 0: a mean over nothing.

    Units: the quotient's.
    Source: convention of this project.
    Test: test_reward.py::test_weights_that_vanish_leave_finite_rewards
    """
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def cfm_unbiased(statistics: GramStatistics) -> Float64[Tensor, " group"]:
    """Unbiased estimate of L_CFM = ||E phi - phi_y||^2 from n completions; it can be negative.

    ||phi_y||^2 - mean_j a_j + mean_j d_j / 2, with raw inner products: pairs of distinct completions stand
    for ||E phi||^2.

    Units: features squared.
    Raises: ValueError if n < 2.
    Source: EBFT (arXiv:2603.12248), feature-matching loss.
    Test: test_reward.py::test_unbiased_cfm_is_the_brier_score_for_one_hot_features
    """
    n = statistics.ground_truth_products.shape[-1]
    if n < 2:
        raise ValueError(
            f"the unbiased CFM needs completions_per_context >= 2 (pairs of distinct completions), got {n}; "
            "sample more, or report cfm_plug_in"
        )
    mean_alignment = alignment_reward(statistics.ground_truth_products).mean(-1)
    return statistics.ground_truth_norm_sq - mean_alignment + sibling_similarity(statistics.gram).mean(-1) / 2


def cfm_plug_in(statistics: GramStatistics) -> Float64[Tensor, " group"]:
    """||mean_j phi_j - phi_y||^2, never negative, above L_CFM by tr Cov(phi) / n on average.

    Units: features squared.
    Source: EBFT (arXiv:2603.12248), feature-matching loss.
    Test: test_reward.py::test_plug_in_cfm_is_high_by_the_variance_of_the_mean
    """
    mean_alignment = alignment_reward(statistics.ground_truth_products).mean(-1)
    return statistics.ground_truth_norm_sq - mean_alignment + statistics.gram.mean((-2, -1))
