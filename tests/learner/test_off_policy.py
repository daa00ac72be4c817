"""Each correction against the gradient of its published surrogate, by hand, and by enumeration on policy."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import get_args

import pytest
import torch
from toy_policy import BEHAVIOR, ENDED_BY_0, LEARNER, LENGTH_1, LENGTH_2, Toy, random, relative_error

from learner.config import CorrectionName
from learner.objective.advantage import feature_rewards
from learner.objective.importance import (
    SampledTokens,
    effective_sample_frac,
    ess_learning_rate_scale,
    largest_lag,
    sequence_log_ratio,
    sequence_weights,
)
from learner.objective.off_policy import (
    CORRECTIONS,
    PUBLISHED_BOUNDS,
    Limits,
)

TIGHT = Limits(max_importance_weight=1.3, ratio_low=0.8, ratio_high=1.2, second_moment=0.04)
WIDE = Limits(max_importance_weight=2.0, ratio_low=0.5, ratio_high=5.0, second_moment=0.4)
OPEN = Limits(max_importance_weight=math.inf, ratio_low=0.0, ratio_high=math.inf, second_moment=math.inf)
LENGTHS = [3, 1, 5, 2, 4, 0, 2, 6, 3, 1]
GENERATOR = torch.Generator().manual_seed(5)


def make_tokens(log_ratio, lengths, *, lag=None, dtype=torch.float64):
    """Tokens whose learner log-probs exceed their behavior log-probs by log_ratio; lag is 1 unless it is given."""
    ratio = torch.as_tensor(log_ratio, dtype=dtype)
    behavior = torch.full_like(ratio, -0.5)
    return SampledTokens(
        learner_logprobs=behavior + ratio,
        behavior_logprobs=behavior,
        completion=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)),
        num_completions=len(lengths),
        lag=torch.full((len(ratio),), 1.0) if lag is None else torch.tensor(lag),
    )


def random_tokens(scale):
    """Lags from 0 to 7, which differ within a completion."""
    lag = torch.randint(8, (sum(LENGTHS),), generator=GENERATOR).double().tolist()
    return make_tokens(scale * torch.randn(sum(LENGTHS), dtype=torch.float64, generator=GENERATOR), LENGTHS, lag=lag)


# --- published surrogates, one completion at a time: log-probs now (p), log-probs then (mu), advantage a


def clipped(ratio, a, limits):
    return torch.minimum(ratio * a, ratio.clamp(limits.ratio_low, limits.ratio_high) * a)


def whole(p, mu):
    return (p - mu).sum().exp()


def decoupled(p, mu, a, prox, limits):
    weight = (prox - mu).exp().clamp(max=limits.max_importance_weight).detach()
    return (weight * clipped((p - prox.detach()).exp(), a, limits)).sum()


def log_linear(p, mu, lag):
    """Token by token: two of a completion may come from different weights. The newest ones count as one step old."""
    share = [(steps - 1) / steps if steps > 0 else 0.0 for steps in lag.tolist()]
    return mu + torch.tensor(share, dtype=p.dtype) * (p - mu)


def inside(ratio, limits):
    return limits.ratio_low <= float(ratio.detach()) <= limits.ratio_high


SURROGATES = {
    "none": lambda p, mu, a, lag, limits: a * p.sum(),
    "sequence_is": lambda p, mu, a, lag, limits: a * whole(p, mu),
    "truncated_sequence_is": lambda p, mu, a, lag, limits: (
        a * whole(p, mu).clamp(max=limits.max_importance_weight).detach() * p.sum()
    ),
    "truncated_token_is": lambda p, mu, a, lag, limits: (
        a * ((p - mu).exp().clamp(max=limits.max_importance_weight).detach() * p).sum()
    ),
    "masked_token_is": lambda p, mu, a, lag, limits: (
        a * sum(ratio if inside(ratio, limits) else 0 * ratio for ratio in (p - mu).exp())
    ),
    "geometric_sequence_mask": lambda p, mu, a, lag, limits: a * p.sum() * inside((p - mu).mean().exp(), limits),
    "ppo_clip": lambda p, mu, a, lag, limits: clipped((p - mu).exp(), a, limits).sum(),
    "decoupled_ppo_recomputed": lambda p, mu, a, lag, limits: decoupled(p, mu, a, p.detach(), limits),
    "decoupled_ppo_log_linear": lambda p, mu, a, lag, limits: decoupled(p, mu, a, log_linear(p, mu, lag), limits),
    "gspo": lambda p, mu, a, lag, limits: len(p) * clipped((p - mu).mean().exp(), a, limits),
    "cispo": lambda p, mu, a, lag, limits: (
        a * ((p - mu).exp().clamp(limits.ratio_low, limits.ratio_high).detach() * p).sum()
    ),
    "topr": lambda p, mu, a, lag, limits: a * p.sum() * (1 if a >= 0 else whole(p, mu).clamp(0, 1).detach()),
}


def m2po_surrogate(p, mu, owner_advantage, limits):
    """Over all tokens at once: drop the largest that PPO could clip until their mean square is small enough."""
    ratio = (p - mu).exp()
    counted = [t for t, a in enumerate(owner_advantage) if (a > 0 and ratio[t] > 1) or (a < 0 and ratio[t] < 1)]
    square = (p - mu).detach().square().tolist()
    counted.sort(key=square.__getitem__)
    dropped = set()
    while counted and sum(square[t] for t in counted) / len(counted) > limits.second_moment:
        dropped.add(counted.pop())
    return sum(ratio[t] * a for t, a in enumerate(owner_advantage) if t not in dropped)


def surrogate_gradient(name, tokens, advantages, limits):
    p, mu = tokens.learner_logprobs.clone().requires_grad_(), tokens.behavior_logprobs
    if name == "m2po":
        m2po_surrogate(p, mu, advantages[tokens.completion].tolist(), limits).backward()
        return p.grad
    total = 0
    for index in range(tokens.num_completions):
        own = tokens.completion == index
        a, lag = advantages[index], tokens.lag[own]
        total = total + SURROGATES[name](p[own], mu[own], a, lag, limits)
    total.backward()
    return p.grad


@pytest.mark.parametrize("limits", [TIGHT, WIDE, OPEN], ids=["tight", "wide", "open"])
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_factor_is_the_gradient_of_the_published_surrogate(name, limits):
    for scale in (0.1, 0.6):
        tokens = random_tokens(scale)
        advantages = torch.randn(len(LENGTHS), dtype=torch.float64, generator=GENERATOR)
        actual = CORRECTIONS[name](tokens, advantages, limits) * advantages[tokens.completion]
        torch.testing.assert_close(actual, surrogate_gradient(name, tokens, advantages, limits), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["masked_token_is", "geometric_sequence_mask", "ppo_clip", "gspo", "m2po"])
def test_corrections_that_mask_do_so_at_the_tight_limits(name):
    """The comparison above saw both sides of the mask."""
    tokens = random_tokens(0.6)
    advantages = torch.randn(len(LENGTHS), dtype=torch.float64, generator=GENERATOR)
    masked = CORRECTIONS[name](tokens, advantages, TIGHT) == 0
    assert 0 < int(masked.sum()) < len(masked)


# --- by hand

LOG = math.log


@pytest.mark.parametrize(
    ("name", "log_ratio", "a", "expected"),
    [
        ("none", [LOG(3.0), LOG(0.1)], 1.0, [1.0, 1.0]),
        ("sequence_is", [LOG(3.0), LOG(2.0)], -1.0, [6.0, 6.0]),
        ("truncated_sequence_is", [LOG(3.0), LOG(0.5)], 1.0, [1.3, 1.3]),
        ("truncated_sequence_is", [LOG(3.0), LOG(0.25)], 1.0, [0.75, 0.75]),
        ("truncated_token_is", [LOG(3.0), LOG(0.5)], 1.0, [1.3, 0.5]),
        ("masked_token_is", [LOG(1.1), LOG(1.3)], -1.0, [1.1, 0.0]),
        ("masked_token_is", [LOG(0.7), LOG(0.9)], 1.0, [0.0, 0.9]),
        ("geometric_sequence_mask", [LOG(2.0), LOG(0.5)], 1.0, [1.0, 1.0]),
        ("geometric_sequence_mask", [LOG(2.0), LOG(1.0)], 1.0, [0.0, 0.0]),
        ("ppo_clip", [LOG(1.3), LOG(0.7)], 1.0, [0.0, 0.7]),
        ("ppo_clip", [LOG(1.3), LOG(0.7)], -1.0, [1.3, 0.0]),
        ("ppo_clip", [LOG(1.3), LOG(0.7)], 0.0, [1.3, 0.7]),
        ("decoupled_ppo_recomputed", [LOG(1.5), LOG(0.4)], 1.0, [1.3, 0.4]),
        ("gspo", [LOG(2.0), LOG(0.5)], 1.0, [1.0, 1.0]),
        ("gspo", [LOG(1.69), 0.0], 1.0, [0.0, 0.0]),
        ("gspo", [LOG(1.69), 0.0], -1.0, [1.3, 1.3]),
        ("cispo", [LOG(3.0), LOG(0.1)], -1.0, [1.2, 0.8]),
        ("topr", [LOG(0.5), LOG(0.5)], 0.0, [1.0, 1.0]),
        ("topr", [LOG(3.0), LOG(2.0)], -1.0, [1.0, 1.0]),
        ("topr", [LOG(0.5), LOG(0.5)], -1.0, [0.25, 0.25]),
        ("topr", [LOG(0.5), LOG(0.5)], 1.0, [1.0, 1.0]),
    ],
)
def test_two_tokens_by_hand(name, log_ratio, a, expected):
    advantages = torch.tensor([a], dtype=torch.float64)
    actual = CORRECTIONS[name](make_tokens(log_ratio, [2]), advantages, TIGHT)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("lag", "a", "expected"),
    [
        (0.0, 1.0, 0.0),  # the behavior policy is the proximal one: PPO's clip at 1.44 > 1.2
        (0.0, -1.0, 1.44),
        (1.0, 1.0, 0.0),  # likewise
        (1.0, -1.0, 1.44),
        (2.0, 1.0, 1.2 * 1.2),  # half way: weight 1.2, ratio 1.2 on the edge
        (4.0, 1.0, 1.3 * 1.44**0.25),  # weight 1.44^(3/4) = 1.3145 truncated
    ],
)
def test_log_linear_proximal_policy_by_hand(lag, a, expected):
    edge = Limits(max_importance_weight=1.3, ratio_low=0.8, ratio_high=1.2 + 1e-12, second_moment=0.04)
    advantages = torch.tensor([a], dtype=torch.float64)
    actual = CORRECTIONS["decoupled_ppo_log_linear"](make_tokens([LOG(1.44)], [1], lag=[lag]), advantages, edge)
    assert float(actual) == pytest.approx(expected, rel=1e-14)


def test_m2po_masks_the_fewest_largest():
    log_ratio = [0.1, 0.3, -0.9, -0.2, 0.5, 0.3]
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    ratios = torch.tensor(log_ratio, dtype=torch.float64).exp()

    def masked(threshold):
        limits = Limits(max_importance_weight=1.0, ratio_low=1.0, ratio_high=1.0, second_moment=threshold)
        factor = CORRECTIONS["m2po"](make_tokens(log_ratio, [2, 4]), advantages, limits)
        torch.testing.assert_close(factor[factor != 0], ratios[factor != 0], rtol=1e-14, atol=0)
        return [index for index, value in enumerate(factor.tolist()) if value == 0]

    # Counted: A > 0 with 0.1 and 0.3, A < 0 with -0.9 and -0.2. Squares 0.01, 0.04, 0.09, 0.81.
    assert masked(0.2376) == []  # mean of all four: 0.2375
    assert masked(0.2374) == [2]
    assert masked(0.0467) == [2]  # mean of the three smallest: 0.0467 (rounded up)
    assert masked(0.0466) == [1, 2]
    assert masked(0.0249) == [1, 2, 3]
    assert masked(0.0099) == [0, 1, 2, 3]


def test_m2po_masks_equal_tokens_together_whatever_their_order():
    limits = Limits(max_importance_weight=1.0, ratio_low=1.0, ratio_high=1.0, second_moment=0.05)
    advantages = torch.ones(4, dtype=torch.float64)
    for order in ([0.1, 0.4, 0.2, 0.4], [0.4, 0.4, 0.1, 0.2]):  # three of them would do: mean 0.07 with one 0.4
        factor = CORRECTIONS["m2po"](make_tokens(order, [1, 1, 1, 1]), advantages, limits)
        assert [value == 0 for value in factor.tolist()] == [value == 0.4 for value in order]


def test_m2po_keeps_a_mean_at_its_threshold_and_counts_no_completion_without_advantage():
    at_threshold = Limits(max_importance_weight=1.0, ratio_low=1.0, ratio_high=1.0, second_moment=0.25)
    one = torch.ones(1, dtype=torch.float64)
    assert float(CORRECTIONS["m2po"](make_tokens([0.5], [1]), one, at_threshold)) == pytest.approx(math.exp(0.5))
    # Squares 0.16 of A > 0 alone stay below; with the 0.81 that PPO could not clip, the larger would be masked.
    tokens, advantages = make_tokens([0.4, 0.9], [1, 1]), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert (CORRECTIONS["m2po"](tokens, advantages, at_threshold) != 0).all()


def test_gspo_is_the_published_loss_at_equal_lengths():
    """The published mean over completions and the mean over tokens agree there, and only there."""

    def gradients(lengths):
        log_ratio = 0.3 * torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tokens, advantages = make_tokens(log_ratio, lengths), random(len(lengths), seed=2)
        p = tokens.learner_logprobs.clone().requires_grad_()
        ratios = [(p - tokens.behavior_logprobs)[tokens.completion == i].mean().exp() for i in range(len(lengths))]
        published = sum(clipped(ratio, a, WIDE) for ratio, a in zip(ratios, advantages, strict=True)) / len(lengths)
        published.backward()
        ours = CORRECTIONS["gspo"](tokens, advantages, WIDE) * advantages[tokens.completion] / sum(lengths)
        return ours, p.grad

    torch.testing.assert_close(*gradients([3, 3, 3, 3]), rtol=1e-13, atol=0)
    ours, published = gradients([1, 3, 2, 6])
    assert relative_error(ours, published) > 0.1


# --- the bounds and limits that each correction reads


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_only_corrections_with_published_bounds_read_them(name):
    tokens, advantages = random_tokens(0.6), random(len(LENGTHS), seed=1)
    results = [
        CORRECTIONS[name](
            tokens, advantages, Limits(max_importance_weight=2.0, ratio_low=low, ratio_high=high, second_moment=0.1)
        )
        for low, high in ((0.9, 1.1), (0.0, 50.0))
    ]
    assert torch.equal(*results) == (name not in PUBLISHED_BOUNDS)


def test_published_bounds_are_those_of_the_page_and_valid_limits():
    """docs/off_policy.md says where each of them comes from."""
    assert PUBLISHED_BOUNDS == {
        "masked_token_is": (0.5, 5.0),
        "geometric_sequence_mask": (0.99, 1.01),
        "ppo_clip": (0.8, 1.2),
        "decoupled_ppo_log_linear": (0.8, 1.2),
        "gspo": (0.9997, 1.0004),
        "cispo": (0.0, 5.0),
    }
    assert set(PUBLISHED_BOUNDS) < set(CORRECTIONS)
    for low, high in PUBLISHED_BOUNDS.values():
        limits = Limits(max_importance_weight=2.0, ratio_low=low, ratio_high=high, second_moment=0.04)
        assert (limits.ratio_low, limits.ratio_high) == (low, high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_importance_weight": 0.99}, "max_importance_weight must be at least 1 .*got 0.99; below 1"),
        ({"max_importance_weight": math.nan}, "max_importance_weight must be at least 1 .*got nan"),
        ({"ratio_low": 1.1}, "0 <= low <= 1 <= high, got low=1.1, high=1.2; a ratio of 1"),
        ({"ratio_high": 0.9}, "0 <= low <= 1 <= high, got low=0.8, high=0.9"),
        ({"ratio_low": 1.3, "ratio_high": 1.25}, "got low=1.3, high=1.25"),
        ({"ratio_low": -0.1}, "got low=-0.1"),
        ({"ratio_low": math.nan}, "got low=nan"),
        ({"ratio_high": math.nan}, "high=nan"),
        ({"second_moment": 0.0}, "second_moment must be positive, got 0.0; .* use inf"),
        ({"second_moment": math.nan}, "second_moment must be positive, got nan"),
    ],
)
def test_bad_limits_are_refused(change, message):
    sane = {"max_importance_weight": 2.0, "ratio_low": 0.8, "ratio_high": 1.2, "second_moment": 0.04}
    with pytest.raises(ValueError, match=message):
        Limits(**(sane | change))


# --- on policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_every_factor_is_exactly_one_where_the_policies_agree(name, dtype):
    narrow = Limits(max_importance_weight=1.0, ratio_low=1.0, ratio_high=1.0, second_moment=1e-30)
    logprobs = -3 * torch.rand(sum(LENGTHS), dtype=dtype, generator=GENERATOR)
    lag = torch.arange(sum(LENGTHS), dtype=dtype)
    completion = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    tokens = SampledTokens(
        learner_logprobs=logprobs.clone().requires_grad_(),
        behavior_logprobs=logprobs,
        completion=completion,
        num_completions=len(LENGTHS),
        lag=lag,
    )
    advantages = torch.linspace(-1, 1, len(LENGTHS), dtype=dtype)
    for limits in (narrow, TIGHT, OPEN):
        factor = CORRECTIONS[name](tokens, advantages, limits)
        assert torch.equal(factor, torch.ones_like(logprobs))
        assert factor.dtype == dtype and not factor.requires_grad


@pytest.mark.parametrize("completions", [LENGTH_1, LENGTH_2, ENDED_BY_0], ids=["1 token", "2 tokens", "1 or 2"])
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_on_policy_every_correction_descends_the_cfm_loss(name, completions):
    toy = Toy(completions=completions, n=3)
    advantages = feature_rewards(*toy.statistics(), alignment_coef=1.0, diversity_coef=1.0).advantage
    factor = CORRECTIONS[name](toy.sampled(LEARNER, LEARNER), advantages.flatten(), TIGHT)
    estimate = toy.expected(factor, advantages, learner=LEARNER, behavior=LEARNER)
    target = toy.descent(LEARNER)
    assert target.norm() > 0.1
    torch.testing.assert_close(estimate, target, rtol=0, atol=1e-12)


# --- off policy: terms of a single completion


def alignment_error(completions, name, limits=OPEN, change=lambda tokens: tokens):
    toy = Toy(completions=completions, n=3)
    advantages = feature_rewards(*toy.statistics(), alignment_coef=1.0, diversity_coef=0.0).advantage
    tokens = change(toy.sampled(LEARNER, BEHAVIOR))
    factor = CORRECTIONS[name](tokens, advantages.flatten(), limits)
    estimate = toy.expected(factor, advantages, learner=LEARNER, behavior=BEHAVIOR)
    return relative_error(estimate, toy.descent(LEARNER, diversity_coef=0.0))


@pytest.mark.parametrize("completions", [LENGTH_1, LENGTH_2, ENDED_BY_0], ids=["1 token", "2 tokens", "1 or 2"])
@pytest.mark.parametrize("name", ["sequence_is", "truncated_sequence_is"])
def test_whole_ratios_give_the_exact_alignment_gradient(name, completions):
    assert alignment_error(completions, name) < 1e-12


def rebuilt(tokens, **change):
    fields = ("learner_logprobs", "behavior_logprobs", "completion", "num_completions", "lag")
    return SampledTokens(**({name: getattr(tokens, name) for name in fields} | change))


def swapped(tokens):
    return rebuilt(tokens, learner_logprobs=tokens.behavior_logprobs, behavior_logprobs=tokens.learner_logprobs)


def shifted(tokens):
    return rebuilt(tokens, learner_logprobs=tokens.learner_logprobs.roll(1))


@pytest.mark.parametrize("completions", [LENGTH_1, LENGTH_2, ENDED_BY_0], ids=["1 token", "2 tokens", "1 or 2"])
def test_other_weights_miss_the_alignment_gradient(completions):
    assert alignment_error(completions, "none") > 0.05
    assert alignment_error(completions, "truncated_sequence_is", TIGHT) > 1e-3
    assert alignment_error(completions, "sequence_is", change=swapped) > 0.05  # wrong sign of the log-ratio
    assert alignment_error(completions, "sequence_is", change=shifted) > 0.05  # log-probs of the token before
    token_weights = alignment_error(completions, "truncated_token_is")
    assert token_weights < 1e-12 if completions == LENGTH_1 else token_weights > 0.01


# --- log-ratios and weights of whole completions


def test_log_linear_takes_each_tokens_own_lag():
    """One completion that new weights finished: lags 2, 1 and 0."""
    advantages = torch.tensor([1.0], dtype=torch.float64)
    tokens = make_tokens([LOG(1.44), LOG(1.1), LOG(1.1)], [3], lag=[2.0, 1.0, 0.0])
    actual = CORRECTIONS["decoupled_ppo_log_linear"](tokens, advantages, WIDE)
    torch.testing.assert_close(actual, torch.tensor([1.44, 1.1, 1.1], dtype=torch.float64), rtol=1e-14, atol=0)
    edge = Limits(max_importance_weight=1.05, ratio_low=0.8, ratio_high=1.15, second_moment=0.04)
    actual = CORRECTIONS["decoupled_ppo_log_linear"](tokens, advantages, edge)
    torch.testing.assert_close(actual, torch.tensor([0.0, 1.1, 1.1], dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_oldest_token_dates_a_completion():
    tokens = make_tokens([0.0] * 7, [3, 0, 1, 2, 1], lag=[1.0, 4.0, 2.0, 0.0, 5.0, 5.0, 3.0])
    assert largest_lag(tokens).tolist() == [4.0, 0.0, 0.0, 5.0, 3.0]


def test_sequence_log_ratio_sums_own_tokens():
    lengths = [4, 0, 1, 2]
    learner = -torch.rand(7, dtype=torch.float32, generator=GENERATOR)
    behavior = -torch.rand(7, dtype=torch.float32, generator=GENERATOR)
    tokens = SampledTokens(
        learner_logprobs=learner.requires_grad_(),
        behavior_logprobs=behavior,
        completion=torch.tensor([0, 0, 0, 0, 2, 3, 3]),
        num_completions=4,
        lag=torch.zeros(7),
    )
    ends = [sum(lengths[:i]) for i in range(5)]
    pairs = list(zip(learner.tolist(), behavior.tolist(), strict=True))
    expected = [sum(a - b for a, b in pairs[start:end]) for start, end in itertools.pairwise(ends)]
    actual = sequence_log_ratio(tokens)
    assert actual.dtype == torch.float64 and not actual.requires_grad
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.7, math.inf])
def test_sequence_weights_equal_the_transcription(bound):
    log_ratio = torch.tensor([-800.0, -3.0, -0.1, 0.0, 0.5, LOG(2), 0.7, 50.0, 300.0], dtype=torch.float64)
    actual = sequence_weights(log_ratio, max_importance_weight=bound)
    expected = torch.tensor([min(math.exp(float(x)), bound) for x in log_ratio], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-15, atol=0)
    assert (actual <= bound).all()


def test_truncation_is_safe_from_overflow():
    log_ratio = torch.tensor([-1e4, 0.0, 1e4, 3e38], requires_grad=True)
    weights = sequence_weights(log_ratio, max_importance_weight=2.0)
    assert weights.tolist() == [0.0, 1.0, 2.0, 2.0]
    assert weights.dtype == torch.float32 and not weights.requires_grad


def test_sequence_weights_refuse_what_has_no_weight():
    with pytest.raises(ValueError, match=r"max_importance_weight must be at least 1 .*got 0.5"):
        sequence_weights(torch.zeros(2), max_importance_weight=0.5)
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"log-ratios must be finite, got .* for completion 2; check"):
            sequence_weights(torch.tensor([0.0, 0.0, broken]), max_importance_weight=2.0)
    with pytest.raises(ValueError, match=r"exponentials .* must be finite, got 800.0 for completion 1; use a correct"):
        sequence_weights(torch.tensor([0.0, 800.0], dtype=torch.float64), max_importance_weight=math.inf)


# --- bad tokens


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["learner_logprobs", "behavior_logprobs"])
def test_log_probs_that_are_not_finite_name_their_completion(field, broken):
    tokens = make_tokens([0.0] * 4, [2, 1, 1])
    with pytest.raises(ValueError, match=rf"{field} must be finite, got {broken} for completion 1; check"):
        rebuilt(tokens, **{field: torch.tensor([-1.0, -1.0, broken, -1.0])})


def test_positive_behavior_log_probs_name_their_completion():
    tokens = make_tokens([0.0] * 4, [2, 1, 1])
    with pytest.raises(ValueError, match=r"behavior_logprobs must not be positive, got 0.5 for completion 2; check"):
        rebuilt(tokens, behavior_logprobs=torch.tensor([-1.0, 0.0, -1.0, 0.5]))


@pytest.mark.parametrize("lag", [-1.0, math.nan, math.inf])
def test_a_lag_that_no_token_can_have_is_refused(lag):
    with pytest.raises(ValueError, match=rf"lag must be finite and >= 0, got {lag} for completion 1;"):
        make_tokens([0.0] * 4, [2, 2], lag=[0.0, 0.0, 1.0, lag])


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("sequence_is", 1.0),
        ("truncated_sequence_is", 1.0),
        ("truncated_token_is", 1.0),
        ("masked_token_is", 1.0),
        ("ppo_clip", -1.0),
        ("decoupled_ppo_recomputed", 1.0),
        ("decoupled_ppo_log_linear", -1.0),
        ("gspo", -1.0),
        ("cispo", 1.0),
        ("m2po", -1.0),
    ],
)
@pytest.mark.parametrize(("dtype", "log_ratio"), [(torch.float64, 800.0), (torch.float32, 100.0)])
def test_a_ratio_that_overflows_is_refused_where_nothing_bounds_it(name, sign, dtype, log_ratio):
    tokens = rebuilt(make_tokens([0.0, 0.0], [1, 1], dtype=dtype), behavior_logprobs=torch.tensor(
        [-0.5, -0.5 - log_ratio], dtype=dtype
    ))  # fmt: skip
    advantages = torch.full((2,), sign, dtype=dtype)
    with pytest.raises(ValueError, match=rf"exponentials .* must be finite, got {log_ratio} for completion 1; use a"):
        CORRECTIONS[name](tokens, advantages, OPEN)
    if name not in ("sequence_is", "ppo_clip", "decoupled_ppo_log_linear", "gspo", "m2po"):
        assert torch.isfinite(CORRECTIONS[name](tokens, advantages, WIDE)).all()


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_factors_carry_no_gradient(name):
    tokens = make_tokens([0.1, -0.3], [1, 1])
    tokens = replace(tokens, learner_logprobs=tokens.learner_logprobs.requires_grad_())
    assert not CORRECTIONS[name](tokens, torch.ones(2, dtype=torch.float64), WIDE).requires_grad
    assert not tokens.log_ratio.requires_grad


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_no_tokens_give_no_factors(name):
    tokens = make_tokens([], [])
    assert CORRECTIONS[name](tokens, torch.zeros(0, dtype=torch.float64), TIGHT).shape == (0,)


# --- effective sample size


def slow_effective_sample_frac(weights):
    w = [Fraction(weight) for weight in weights]
    return float(sum(w) ** 2 / (len(w) * sum(x * x for x in w)))


def log_of(*weights):
    return torch.tensor(weights, dtype=torch.float64).log()


def test_effective_sample_frac():
    weights = [0.5, 1.0, 2.0, 0.1]
    found = effective_sample_frac(log_of(*weights))
    assert float(found) == pytest.approx(slow_effective_sample_frac(weights), rel=1e-14)
    truncated = effective_sample_frac(log_of(*weights), max_importance_weight=1.25)
    assert float(truncated) == pytest.approx(slow_effective_sample_frac([0.5, 1.0, 1.25, 0.1]), rel=1e-14)
    assert float(effective_sample_frac(log_of(0.0, 0.0, 3.0, 0.0))) == pytest.approx(0.25)
    assert float(effective_sample_frac(torch.tensor([-0.4]))) == 1
    with pytest.raises(ValueError, match="at least 1 completion, got 0"):
        effective_sample_frac(torch.zeros(0))


@pytest.mark.parametrize("shift", [-2000.0, -400.0, 0.0, 400.0, 2000.0])
def test_effective_sample_frac_is_that_of_any_common_factor(shift):
    """Whose own exponential, or square, is 0 or infinite in float64."""
    log_ratio = torch.tensor([0.3, -1.2, 0.0, 2.5, -0.1], dtype=torch.float64)
    expected = slow_effective_sample_frac(log_ratio.exp().tolist())
    assert float(effective_sample_frac(log_ratio + shift)) == pytest.approx(expected, rel=1e-10)
    assert float(effective_sample_frac(torch.full((7,), shift))) == pytest.approx(1, abs=1e-12)
    assert float(effective_sample_frac(torch.tensor([shift, shift - 3000.0]))) == pytest.approx(0.5)
    assert max(float(effective_sample_frac(torch.full((n,), shift))) for n in range(1, 60)) <= 1, "rounding exceeds 1"


def test_learning_rate_scale_is_the_root_of_the_effective_sample_frac():
    assert ess_learning_rate_scale(torch.full((5,), 0.3)) == pytest.approx(1)
    assert ess_learning_rate_scale(log_of(0.0, 0.0, 3.0, 0.0)) == pytest.approx(0.5)
    assert ess_learning_rate_scale(log_of(1.0, 3.0)) == pytest.approx(math.sqrt(16 / 20))


def test_every_correction_that_can_be_configured_has_its_function():
    assert set(get_args(CorrectionName)) == set(CORRECTIONS)
    assert set(PUBLISHED_BOUNDS) <= set(CORRECTIONS)
