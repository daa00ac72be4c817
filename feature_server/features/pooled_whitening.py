"""Whitening by a second moment pooled over many groups, as a linear map of features (pure).

Guarantees: one symmetric map for all that shares a pool, and features of that pool with mean squared norm 1 after it,
as raw unit-norm features have. While the pool holds none of the completions that are scored, rewards stay functions of
single completions and pairs, and the baseline stays unbiased. Not part of EBFT as published, where each group is
whitened by its own n completions. The feature server applies the map before the Gram.
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
    _require_rows(features)
    rows = features.double()
    return _symmetric(rows.mT @ rows / rows.shape[0])


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
    eigenvalues, eigenvectors = _spectrum(moment, shrinkage)
    shift, scale = _shift_and_scale(eigenvalues, len(moment), shrinkage)
    return (eigenvectors * (scale / (eigenvalues + shift).sqrt())) @ eigenvectors.mT


def whiten_by_moment_of(
    pool: Float[Tensor, "row feature"], vectors: Float[Tensor, "vector feature"], shrinkage: float
) -> Float64[Tensor, "vector feature"]:
    """The vectors under W = pooled_whitening_map(second_moment(pool), shrinkage); a thin pool never builds W.

    With fewer rows X than dimensions only X X^T / N = U diag(lambda) U^T is decomposed, N x N, and
        W = c / sqrt(s) I - X^T U diag(g) U^T X / N,   g_i = c / (q_i sqrt(s) (q_i + sqrt(s))),   q_i^2 = lambda_i + s,
    which divides by no eigenvalue and so needs no cut-off. Outside the span of the pool the gain is c / sqrt(s), the
    largest: vectors of the pool have nothing there, so of another vector only its norm can tell.

    A vector that belongs to the pool takes part in the moment that whitens it. Rewards made of pool members then depend
    weakly, as 1/N, on all of them, and a leave-one-out baseline is unbiased up to that only.

    Units: none; invariant to a common scale of pool and vectors.
    Raises: ValueError as `second_moment` and `pooled_whitening_map`.
    Source: this project's; f(X^T X) = f(0) I + X^T h(X X^T) X with h(t) = (f(t) - f(0)) / t.
    Test: test_pooled_whitening.py::test_whitening_by_the_moment_of_a_pool_equals_its_map
    """
    num_rows, num_dimensions = pool.shape
    if num_rows >= num_dimensions:
        return vectors.double() @ pooled_whitening_map(second_moment(pool), shrinkage)
    _require_rows(pool)
    rows = pool.double()
    eigenvalues, eigenvectors = _spectrum(_symmetric(rows @ rows.mT / num_rows), shrinkage)
    shift, scale = _shift_and_scale(eigenvalues, num_dimensions, shrinkage)
    roots, root_of_shift = (eigenvalues + shift).sqrt(), shift.sqrt()
    removed = scale / (roots * root_of_shift * (roots + root_of_shift))
    in_span = (vectors.double() @ rows.mT) @ (eigenvectors * removed) @ eigenvectors.mT @ rows
    return scale / root_of_shift * vectors.double() - in_span / num_rows


def _shift_and_scale(
    eigenvalues: Float64[Tensor, " eigenvalue"], num_dimensions: int, shrinkage: float
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """s and c of `pooled_whitening_map`; eigenvalues that are left out are zero."""
    shift = shrinkage * eigenvalues.sum() / num_dimensions
    return shift, (eigenvalues / (eigenvalues + shift)).sum().rsqrt()


def _spectrum(
    moment: Float[Tensor, "axis axis"], shrinkage: float
) -> tuple[Float64[Tensor, " axis"], Float64[Tensor, "axis axis"]]:
    """Eigenvalues >= 0 and eigenvectors of what may be shrunk and inverted."""
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
            f"a second moment has no negative eigenvalues, got {smallest} (largest: {largest}); pass the "
            "uncentred mean of outer products"
        )
    return eigenvalues.clamp(min=0), eigenvectors


def _require_rows(features: Float[Tensor, "row feature"]) -> None:
    if features.shape[0] == 0:
        raise ValueError("a second moment needs at least 1 feature vector, got 0; pool over more completions")


def _symmetric(matrix: Float64[Tensor, "axis axis"]) -> Float64[Tensor, "axis axis"]:
    """Without the last bit by which a blocked product may differ between (j, k) and (k, j)."""
    return (matrix + matrix.mT) / 2
