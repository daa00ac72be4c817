"""The pooled second moment and its whitening map."""

import math

import pytest
import torch

from feature_server.features.gram import gram_statistics
from feature_server.features.pooled_whitening import (
    pooled_whitening_map,
    second_moment,
    whiten_by_moment_of,
)
from learner.objective.reward import cfm_unbiased


def random_rows(num_rows=50, d=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return torch.randn(num_rows, d, dtype=torch.float64, generator=generator) @ mixing + 0.5


def test_second_moment_is_the_mean_outer_product():
    rows = random_rows()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    torch.testing.assert_close(second_moment(rows), expected)
    assert second_moment(rows.float()).dtype == torch.float64
    with pytest.raises(ValueError, match="at least 1 feature vector, got 0"):
        second_moment(rows[:0])


@pytest.mark.parametrize("shrinkage", [1e-9, 0.01, 0.3, 1.0])
def test_map_equals_the_transcription(shrinkage):
    sigma = second_moment(random_rows())
    d = len(sigma)
    shift = shrinkage * sum(float(sigma[i, i]) for i in range(d)) / d
    eigenvalues, axes = torch.linalg.eigh(sigma)
    scale = 1 / math.sqrt(sum(float(value) / (float(value) + shift) for value in eigenvalues))
    expected = torch.zeros_like(sigma)
    for value, axis in zip(eigenvalues, axes.T, strict=True):
        expected += scale / math.sqrt(float(value) + shift) * torch.outer(axis, axis)
    torch.testing.assert_close(pooled_whitening_map(sigma, shrinkage), expected)


@pytest.mark.parametrize("shrinkage", [1e-9, 0.01, 1.0])
@pytest.mark.parametrize("num_rows", [50, 3])  # 3 rows in 6 dimensions: a moment without full rank
def test_whitened_features_have_unit_mean_square(num_rows, shrinkage):
    rows = random_rows(num_rows)
    whitened = rows @ pooled_whitening_map(second_moment(rows), shrinkage).mT
    assert float(whitened.square().sum(-1).mean()) == pytest.approx(1, abs=1e-6)


def test_whitened_moment_tends_to_a_multiple_of_the_identity():
    rows = random_rows()
    identity = torch.eye(6, dtype=torch.float64) / 6
    whitened = rows @ pooled_whitening_map(second_moment(rows), 1e-12).mT
    torch.testing.assert_close(second_moment(whitened), identity, rtol=0, atol=1e-8)
    shrunk = rows @ pooled_whitening_map(second_moment(rows), 0.5).mT
    assert (second_moment(shrunk) - identity).abs().max() > 0.01


def test_map_turns_with_the_features_and_undoes_their_scale():
    sigma = second_moment(random_rows())
    rotation = torch.linalg.qr(random_rows(6, seed=9))[0]
    plain = pooled_whitening_map(sigma, 0.1)
    turned = pooled_whitening_map(rotation @ sigma @ rotation.mT, 0.1)
    torch.testing.assert_close(turned, rotation @ plain @ rotation.mT)
    torch.testing.assert_close(pooled_whitening_map(100 * sigma, 0.1), plain / 10)


def test_one_hot_features_with_the_exact_moment_give_chi_square():
    """Sum over v of (p_theta(v) - p(v))^2 / p_theta(v), times the map's constant c^2 = 1/V."""
    probs = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    data = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    features = torch.eye(4, dtype=torch.float64) @ pooled_whitening_map(torch.diag(probs), 1e-12).mT
    loss = float((probs @ features - data @ features).square().sum())
    chi_square = sum(float((p - q) ** 2 / p) for p, q in zip(probs, data, strict=True))
    assert 4 * loss == pytest.approx(chi_square, rel=1e-9)


def test_whitened_features_pass_through_the_gram_like_raw_ones():
    rows = random_rows()
    whitened = rows @ pooled_whitening_map(second_moment(rows), 0.1).mT
    copies = whitened[:1].expand(3, -1).unsqueeze(0)
    assert float(cfm_unbiased(gram_statistics(copies, whitened[:1]))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.5, math.nan])
def test_shrinkage_outside_its_range_is_refused(shrinkage):
    with pytest.raises(ValueError, match=r"shrinkage must lie in \(0, 1\], got"):
        pooled_whitening_map(torch.eye(3, dtype=torch.float64), shrinkage)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.full((3, 3), math.nan), "holds NaN or inf"),
        (torch.full((3, 3), math.inf), "holds NaN or inf"),
        (torch.diag(torch.tensor([1.0, math.nan, 1.0])), "holds NaN or inf"),
        (torch.zeros(3, 3), "must not be zero"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.1])), "no negative eigenvalues, got -0.1"),
    ],
)
def test_what_is_not_a_second_moment_is_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        pooled_whitening_map(moment.double(), 0.1)


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_rounding_below_zero_counts_as_zero_and_more_does_not(scale):
    moment = scale * torch.diag(torch.tensor([1.0, 1.0, -1e-10], dtype=torch.float64))
    without = scale * torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        pooled_whitening_map(moment, 0.1), pooled_whitening_map(without, 0.1), rtol=0, atol=1e-12
    )
    moment[2, 2] = -1.1e-10 * scale
    with pytest.raises(ValueError, match="no negative eigenvalues"):
        pooled_whitening_map(moment, 0.1)


