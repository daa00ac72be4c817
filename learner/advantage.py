"""Baseline and advantage: how much better a completion did than its siblings let one expect (pure).

Guarantees: with unwhitened inner products the expected policy gradient is that of the reward, exactly. No
division by a standard deviation and no clipping: either would change the objective.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learner.reward import alignment_reward, reward, sibling_similarity


def leave_one_out_baseline(
    alignment: Float[Tensor, "group completion"],
    inner_products: Float[Tensor, "group completion completion"],
    *,
    alignment_coef: float,
    diversity_coef: float,
) -> Float[Tensor, "group completion"]:
    """Reward expected for each completion, judged from its siblings only; 0 where there are none.

    b_j = alignment_coef * (sum_i a_i - a_j) / (n-1)  -  diversity_coef * (sum_i d_i - 2 d_j) / (n-2)
    The similarity d couples completions, so completion j also enters its siblings' d_i. The second term
    leaves those pairs out: it is the similarity the others would have, had j never been drawn. (A
    leave-one-out mean of the whole reward depends on j and shrinks the diversity gradient by (n-2)/(n-1).)

    Units: those of the reward.
    Raises: ValueError if n < 3 and diversity_coef is not 0.
    Source: EBFT (arXiv:2603.12248), policy gradient; RLOO (arXiv:2402.14740).
    Test: test_gradient_identity.py::test_reward_and_advantage_descend_the_cfm_loss
    """
    n = alignment.shape[-1]
    if diversity_coef != 0 and n < 3:
        raise ValueError(
            f"diversity_coef={diversity_coef} needs completions_per_context >= 3 (pairs without the "
            f"completion itself), got {n}; raise it or set diversity_coef=0"
        )
    if n == 1:
        return torch.zeros_like(alignment)
    a = alignment_reward(alignment)
    baseline = alignment_coef * (a.sum(-1, keepdim=True) - a) / (n - 1)
    if diversity_coef == 0:
        return baseline
    d = sibling_similarity(inner_products)
    return baseline - diversity_coef * (d.sum(-1, keepdim=True) - 2 * d) / (n - 2)


def advantage(
    alignment: Float[Tensor, "group completion"],
    inner_products: Float[Tensor, "group completion completion"],
    *,
    alignment_coef: float,
    diversity_coef: float,
) -> Float[Tensor, "group completion"]:
    """Reward minus leave-one-out baseline.

    A_j = alignment_coef * n/(n-1) * (a_j - mean a)  -  diversity_coef * n/(n-2) * (d_j - mean d); sums to 0
    over a group of n >= 2. A group of one has its reward as its advantage.

    Units: those of the reward.
    Raises: ValueError as `leave_one_out_baseline`.
    Source: EBFT (arXiv:2603.12248), policy gradient.
    Test: test_reward.py::test_advantage_has_the_closed_form
    """
    total = reward(alignment, inner_products, alignment_coef=alignment_coef, diversity_coef=diversity_coef)
    return total - leave_one_out_baseline(
        alignment, inner_products, alignment_coef=alignment_coef, diversity_coef=diversity_coef
    )
