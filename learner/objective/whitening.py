"""From Gram statistics to the alignments and inner products that make up the reward (pure).

Guarantees: float64 and finite for every finite input: where a direction is undefined (zero features, a ground
truth outside the span of the completions) the alignment is 0. Nothing falls back to another variant. The
learner calls one variant per run. With K = X X^T, a = X phi_y and the projector P = K K^+ of a group:

| variant       | alignment_j                                                       | inner products |
| feature_space | beta_j / (sqrt(P_jj) ||beta||), beta = K^+ a                      | P_jk           |
| sample_mixing | sign(w_j) (K^{+1/2} a)_j / (sqrt(P_jj) ||phi_y||), w = K^{+1/2} 1 | P_jk           |
| shrunk        | the cosine of (Sigma + s I)^{-1/2} phi                            | ~ K (K + s)^-1 |
| unwhitened    | <phi_j, phi_y> or its cosine                                      | K_jk           |

Pooled whitening is the unwhitened variant of features that the feature server has mapped. The first three take
importance weights, because the group's own moment is a moment of the policy that sampled it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from feature_server.features.gram import GramStatistics

EIGENVALUE_TOLERANCE = 1e-10
"""Squared lengths up to this fraction of the largest count as zero: 1e-5 on singular values of X."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhitenedGroups:
    """What the reward of a group is made of; dimensionless once whitened or a cosine."""

    alignment: Float64[Tensor, "group completion"]
    """Similarity of each completion and the ground truth, WITHOUT the factor 2 of the reward."""
    inner_products: Float64[Tensor, "group completion completion"]
    """Of the completions with each other; the diagonal is their squared norms."""


def feature_space(
    statistics: GramStatistics, weights: Float64[Tensor, "group completion"] | None = None
) -> WhitenedGroups:
    """Whiten completions and ground truth in feature space: phi -> (Sigma^+)^{1/2} phi.

    The ground truth is projected on the span of the completions. Alignment is the cosine of whitened vectors,
    beta_j / (sqrt(P_jj) ||beta||) with beta = K^+ a; at full rank its squares sum to 1 over the group.
    Scale: Sigma = X^T X = sum_j phi_j phi_j^T, hence inner products P_jk in [-1, 1], as the authors' code has
    them. The written definition's mean, Sigma / n, would give n * P_jk and the same alignments: for it,
    multiply diversity_coef by n. A completion with P_jj, or a projected ground truth with squared norm, below
    tolerance (relative) gets alignment 0.
    weights: Sigma = sum_j w_j phi_j phi_j^T stands for the learner's moment where another policy sampled. With
    D = diag(w), K and a become D^{1/2} K D^{1/2} and D^{1/2} a, alignments keep their form (a cosine has no
    scale), and the inner products are P_jk / sqrt(w_j w_k). A completion whose share of the moment is below
    tolerance has inner products 0.

    Source: EBFT (arXiv:2603.12248), whitening; weights: importance sampling of its moment.
    Test: test_whitening.py::test_feature_space_equals_the_eigen_route_in_feature_space
    """
    statistics, root_weights = _weighted(statistics, weights)
    inverse_root, projector = _inverse_root_and_projector(statistics.gram)
    leverage = projector.diagonal(dim1=-2, dim2=-1)
    beta = _apply(inverse_root, _apply(inverse_root, statistics.ground_truth_products))
    projected_norm_sq = (statistics.ground_truth_products * beta).sum(-1)
    seen = projected_norm_sq > EIGENVALUE_TOLERANCE * statistics.ground_truth_norm_sq
    alignment = _quotient_or_zero(
        beta,
        leverage.sqrt() * torch.linalg.vector_norm(beta, dim=-1, keepdim=True),
        (leverage > EIGENVALUE_TOLERANCE) & seen.unsqueeze(-1),
    )
    return WhitenedGroups(alignment=alignment, inner_products=_unweighted(projector, leverage, root_weights))


