"""The Gram statistics of groups: all that whitening, reward and baseline need to know about features (pure).

Guarantees: float64, finite, and bitwise symmetric, so that what is computed from them is a function of the
features alone. The feature server makes them where the features are; the learner turns them into rewards at
every use.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GramStatistics:
    """Inner products of the n completions and the ground truth of each group, in units of features
    squared."""

    gram: Float64[Tensor, "group completion completion"]
    """K_jk = <phi_j, phi_k>."""
    ground_truth_products: Float64[Tensor, "group completion"]
    """<phi_j, phi_y>, y the ground truth."""
    ground_truth_norm_sq: Float64[Tensor, " group"]
    """||phi_y||^2."""


def gram_statistics(
    completion_features: Float[Tensor, "group completion feature"],
    ground_truth_features: Float[Tensor, "group feature"],
) -> GramStatistics:
    """Inner products of features, accumulated in float64 whatever precision the features have.

    K = X X^T, ground_truth_products = X phi_y, with the n completion features of a group as the rows of X.

    Units: features squared.
    Raises: ValueError if a feature is not finite, with the index of its group.
    Source: EBFT (arXiv:2603.12248); whitening and reward need features only through these numbers.
    Test: test_whitening.py::test_gram_statistics_are_inner_products
    """
    _require_finite(completion_features.flatten(1), "completion")
    _require_finite(ground_truth_features, "ground-truth")
    completions, ground_truth = completion_features.double(), ground_truth_features.double()
    gram = completions @ completions.mT
    return GramStatistics(
        gram=(gram + gram.mT) / 2,  # a blocked product may differ between (j, k) and (k, j) in the last bit
        ground_truth_products=(completions @ ground_truth.unsqueeze(-1)).squeeze(-1),
        ground_truth_norm_sq=ground_truth.square().sum(-1),
    )


def merge_duplicates(
    statistics: GramStatistics,
    completion_ids: Int[Tensor, "group completion token"],
    completion_lengths: Int[Tensor, "group completion"],
) -> GramStatistics:
    """Make completions with the same tokens exactly equal: each takes the numbers of the first of its kind.

    The same tokens scored in two kernels differ by rounding, which whitening would blow up to unit norm.
    Tokens decide, never closeness of features; positions from a completion's length on are ignored.

    Units: those of `statistics`.
    Source: consequence of whitening by the group's own second moment (EBFT, arXiv:2603.12248).
    Test: test_whitening.py::test_merged_duplicates_are_exactly_equal
    """
    positions = torch.arange(completion_ids.shape[-1], device=completion_ids.device)
    past_end = positions >= completion_lengths.unsqueeze(-1)
    ids = completion_ids.masked_fill(past_end, 0)
    same_tokens = (ids.unsqueeze(2) == ids.unsqueeze(1)).all(-1)  # [group completion completion]
    same_length = completion_lengths.unsqueeze(2) == completion_lengths.unsqueeze(1)
    # argmax of 0/1 is the first 1; a completion equals itself, so there is one
    first = (same_tokens & same_length).int().argmax(-1)
    rows = torch.arange(first.shape[0], device=first.device).unsqueeze(-1)
    return GramStatistics(
        gram=statistics.gram[rows.unsqueeze(-1), first.unsqueeze(2), first.unsqueeze(1)],
        ground_truth_products=statistics.ground_truth_products[rows, first],
        ground_truth_norm_sq=statistics.ground_truth_norm_sq,
    )


def _require_finite(features: Float[Tensor, "group feature"], owner: str) -> None:
    broken = (~torch.isfinite(features)).sum(-1)
    if broken.any():
        group = int(broken.nonzero()[0, 0])
        raise ValueError(
            f"{owner} features must be finite, got {int(broken[group])} NaN or infinite entries in "
            f"group {group}; check the feature model's weights, and its dtype for overflow"
        )
