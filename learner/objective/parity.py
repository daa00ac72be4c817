"""One call from features to advantages: a hook to compare this project with another implementation (pure).

Same functions as the learner's own path, minus everything distributed. Nothing in the project calls it.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from feature_server.features.gram import gram_statistics
from learner.objective.advantage import GroupRewards, feature_rewards
from learner.objective.whitening import whiten


def advantages_from_features(
    sampled: Float[Tensor, "group completion feature"],
    ground_truth: Float[Tensor, "group feature"],
    *,
    whitening: Literal["feature_space", "shrunk", "sample_mixing", "none"],
    alignment: Literal["inner_product", "cosine"],
    diversity_coef: float,
    alignment_coef: float,
    importance_weights: Float[Tensor, "group completion"] | None = None,
    self_normalised: bool = False,
    group_shrinkage: float = 0.1,
) -> GroupRewards:
    """Rewards, leave-one-out baselines and advantages of groups of features, in float64.

    `alignment` says how whitening "none" compares a completion with the ground truth; the other variants define it
    themselves. The authors' code is whitening="sample_mixing", and without whitening alignment="cosine"; the theory is
    whitening="none", alignment="inner_product". `importance_weights` are p_learner / p_behavior of whole completions
    and enter the diversity term, the baseline and the group's moment; the factor in front of the gradient is not in
    the advantage. Completions with equal tokens must have bitwise equal features (see
    feature_server.features.gram). Pooled whitening: map the features first (feature_server.features.pooled_whitening),
    then whitening="none".

    Units: features squared with alignment="inner_product", none otherwise.
    Raises: ValueError on features that are not finite, unknown names, or n < 3 with diversity_coef != 0.
    Source: EBFT (arXiv:2603.12248); the authors' code, github.com/sjelassi/ebft_openrlhf.
    Test: test_parity.py::test_the_authors_numbers_are_reproduced
    """
    statistics = gram_statistics(sampled, ground_truth)
    weights = None if importance_weights is None else importance_weights.double()
    groups = whiten(statistics, weights, whitening=whitening, alignment=alignment, shrinkage=group_shrinkage)
    return feature_rewards(
        groups.alignment,
        groups.inner_products,
        weights,
        alignment_coef=alignment_coef,
        diversity_coef=diversity_coef,
        self_normalised=self_normalised,
    )