def shrunk(
    statistics: GramStatistics, weights: Float64[Tensor, "group completion"] | None = None, *, shrinkage: float
) -> WhitenedGroups:
    """Whiten a group in feature space by (Sigma + s I)^{-1/2}, s = shrinkage * tr(K) / n.

    With M = (K + s I)^{-1}: inner products c K M, c = n / tr(K M), so that the mean squared norm is 1; alignment is
    the cosine of whitened vectors, (M a)_j / (sqrt((K M)_jj) sqrt((||phi_y||^2 - a^T M a) / s)).
    The whole family between the two ends: shrinkage -> 0 gives `feature_space` at full rank (for a ground truth
    inside the span of the completions; one outside is no longer projected), large shrinkage gives the cosine and the
    inner products of raw features of unit norm. Unlike `feature_space` it keeps a live diversity term.
    weights: Sigma = sum_j w_j phi_j phi_j^T with D = diag(w); everything is taken in the basis D^{1/2}.
    Features that are all zero have alignment 0 and inner products 0.

    Raises: ValueError if shrinkage is not positive.
    Source: this project's; shrinkage towards a multiple of I as in Ledoit and Wolf (2004).
    Test: test_whitening.py::test_shrunk_equals_the_eigen_route_in_feature_space
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage must be positive, got {shrinkage}; feature_space is the limit at 0")
    gram, products = statistics.gram, statistics.ground_truth_products
    weights = torch.ones_like(products) if weights is None else weights
    scale = (weights * gram.diagonal(dim1=-2, dim2=-1)).mean(-1)
    zero = scale <= 0
    ridge = torch.where(zero, 1.0, shrinkage * scale)
    inner = _woodbury_inner(gram, weights.sqrt(), ridge)
    products_by_whitened = (products - _apply(gram @ inner, products)) / ridge.unsqueeze(-1)
    whitened_gram = (gram - gram @ inner @ gram) / ridge[:, None, None]
    ground_truth_norm_sq = (statistics.ground_truth_norm_sq - (products * _apply(inner, products)).sum(-1)) / ridge
    norm_sq = whitened_gram.diagonal(dim1=-2, dim2=-1)
    norms = norm_sq.clamp(min=0).sqrt() * ground_truth_norm_sq.clamp(min=0).sqrt().unsqueeze(-1)
    mean_norm_sq = (weights * norm_sq).sum(-1) / weights.sum(-1)
    return WhitenedGroups(
        alignment=_quotient_or_zero(products_by_whitened, norms, norms > 0),
        inner_products=torch.where(
            zero[:, None, None], 0.0, whitened_gram / torch.where(zero, 1.0, mean_norm_sq)[:, None, None]
        ),
    )


def sample_mixing(
    statistics: GramStatistics, weights: Float64[Tensor, "group completion"] | None = None
) -> WhitenedGroups:
    """Whiten across samples: replace X by K^{+1/2} X, and n stacked copies of phi_y likewise.

    Copy j of the ground truth becomes w_j phi_y, w = K^{+1/2} 1, so only the sign of w_j matters: alignment
    is the cosine of the whitened completion and the RAW ground truth, up to that sign,
    sign(w_j) (K^{+1/2} a)_j / (sqrt(P_jj) ||phi_y||).
    Scale: inner products P_jk in [-1, 1]. Alignment is 0 where P_jj, phi_y or w_j is zero within tolerance.
    weights: X becomes D^{1/2} X, D = diag(weights), as in `feature_space`.

    Source: the authors' code, github.com/sjelassi/ebft_openrlhf, openrlhf/utils/embedding_utils.py.
    Test: test_whitening.py::test_sample_mixing_equals_the_transcription
    """
    statistics, root_weights = _weighted(statistics, weights)
    inverse_root, projector = _inverse_root_and_projector(statistics.gram)
    leverage = projector.diagonal(dim1=-2, dim2=-1)
    mixed = _apply(inverse_root, statistics.ground_truth_products)
    copies = inverse_root.sum(-1)
    # Below this the sign of w_j is rounding noise: opposite completions cancel in it.
    noise = EIGENVALUE_TOLERANCE * torch.linalg.vector_norm(inverse_root, dim=(-2, -1)).unsqueeze(-1)
    ground_truth_norm = statistics.ground_truth_norm_sq.sqrt().unsqueeze(-1)
    alignment = _quotient_or_zero(
        copies.sign() * mixed,
        leverage.sqrt() * ground_truth_norm,
        (leverage > EIGENVALUE_TOLERANCE) & (copies.abs() > noise) & (ground_truth_norm > 0),
    )
    return WhitenedGroups(alignment=alignment, inner_products=_unweighted(projector, leverage, root_weights))


def unwhitened(statistics: GramStatistics, *, alignment: Literal["inner_product", "cosine"]) -> WhitenedGroups:
    """Features as they are: K_jk, and <phi_j, phi_y> (the theory) or its cosine (the authors' code).

    Only "inner_product" gives the reward of the feature-matching loss. The cosine of a zero feature is 0.

    Units: features squared; a cosine has none.
    Source: EBFT (arXiv:2603.12248), reward.
    Test: test_whitening.py::test_unwhitened_cosine_and_inner_product
    """
    if alignment == "inner_product":
        return WhitenedGroups(alignment=statistics.ground_truth_products, inner_products=statistics.gram)
    norm_sq = statistics.gram.diagonal(dim1=-2, dim2=-1)
    # Square roots first: the product of two small squared norms may underflow.
    norms = norm_sq.sqrt() * statistics.ground_truth_norm_sq.sqrt().unsqueeze(-1)
    cosine = _quotient_or_zero(statistics.ground_truth_products, norms, norms > 0)
    return WhitenedGroups(alignment=cosine, inner_products=statistics.gram)


def whiten(
    statistics: GramStatistics,
    weights: Float64[Tensor, "group completion"] | None,
    *,
    whitening: str,
    alignment: str,
    shrinkage: float,
) -> WhitenedGroups:
    """The variant of that name; `alignment` is read by "none" alone, `shrinkage` by "shrunk" alone.

    Raises: ValueError on an unknown name.
    Source: that of each variant.
    Test: test_parity.py::test_it_is_what_the_learner_computes
    """
    match whitening, alignment:
        case "feature_space", _:
            return feature_space(statistics, weights)
        case "shrunk", _:
            return shrunk(statistics, weights, shrinkage=shrinkage)
        case "sample_mixing", _:
            return sample_mixing(statistics, weights)
        case "none", "inner_product" | "cosine":
            return unwhitened(statistics, alignment=alignment)
    raise ValueError(
        f"whitening={whitening!r} with alignment={alignment!r} is unknown; whitening is one of feature_space, shrunk, "
        "sample_mixing, none and alignment one of inner_product, cosine"
    )


def _weighted(
    statistics: GramStatistics, weights: Float64[Tensor, "group completion"] | None
) -> tuple[GramStatistics, Float64[Tensor, "group completion"]]:
    """Statistics of the features w_j^{1/2} phi_j, and w^{1/2}."""
    if weights is None:
        return statistics, torch.ones_like(statistics.ground_truth_products)
    root = weights.sqrt()
    gram = root.unsqueeze(-1) * statistics.gram * root.unsqueeze(-2)
    return replace(statistics, gram=gram, ground_truth_products=root * statistics.ground_truth_products), root


def _woodbury_inner(
    gram: Float64[Tensor, "group completion completion"],
    root_weights: Float64[Tensor, "group completion"],
    ridge: Float64[Tensor, " group"],
) -> Float64[Tensor, "group completion completion"]:
    """R (R K R + s I)^{-1} R with R = D^{1/2}: (X^T D X + s I)^{-1} = (I - X^T inner X) / s, so only Grams enter."""
    weighted_gram = root_weights.unsqueeze(-1) * gram * root_weights.unsqueeze(-2)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solver = torch.linalg.inv(weighted_gram + ridge[:, None, None] * eye)
    return root_weights.unsqueeze(-1) * solver * root_weights.unsqueeze(-2)


def _unweighted(
    projector: Float64[Tensor, "group completion completion"],
    leverage: Float64[Tensor, "group completion"],
    root_weights: Float64[Tensor, "group completion"],
) -> Float64[Tensor, "group completion completion"]:
    """P_jk / sqrt(w_j w_k); 0 for completions that the weighted moment does not see."""
    inverse = torch.where(leverage > EIGENVALUE_TOLERANCE, 1 / root_weights, 0.0)
    return projector * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def _inverse_root_and_projector(
    gram: Float64[Tensor, "group completion completion"],
) -> tuple[Float64[Tensor, "group completion completion"], Float64[Tensor, "group completion completion"]]:
    """K^{+1/2} and P = K K^+; eigenvalues up to tolerance times the largest count as zero in both."""
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    kept = eigenvalues > EIGENVALUE_TOLERANCE * eigenvalues[:, -1:].clamp(min=0)
    inverse_roots = torch.where(kept, eigenvalues, torch.inf).rsqrt()
    inverse_root = (eigenvectors * inverse_roots.unsqueeze(1)) @ eigenvectors.mT
    projector = (eigenvectors * kept.unsqueeze(1)) @ eigenvectors.mT
    return inverse_root, projector


def _apply(
    matrix: Float64[Tensor, "group completion completion"], vector: Float64[Tensor, "group completion"]
) -> Float64[Tensor, "group completion"]:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _quotient_or_zero(
    numerator: Float64[Tensor, "group completion"],
    denominator: Float64[Tensor, "group completion"],
    defined: Bool[Tensor, "group completion"],
) -> Float64[Tensor, "group completion"]:
    return torch.where(defined, numerator / denominator, 0.0)
