"""Whitening by a second moment pooled over many groups, as a linear map of features (pure).

Guarantees: one symmetric map for all groups, so rewards stay functions of single completions and pairs (the
baseline stays unbiased), and whitened features have mean squared norm 1, as raw unit-norm features do. Not
part of EBFT as published, where each group is whitened by its own n completions. The feature server applies
the map before the Gram.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

NEGATIVE_EIGENVALUE_TOLERANCE = 1e-10
"""Relative to the largest eigenvalue: amply what float64 rounding can make of a zero one."""


def second_moment(features: Float[Tensor, "row feature"]) -> Float64[Tensor, "feature feature"]:
    """Uncentred second moment Sigma = (1/N) sum_i phi_i phi_i^T over N feature vectors.

    Uncentred, as in the group whitening: what is matched is the mean itself.

    Units: features squared.
    Raises: ValueError if there are no rows.
    Source: EBFT (arXiv:2603.12248), whitening, with the group replaced by a pool.
    Test: test_pooled_whitening.py::test_second_moment_is_the_mean_outer_product
    """
    if features.shape[0] == 0:
        raise ValueError("a second moment needs at least 1 feature vector, got 0; pool over more completions")
    rows = features.double()
    moment = rows.mT @ rows / rows.shape[0]
    return (moment + moment.mT) / 2


def pooled_whitening_map(
    moment: Float[Tensor, "feature feature"], shrinkage: float
) -> Float64[Tensor, "feature feature"]:
    """Map W that whitens features with the given second moment, up to shrinkage.

    W = c (Sigma + s I)^(-1/2),  s = shrinkage * tr(Sigma) / d,  c^-2 = sum_i lambda_i / (lambda_i + s),
    so that the mean squared norm tr(W Sigma W^T) of whitened features is 1. As shrinkage -> 0 at full rank,
    c^2 -> 1/d and the whitened moment -> I/d; shrinkage = 1 bounds the ratio of gains by sqrt(1 + d).

    Units: 1 / features; rotates with the features and shrinks as their scale grows.
    Raises: ValueError if shrinkage is outside (0, 1] or the moment is not finite, zero, or not positive
    semi-definite.
    Source: shrinkage towards a multiple of I as in Ledoit and Wolf (2004); the constant c is this project's.
    Test: test_pooled_whitening.py::test_whitened_features_have_unit_mean_square
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in (0, 1], got {shrinkage}; 0.01 keeps the noisiest directions bounded")
    if not torch.isfinite(moment).all():
        raise ValueError(
            f"the second moment of shape {tuple(moment.shape)} holds NaN or inf; check the pooled features"
        )
    eigenvalues, eigenvectors = torch.linalg.eigh(moment.double())
    largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0])
    if largest <= 0:
        raise ValueError(
            f"the second moment must not be zero, got largest eigenvalue {largest}; pool non-zero features"
        )
    if smallest < -NEGATIVE_EIGENVALUE_TOLERANCE * largest:
        raise ValueError(
            f"a second moment has no negative eigenvalues, got {smallest} beside {largest}; pass the "
            "uncentred mean of outer products"
        )
    eigenvalues = eigenvalues.clamp(min=0)
    shrunk = eigenvalues + shrinkage * eigenvalues.mean()
    gains = (shrunk * (eigenvalues / shrunk).sum()).rsqrt()
    return (eigenvectors * gains) @ eigenvectors.mT
