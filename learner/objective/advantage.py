"""Baseline and advantage: how much better a completion did than its siblings predict (pure).

`feature_rewards` and `scalar_rewards` go the whole way from what a completion showed to its advantage.

Guarantees: with unwhitened inner products the expected policy gradient is that of the reward, exactly; off-policy too,
with exact importance weights. No division by a standard deviation and no clipping: either would change the objective.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from learner.objective.reward import alignment_reward, quotient_or_zero, reward, sibling_similarity, siblings_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """Rewards of the completions of some groups, what their siblings predict, and the difference."""

    reward: Float[Tensor, "group completion"]
    baseline: Float[Tensor, "group completion"]
    advantage: Float[Tensor, "group completion"]
    """Reward minus baseline. A group of one has its reward as its advantage."""
    alignment: Float[Tensor, "group completion"] | None = None
    """What the reward was made of, without factor or coefficient; None where it does not come from features."""
    similarity: Float[Tensor, "group completion"] | None = None
    """`sibling_similarity`, weighted; likewise."""


def leave_one_out_mean(
    values: Float[Tensor, "group completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    self_normalised: bool = False,
) -> Float[Tensor, "group completion"]:
    """(1/(n-1)) sum_{k != j} w_k values_k: the baseline of rewards that belong to single completions. 0 for n = 1.

    self_normalised: divided by sum_{k != j} w_k instead of n-1; 0 where that is 0.

    Units: those of the values.
    Source: RLOO (arXiv:2402.14740); weights as in `learner.objective.reward`.
    Test: test_reward.py::test_baseline_equals_the_transcription
    """
    weights = torch.ones_like(values) if weights is None else weights
    total = siblings_weight(weights * values)
    count = siblings_weight(weights) if self_normalised else values.new_tensor(max(values.shape[-1] - 1, 1))
    return quotient_or_zero(total, count)


def leave_one_out_pairs_mean(
    inner_products: Float[Tensor, "group completion completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    self_normalised: bool = False,
) -> Float[Tensor, "group completion"]:
    """(1/((n-1)(n-2))) sum_{k != j} sum_{l != j,k} w_k w_l <phi_k, phi_l>: mean over pairs of two siblings of j.

    self_normalised: divided by the sum of w_k w_l over the same pairs; 0 where that is 0.

    Units: those of the inner products.
    Raises: ValueError if n < 3: there is no such pair.
    Source: EBFT (arXiv:2603.12248), policy gradient.
    Test: test_reward.py::test_baseline_equals_the_transcription
    """
    n = inner_products.shape[-1]
    if n < 3:
        raise ValueError(
            f"diversity_coef > 0 needs completions_per_context >= 3 (pairs without the completion itself), got {n}; "
            "raise it or set diversity_coef=0"
        )
    weights = inner_products.new_ones(inner_products.shape[:-1]) if weights is None else weights
    pairs = weights.unsqueeze(-1) * weights.unsqueeze(-2)
    total = _pairs_without(pairs * inner_products)
    count = _pairs_without(pairs) if self_normalised else weights.new_tensor((n - 1) * (n - 2))
    return quotient_or_zero(total, count)


def leave_one_out_baseline(
    alignment_rewards: Float[Tensor, "group completion"],
    inner_products: Float[Tensor, "group completion completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    alignment_coef: float,
    diversity_coef: float,
    self_normalised: bool = False,
) -> Float[Tensor, "group completion"]:
    """Reward expected for each completion, estimated from its siblings only; 0 where there are none.

    a_k is `alignment_reward` of completion k:
    b_j = alignment_coef * mean_{k != j} w_k a_k  -  diversity_coef * 2 mean_{k != l, both != j} w_k w_l <phi_k, phi_l>
    Without weights the second mean is (sum_i d_i - 2 d_j) / (n-2): similarity couples completions, so completion j
    also enters its siblings' d_i, and those pairs are left out. (A leave-one-out mean of the whole reward depends on
    j and shrinks the diversity gradient by (n-2)/(n-1).)

    Units: those of the reward.
    Raises: ValueError if n < 3 and diversity_coef is not 0.
    Source: EBFT (arXiv:2603.12248), policy gradient; RLOO (arXiv:2402.14740).
    Test: test_gradient_identity.py::test_reward_and_advantage_descend_the_cfm_loss
    """
    expected = alignment_coef * leave_one_out_mean(alignment_rewards, weights, self_normalised=self_normalised)
    if diversity_coef == 0:
        return expected
    pairs = leave_one_out_pairs_mean(inner_products, weights, self_normalised=self_normalised)
    return expected - diversity_coef * 2 * pairs


def feature_rewards(
    alignment: Float[Tensor, "group completion"],
    inner_products: Float[Tensor, "group completion completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    alignment_coef: float,
    diversity_coef: float,
    self_normalised: bool = False,
) -> GroupRewards:
    """Reward, baseline and advantage from features, of alignments and inner products as `whiten` gives them.

    Without weights A_j = alignment_coef * n/(n-1) * (a_j - mean a)  -  diversity_coef * n/(n-2) * (d_j - mean d), which
    sums to 0 over a group of n >= 2.
    With weights w = p_learner / p_behavior, E[(1/n) sum_j w_j A_j grad log p_j] = -grad L_CFM for any behavior policy
    (raw features, both coefficients 1, not self_normalised): the outer w_j is the learner's correction, not in here.

    Units: those of the inner products.
    Raises: ValueError as `leave_one_out_baseline`.
    Source: EBFT (arXiv:2603.12248), policy gradient.
    Test: test_reward.py::test_advantage_has_the_closed_form
    """
    coefs = {"alignment_coef": alignment_coef, "diversity_coef": diversity_coef}
    aligned = alignment_reward(alignment)
    similarity = sibling_similarity(inner_products, weights, self_normalised=self_normalised)
    earned = reward(aligned, similarity, **coefs)
    baseline = leave_one_out_baseline(aligned, inner_products, weights, **coefs, self_normalised=self_normalised)
    return GroupRewards(
        reward=earned, baseline=baseline, advantage=earned - baseline, alignment=alignment, similarity=similarity
    )


def scalar_rewards(
    values: Float[Tensor, "group completion"],
    weights: Float[Tensor, "group completion"] | None = None,
    *,
    self_normalised: bool = False,
) -> GroupRewards:
    """Baseline and advantage of rewards that belong to single completions: `leave_one_out_mean` alone.

    Units: those of the values.
    Source: RLOO (arXiv:2402.14740).
    Test: test_reward.py::test_rewards_of_single_completions_have_the_weighted_mean_of_the_others_as_baseline
    """
    baseline = leave_one_out_mean(values, weights, self_normalised=self_normalised)
    return GroupRewards(reward=values, baseline=baseline, advantage=values - baseline)


def _pairs_without(
    pairs: Float[Tensor, "group completion completion"],
) -> Float[Tensor, "group completion"]:
    """Sum over ordered pairs of two different completions, neither of them j, for each j."""
    different = pairs - torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))
    others = 1 - torch.eye(pairs.shape[-1], dtype=pairs.dtype, device=pairs.device)
    return ((others @ different) * others).sum(-1)  # a sum of the others: a difference would lose small weights
