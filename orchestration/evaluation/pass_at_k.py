"""How often one of k completions would be correct, estimated from m of them (pure)."""

from fractions import Fraction


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Share of the k-subsets of m samples that hold a correct one: 1 - C(m-c, k) / C(m, k).

    Unbiased for 1 - (1 - p)^k, where p is the probability that one sample is correct; 1 - (1 - c/m)^k is not.

    Units: a probability.
    Raises: ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    Source: Chen et al. (arXiv:2107.03374), equation 1.
    Test: test_pass_at_k.py::test_pass_at_k_counts_the_subsets
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least k={k} samples and k >= 1, got {num_samples} samples; draw more")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct} must lie in 0..{num_samples}, the number of samples")
    # C(m-c, k) / C(m, k) as a product of k ratios in lowest terms: no factorial, no rounding before the end.
    none_correct = Fraction(1)
    for index in range(k):
        none_correct *= Fraction(max(num_samples - num_correct - index, 0), num_samples - index)
    return float(1 - none_correct)
