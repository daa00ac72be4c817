"""Gram statistics and the group whitenings against slow transcriptions that hold the features themselves."""

import math

import pytest
import torch

from feature_server.features.gram import GramStatistics, gram_statistics, merge_duplicates
from learner.objective.reward import sibling_similarity
from learner.objective.whitening import feature_space, sample_mixing, shrunk, unwhitened

WHITENINGS = [feature_space, sample_mixing]


def random_features(num_groups, n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    completions = torch.randn(num_groups, n, d, dtype=torch.float64, generator=generator)
    ground_truth = torch.randn(num_groups, d, dtype=torch.float64, generator=generator)
    return completions, ground_truth


def cosine(u, v):
    norms = math.sqrt(float(u @ u)) * math.sqrt(float(v @ v))
    return float(u @ v) / norms if norms > 0 else 0.0


def all_inner_products(vectors):
    return torch.tensor([[float(u @ v) for v in vectors] for u in vectors], dtype=torch.float64)


def in_feature_space(x, y):
    """The written definition, d x d: move every vector by the root of the moment's pseudo-inverse."""
    sigma = sum(torch.outer(row, row) for row in x)
    eigenvalues, axes = torch.linalg.eigh(sigma)
    root = torch.zeros_like(sigma)
    for value, axis in zip(eigenvalues, axes.T, strict=True):
        if value > 1e-10 * eigenvalues[-1]:
            root += torch.outer(axis, axis) / math.sqrt(value)
    whitened = [root @ row for row in x]
    return torch.tensor([cosine(row, root @ y) for row in whitened], dtype=torch.float64), all_inner_products(whitened)


def in_sample_mixing(x, y):
    """The authors' spec: mix the n rows, and n stacked copies of the ground truth, by (X X^T)^{+1/2}."""
    left, singular_values, _ = torch.linalg.svd(x, full_matrices=False)
    mixing = torch.zeros(len(x), len(x), dtype=torch.float64)
    for value, axis in zip(singular_values, left.T, strict=True):
        if value > 1e-5 * singular_values[0]:
            mixing += torch.outer(axis, axis) / value
    whitened, copies = mixing @ x, mixing @ torch.stack([y] * len(x))
    alignment = [cosine(u, v) for u, v in zip(whitened, copies, strict=True)]
    return torch.tensor(alignment, dtype=torch.float64), all_inner_products(list(whitened))


def assert_equals_transcription(variant, transcription, completions, ground_truth):
    result = variant(gram_statistics(completions, ground_truth))
    for group, (x, y) in enumerate(zip(completions, ground_truth, strict=True)):
        alignment, inner_products = transcription(x, y)
        torch.testing.assert_close(result.inner_products[group], inner_products, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.alignment[group], alignment, rtol=0, atol=1e-12)


SHAPES = [(1, 5), (2, 2), (3, 16), (4, 12), (4, 3), (6, 2)]  # the last two: more completions than features


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_feature_space_equals_the_eigen_route_in_feature_space(n, d):
    assert_equals_transcription(feature_space, in_feature_space, *random_features(5, n, d))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_sample_mixing_equals_the_transcription(n, d):
    assert_equals_transcription(sample_mixing, in_sample_mixing, *random_features(5, n, d))


def test_both_routes_agree_with_duplicates_and_zero_features():
    completions, ground_truth = random_features(3, 4, 9)
    completions[0, 2] = completions[0, 0]
    completions[1, 1:] = completions[1, :1]
    assert_equals_transcription(feature_space, in_feature_space, completions, ground_truth)
    assert_equals_transcription(sample_mixing, in_sample_mixing, completions, ground_truth)


def test_two_completions_by_hand():
    completions = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    statistics = gram_statistics(completions, torch.tensor([[0.8, 0.6]], dtype=torch.float64))
    torch.testing.assert_close(statistics.gram[0], torch.tensor([[1, 0.6], [0.6, 1]], dtype=torch.float64))
    torch.testing.assert_close(statistics.ground_truth_products[0], torch.tensor([0.8, 0.96], dtype=torch.float64))
    expected = {feature_space: [0.42289, 0.90618], sample_mixing: [0.56921, 0.82219]}
    for variant, alignment in expected.items():
        result = variant(statistics)
        torch.testing.assert_close(result.alignment[0], torch.tensor(alignment).double(), rtol=0, atol=5e-6)
        torch.testing.assert_close(result.inner_products[0], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("variant", WHITENINGS)
@pytest.mark.parametrize(
    ("copies_of", "similarity"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 0, 2, 3], [1 / 3, 1 / 3, 0, 0]),
        ([0, 0, 2, 2], [1 / 3, 1 / 3, 1 / 3, 1 / 3]),
        ([0, 1, 1, 1], [0, 4 / 9, 4 / 9, 4 / 9]),
        ([0, 0, 0, 0], [1 / 2, 1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_similarity_of_duplicates(variant, copies_of, similarity):
    """m copies share one unit of leverage: P_jk = 1/m, so d_j = 2/(n-1) * (m-1)/m, the factor 2 included."""
    completions, ground_truth = random_features(1, 4, 10)
    result = sibling_similarity(variant(gram_statistics(completions[:, copies_of], ground_truth)).inner_products)
    torch.testing.assert_close(result[0], torch.tensor(similarity, dtype=torch.float64), rtol=0, atol=1e-12)


def test_squared_alignments_sum_to_one_at_full_rank():
    for n, d in [(1, 4), (3, 3), (4, 20)]:
        alignment = feature_space(gram_statistics(*random_features(6, n, d))).alignment
        torch.testing.assert_close(alignment.square().sum(-1), torch.ones(6, dtype=torch.float64))
    rank_deficient = feature_space(gram_statistics(*random_features(6, 4, 2))).alignment
    assert (rank_deficient.square().sum(-1) - 1).abs().max() > 0.01


@pytest.mark.parametrize("variant", [*WHITENINGS, lambda statistics: unwhitened(statistics, alignment="cosine")])
def test_alignment_is_invariant_to_rotation_and_common_scale(variant):
    completions, ground_truth = random_features(4, 4, 7)
    rotation = torch.linalg.qr(random_features(1, 7, 7, seed=9)[0][0])[0]
    plain = variant(gram_statistics(completions, ground_truth))
    turned = variant(gram_statistics(completions @ rotation, ground_truth @ rotation))
    torch.testing.assert_close(turned.alignment, plain.alignment, rtol=0, atol=1e-11)
    torch.testing.assert_close(turned.inner_products, plain.inner_products, rtol=0, atol=1e-11)
    for scale in (1e-7, 1e7):
        scaled = variant(gram_statistics(scale * completions, scale * ground_truth))
        torch.testing.assert_close(scaled.alignment, plain.alignment, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", WHITENINGS)
def test_whitened_inner_products_are_invariant_to_common_scale(variant):
    completions, ground_truth = random_features(4, 4, 7)
    for scale in (1e-8, 1e8):
        scaled = variant(gram_statistics(scale * completions, scale * ground_truth)).inner_products
        plain = variant(gram_statistics(completions, ground_truth)).inner_products
        torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [1, 4])
def test_all_zero_features_give_zero(n):
    zeros = torch.zeros(2, n, 5, dtype=torch.float64)
    for ground_truth in (torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)):
        statistics = gram_statistics(zeros, ground_truth)
        for result in (
            feature_space(statistics),
            sample_mixing(statistics),
            unwhitened(statistics, alignment="cosine"),
            unwhitened(statistics, alignment="inner_product"),
        ):
            assert torch.equal(result.alignment, torch.zeros(2, n, dtype=torch.float64))
            assert torch.equal(result.inner_products, torch.zeros(2, n, n, dtype=torch.float64))


def test_one_completion():
    completions, ground_truth = random_features(5, 1, 8)
    statistics = gram_statistics(completions, ground_truth)
    cosines = torch.tensor(
        [[cosine(x[0], y)] for x, y in zip(completions, ground_truth, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(feature_space(statistics).alignment, cosines.sign())
    torch.testing.assert_close(sample_mixing(statistics).alignment, cosines)
    for variant in WHITENINGS:
        torch.testing.assert_close(variant(statistics).inner_products, torch.ones(5, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("variant", WHITENINGS)
def test_one_zero_feature_gets_zero_and_leaves_the_others_alone(variant):
    completions, ground_truth = random_features(3, 4, 8)
    completions[:, 2] = 0
    others = [0, 1, 3]
    result = variant(gram_statistics(completions, ground_truth))
    assert (result.alignment[:, 2] == 0).all()
    torch.testing.assert_close(result.inner_products[:, 2], torch.zeros(3, 4, dtype=torch.float64))
    if variant is feature_space:
        without = variant(gram_statistics(completions[:, others], ground_truth))
        torch.testing.assert_close(result.alignment[:, others], without.alignment)


def test_ground_truth_outside_the_span_of_the_completions_gives_zero():
    completions, ground_truth = random_features(3, 4, 8)
    basis = torch.linalg.qr(completions.mT)[0]  # its columns span the completions
    ground_truth -= (basis @ (basis.mT @ ground_truth.unsqueeze(-1))).squeeze(-1)
    statistics = gram_statistics(completions, ground_truth)
    assert torch.equal(feature_space(statistics).alignment, torch.zeros(3, 4, dtype=torch.float64))
    assert sample_mixing(statistics).alignment.abs().max() < 1e-12


def test_zero_ground_truth_gives_zero():
    completions, _ = random_features(3, 4, 8)
    statistics = gram_statistics(completions, torch.zeros(3, 8, dtype=torch.float64))
    for result in (
        feature_space(statistics),
        sample_mixing(statistics),
        unwhitened(statistics, alignment="cosine"),
    ):
        assert torch.equal(result.alignment, torch.zeros(3, 4, dtype=torch.float64))


def test_sample_mixing_gives_zero_where_the_copies_cancel():
    completions, ground_truth = random_features(20, 2, 8)  # many, since rounding cancels exactly in some
    statistics = gram_statistics(torch.cat([completions, -completions], 1), ground_truth)
    assert torch.equal(sample_mixing(statistics).alignment, torch.zeros(20, 4, dtype=torch.float64))


def test_unwhitened_cosine_and_inner_product():
    completions, ground_truth = random_features(3, 4, 8)
    statistics = gram_statistics(completions, ground_truth)
    for group in range(3):
        x, y = completions[group], ground_truth[group]
        plain = torch.tensor([float(row @ y) for row in x], dtype=torch.float64)
        cosines = torch.tensor([cosine(row, y) for row in x], dtype=torch.float64)
        result = unwhitened(statistics, alignment="inner_product")
        torch.testing.assert_close(result.alignment[group], plain)
        torch.testing.assert_close(result.inner_products[group], all_inner_products(list(x)))
        result = unwhitened(statistics, alignment="cosine")
        torch.testing.assert_close(result.alignment[group], cosines)
        torch.testing.assert_close(result.inner_products[group], all_inner_products(list(x)))


def test_gram_statistics_are_inner_products():
    completions, ground_truth = random_features(3, 4, 50)
    # A large common offset: in float32 the sums would be off by 1e-7 of it.
    completions, ground_truth = (completions + 100).float(), (ground_truth + 100).float()
    statistics = gram_statistics(completions, ground_truth)
    for g in range(3):
        y = ground_truth[g].tolist()
        rows = completions[g].tolist()
        gram = [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
        products = [math.fsum(a * b for a, b in zip(u, y, strict=True)) for u in rows]
        close = {"rtol": 1e-14, "atol": 0}
        torch.testing.assert_close(statistics.gram[g], torch.tensor(gram, dtype=torch.float64), **close)
        torch.testing.assert_close(
            statistics.ground_truth_products[g], torch.tensor(products, dtype=torch.float64), **close
        )
        assert float(statistics.ground_truth_norm_sq[g]) == pytest.approx(math.fsum(b * b for b in y), rel=1e-14)
    assert torch.equal(statistics.gram, statistics.gram.mT)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_features_that_are_not_finite_name_their_group(broken):
    completions, ground_truth = random_features(3, 4, 5)
    completions[1, 2, 3] = broken
    with pytest.raises(ValueError, match=r"^completion features.*group 1;"):
        gram_statistics(completions, ground_truth)
    completions, ground_truth = random_features(3, 4, 5)
    ground_truth[2, 0] = broken
    with pytest.raises(ValueError, match=r"^ground-truth features.*group 2;"):
        gram_statistics(completions, ground_truth)


def noisy_duplicates() -> GramStatistics:
    """Completions 0 and 2 of the first group differ by the rounding of a bf16 kernel."""
    completions, ground_truth = random_features(2, 4, 10)
    completions[0, 2] = completions[0, 0] + 4e-3 * random_features(1, 1, 10, seed=9)[1][0]
    return gram_statistics(completions, ground_truth)


def test_merged_duplicates_are_exactly_equal():
    statistics = noisy_duplicates()
    ids = torch.tensor([[[7, 8, 1], [7, 9, 0], [7, 8, 2], [9, 8, 0]], [[1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]]])
    lengths = torch.tensor([[2, 2, 2, 2], [1, 1, 1, 1]])  # the third token of the first group means nothing
    merged = merge_duplicates(statistics, ids, lengths)
    assert torch.equal(merged.gram[0, 2], merged.gram[0, 0])
    assert torch.equal(merged.gram[0, :, 2], merged.gram[0, :, 0])
    assert (
        merged.ground_truth_products[0, 2]
        == merged.ground_truth_products[0, 0]
        == statistics.ground_truth_products[0, 0]
    )
    kept = [0, 1, 3]
    assert torch.equal(merged.gram[0][kept][:, kept], statistics.gram[0][kept][:, kept])
    assert torch.equal(merged.gram[1], statistics.gram[1])
    assert torch.equal(merged.ground_truth_products[1], statistics.ground_truth_products[1])
    assert torch.equal(merged.ground_truth_norm_sq, statistics.ground_truth_norm_sq)


@pytest.mark.parametrize("variant", WHITENINGS)
def test_only_merging_makes_noisy_duplicates_repel(variant):
    statistics = noisy_duplicates()
    ids, lengths = torch.arange(8).reshape(2, 4, 1), torch.ones(2, 4, dtype=torch.int64)
    ids[0, 2] = ids[0, 0]
    apart = sibling_similarity(variant(statistics).inner_products)[0]
    merged = sibling_similarity(variant(merge_duplicates(statistics, ids, lengths)).inner_products)[0]
    torch.testing.assert_close(apart, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-8)
    expected = torch.tensor([1 / 3, 0, 1 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)


def test_a_prefix_is_not_a_duplicate():
    completions, ground_truth = random_features(1, 3, 6)
    statistics = gram_statistics(completions, ground_truth)
    ids = torch.tensor([[[5, 0], [5, 9], [5, 4]]])
    merged = merge_duplicates(statistics, ids, torch.tensor([[2, 1, 2]]))
    assert torch.equal(merged.gram, statistics.gram)
    assert torch.equal(merged.ground_truth_products, statistics.ground_truth_products)


def random_weights(num_groups, n, seed=11):
    return 0.2 + 2 * torch.rand(num_groups, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_weights_enter_the_moment_of_the_group(n, d):
    """d x d: every vector is moved by the root of the pseudo-inverse of sum_j w_j phi_j phi_j^T."""
    completions, ground_truth = random_features(5, n, d)
    weights = random_weights(5, n)
    found = feature_space(gram_statistics(completions, ground_truth), weights)
    for group, (x, y, w) in enumerate(zip(completions, ground_truth, weights, strict=True)):
        sigma = sum(w_j * torch.outer(row, row) for row, w_j in zip(x, w, strict=True))
        eigenvalues, axes = torch.linalg.eigh(sigma)
        kept = eigenvalues > 1e-10 * eigenvalues[-1]
        root = (axes[:, kept] / eigenvalues[kept].sqrt()) @ axes[:, kept].T
        alignment = torch.tensor([cosine(root @ row, root @ y) for row in x], dtype=torch.float64)
        torch.testing.assert_close(found.alignment[group], alignment, rtol=0, atol=1e-11)
        expected = all_inner_products([root @ row for row in x])
        torch.testing.assert_close(found.inner_products[group], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_weights_mix_weighted_samples(n, d):
    completions, ground_truth = random_features(5, n, d)
    weights = random_weights(5, n)
    found = sample_mixing(gram_statistics(completions, ground_truth), weights)
    for group, (x, y, w) in enumerate(zip(completions, ground_truth, weights, strict=True)):
        alignment, inner_products = in_sample_mixing(w.sqrt()[:, None] * x, y)
        torch.testing.assert_close(found.alignment[group], alignment, rtol=0, atol=1e-11)
        expected = inner_products / torch.outer(w, w).sqrt()
        torch.testing.assert_close(found.inner_products[group], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", WHITENINGS)
def test_weights_of_one_are_no_weights_and_zero_weights_take_a_completion_out(variant):
    completions, ground_truth = random_features(4, 4, 9)
    statistics = gram_statistics(completions, ground_truth)
    plain, ones = variant(statistics), variant(statistics, torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(ones.alignment, plain.alignment, rtol=0, atol=1e-14)
    torch.testing.assert_close(ones.inner_products, plain.inner_products, rtol=0, atol=1e-14)
    without_last = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64).expand(4, 4)
    found, expected = variant(statistics, without_last), variant(gram_statistics(completions[:, :3], ground_truth))
    torch.testing.assert_close(found.alignment[:, :3], expected.alignment, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.inner_products[:, :3, :3], expected.inner_products, rtol=0, atol=1e-12)
    assert not found.alignment[:, 3].any() and not found.inner_products[:, 3].any()
    hardly = torch.tensor([[1.0, 1.0, 1.0, 1e-12]], dtype=torch.float64).expand(4, 4)
    assert not variant(statistics, hardly).inner_products[:, 3].any(), "a share below tolerance is none"


def shrunk_in_feature_space(x, y, w, shrinkage):
    """The d x d route: (Sigma + s I)^{-1/2} on every vector, rescaled to a weighted mean squared norm of 1."""
    sigma = sum(w_j * torch.outer(row, row) for row, w_j in zip(x, w, strict=True))
    ridge = shrinkage * float(sum(w_j * (row @ row) for row, w_j in zip(x, w, strict=True))) / len(x)
    eigenvalues, axes = torch.linalg.eigh(sigma + ridge * torch.eye(len(sigma), dtype=torch.float64))
    root = (axes / eigenvalues.sqrt()) @ axes.T
    whitened = [root @ row for row in x]
    mean_square = sum(w_j * (v @ v) for v, w_j in zip(whitened, w, strict=True)) / w.sum()
    alignment = torch.tensor([cosine(v, root @ y) for v in whitened], dtype=torch.float64)
    return alignment, all_inner_products(whitened) / mean_square


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 10.0])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shrunk_equals_the_eigen_route_in_feature_space(n, d, shrinkage):
    completions, ground_truth = random_features(5, n, d)
    statistics = gram_statistics(completions, ground_truth)
    for weights in (None, random_weights(5, n)):
        found = shrunk(statistics, weights, shrinkage=shrinkage)
        for group, (x, y) in enumerate(zip(completions, ground_truth, strict=True)):
            w = torch.ones(n, dtype=torch.float64) if weights is None else weights[group]
            alignment, inner_products = shrunk_in_feature_space(x, y, w, shrinkage)
            torch.testing.assert_close(found.alignment[group], alignment, rtol=0, atol=1e-10)
            torch.testing.assert_close(found.inner_products[group], inner_products, rtol=0, atol=1e-10)


def test_shrunk_joins_feature_space_and_raw_features():
    completions, _ = random_features(5, 4, 9)
    completions = completions / torch.linalg.vector_norm(completions, dim=-1, keepdim=True)
    inside = completions.mean(1)  # a ground truth in the span of the completions
    statistics = gram_statistics(completions, inside)
    near, end = shrunk(statistics, shrinkage=1e-9), feature_space(statistics)
    torch.testing.assert_close(near.inner_products, end.inner_products, rtol=0, atol=1e-6)
    torch.testing.assert_close(near.alignment, end.alignment, rtol=0, atol=1e-6)
    far, end = shrunk(statistics, shrinkage=1e8), unwhitened(statistics, alignment="cosine")
    torch.testing.assert_close(far.inner_products, end.inner_products, rtol=0, atol=1e-6)
    torch.testing.assert_close(far.alignment, end.alignment, rtol=0, atol=1e-6)
    between = shrunk(statistics, shrinkage=0.3)
    assert sibling_similarity(between.inner_products).abs().min() > 1e-3, "the diversity term is alive"


def test_shrunk_keeps_zero_features_finite_and_refuses_no_shrinkage():
    zero = gram_statistics(torch.zeros(2, 4, 3), torch.ones(2, 3))
    found = shrunk(zero, shrinkage=0.1)
    assert not found.alignment.any() and not found.inner_products.any()
    no_truth = shrunk(gram_statistics(torch.randn(2, 4, 3), torch.zeros(2, 3)), shrinkage=0.1)
    assert not no_truth.alignment.any() and torch.isfinite(no_truth.inner_products).all()
    for shrinkage in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="shrinkage must be positive"):
            shrunk(zero, shrinkage=shrinkage)
