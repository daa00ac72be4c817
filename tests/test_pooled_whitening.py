"""The pooled second moment and its whitening map."""

import math

import pytest
import torch

from feature_server.gram import gram_statistics
from feature_server.pooled_whitening import pooled_whitening_map, second_moment
from learner.reward import cfm_unbiased


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
        (torch.zeros(3, 3), "must not be zero"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.1])), "no negative eigenvalues, got -0.1"),
    ],
)
def test_what_is_not_a_second_moment_is_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        pooled_whitening_map(moment.double(), 0.1)