POOLS = [(1, 6), (2, 6), (5, 6), (6, 6), (7, 6), (50, 6), (3, 40)]  # thin, square, and more rows than dimensions


@pytest.mark.parametrize("shrinkage", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize(("num_rows", "d"), POOLS)
def test_whitening_by_the_moment_of_a_pool_equals_its_map(num_rows, d, shrinkage):
    pool, others = random_rows(num_rows, d), random_rows(4, d, seed=5)
    vectors = torch.cat([pool, others])
    expected = vectors @ pooled_whitening_map(second_moment(pool), shrinkage)
    found = whiten_by_moment_of(pool, vectors, shrinkage)
    largest = max(1.0, float(expected.abs().max()))  # vectors outside the pool grow as 1 / sqrt(shrinkage)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * largest)
    torch.testing.assert_close(found[:num_rows], expected[:num_rows], rtol=0, atol=1e-10)
    assert float(found[:num_rows].square().sum(-1).mean()) == pytest.approx(1, abs=1e-10)
    assert whiten_by_moment_of(pool.float(), vectors.float(), shrinkage).dtype == torch.float64


def test_a_thin_pool_of_repeated_rows_needs_no_cutoff():
    """Rank 1 of 4 in 9 dimensions: three eigenvalues of the small matrix are rounding noise."""
    pool = random_rows(1, 9).expand(4, -1)
    vectors = torch.cat([pool[:1], random_rows(3, 9, seed=4)])
    expected = vectors @ pooled_whitening_map(second_moment(pool), 0.01)
    torch.testing.assert_close(whiten_by_moment_of(pool, vectors, 0.01), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_rows", [3, 20])
def test_whitening_by_the_moment_of_a_pool_has_no_scale(num_rows):
    pool, others = random_rows(num_rows), random_rows(4, seed=5)
    plain = whiten_by_moment_of(pool, others, 0.1)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(whiten_by_moment_of(scale * pool, scale * others, 0.1), plain, rtol=0, atol=1e-10)


def test_only_the_norm_of_another_vector_sees_what_lies_outside_the_pool():
    pool, other = random_rows(3), random_rows(1, seed=5)
    basis = torch.linalg.qr(pool.mT)[0]
    inside = other @ basis @ basis.mT
    whitened_pool, found, projected = whiten_by_moment_of(pool, torch.cat([pool, other, inside]), 0.01).split([3, 1, 1])
    torch.testing.assert_close(found @ whitened_pool.mT, projected @ whitened_pool.mT, rtol=0, atol=1e-10)
    shift = 0.01 * float(pool.square().sum()) / 3 / 6
    gains = [1 / math.sqrt(float(value) + shift) for value in torch.linalg.eigvalsh(second_moment(pool))[3:]]
    scale = 1 / math.sqrt(sum(1 - shift * gain**2 for gain in gains))
    outside = float((found - projected).norm() / (other - inside).norm())
    assert outside == pytest.approx(scale / math.sqrt(shift), rel=1e-9)


@pytest.mark.parametrize("num_rows", [3, 20])  # below and above the number of dimensions
def test_a_pool_without_a_moment_is_refused(num_rows):
    pool = random_rows(num_rows)
    with pytest.raises(ValueError, match="must not be zero"):
        whiten_by_moment_of(0 * pool, pool, 0.1)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="holds NaN or inf"):
            whiten_by_moment_of(torch.full_like(pool, broken), pool, 0.1)
    with pytest.raises(ValueError, match="at least 1 feature vector, got 0"):
        whiten_by_moment_of(pool[:0], pool, 0.1)
    for shrinkage in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"shrinkage must lie in \(0, 1\], got"):
            whiten_by_moment_of(pool, pool, shrinkage)


def test_control_without_shrinkage_a_deficient_moment_would_blow_up():
    """What the refusal of shrinkage 0 prevents: unseen directions gain without bound as it falls."""
    sigma = second_moment(random_rows(3))
    largest = [float(torch.linalg.eigvalsh(pooled_whitening_map(sigma, s))[-1]) for s in (1e-2, 1e-6, 1e-10)]
    assert largest[1] > 50 * largest[0] and largest[2] > 50 * largest[1]
    with pytest.raises(ValueError, match=r"shrinkage must lie in \(0, 1\], got 0"):
        pooled_whitening_map(sigma, 0.0)
