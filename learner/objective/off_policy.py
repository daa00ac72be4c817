"""Corrections for completions that older weights sampled (pure).

    loss = - sum_i w_i A log pi(token_i) / num_tokens

A correction gives w_i, one constant per token: what the gradient of its published surrogate puts in front of
A * grad log pi(token_i), where A is the advantage of the token's completion. So a surrogate that clips has w_i = 0
where its clip is active. docs/off_policy.md compares them, their bias included.

Guarantees: w carries no gradient, is finite, and is exactly 1 where learner and behavior log-probs agree.
The learner looks one up in `CORRECTIONS` by its configured name. Below, r is the ratio p_learner / p_behavior of a
token, R that of a whole completion. Ratios are computed in float64; w has the dtype of the learner's log-probs.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from learner.objective.importance import (
    TRUNCATE,
    SampledTokens,
    require,
    require_truncation,
    sequence_log_ratio,
    sequence_weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Numbers of the corrections; each reads those that it needs.

    Raises: ValueError on bounds that would change an on-policy gradient, or a threshold that keeps nothing.
    """

    max_importance_weight: float
    """C >= 1: where weights are truncated; inf never does."""
    ratio_low: float
    """In [0, 1]: lower end of the ratios that are not clipped or masked."""
    ratio_high: float
    """At least 1, or inf: their upper end."""
    second_moment: float
    """Most that the mean squared log-ratio may be in `m2po` [nats^2]."""

    def __post_init__(self) -> None:
        require_truncation(self.max_importance_weight)
        if not 0 <= self.ratio_low <= 1 <= self.ratio_high:
            raise ValueError(
                f"ratio bounds must satisfy 0 <= low <= 1 <= high, got low={self.ratio_low}, high={self.ratio_high}; "
                "a ratio of 1 is on policy and must stay"
            )
        if not self.second_moment > 0:
            raise ValueError(
                f"second_moment must be positive, got {self.second_moment}; at 0 every stale token would be masked, "
                "use inf to mask none"
            )


class Correction(Protocol):
    """From sampled tokens and their completions' advantages to w of each token."""

    def __call__(
        self, tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
    ) -> Float[Tensor, " token"]: ...


def no_weights(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = 1: train as if the learner had sampled; the bias grows with lag.

    Source: the uncorrected policy gradient, as EBFT (arXiv:2603.12248) uses it on-policy.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    return torch.ones_like(tokens.learner_logprobs)


def sequence_is(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = R: unbiased for every term of a single completion, with unbounded variance.

    Raises: ValueError if a ratio overflows.
    Source: importance sampling of sequences (Precup et al., 2000).
    Test: test_off_policy.py::test_whole_ratios_give_the_exact_alignment_gradient
    """
    weights = sequence_weights(sequence_log_ratio(tokens), max_importance_weight=math.inf)
    return _as_factor(weights[tokens.completion], tokens)


def truncated_sequence_is(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = min(R, C). Truncation bounds the variance and pulls towards the behavior policy.

    Raises: ValueError if C is inf and a ratio overflows.
    Source: truncated importance sampling (Ionides, 2008), of whole completions.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    weights = sequence_weights(sequence_log_ratio(tokens), max_importance_weight=limits.max_importance_weight)
    return _as_factor(weights[tokens.completion], tokens)


def truncated_token_is(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = min(r, C). Biased for more than one token: what came before and after keeps the behavior policy's odds.

    Raises: ValueError if C is inf and a ratio overflows.
    Source: TIS of verl's rollout correction, level "token", default C = 2.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    return _as_factor(tokens.log_ratio.exp().clamp(max=limits.max_importance_weight), tokens)


def masked_token_is(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = r inside the bounds, 0 outside: tokens on which the policies disagree are dropped, not truncated.

    Raises: ValueError if the upper bound is inf and a ratio overflows.
    Source: IcePop (Ring-1T), in the form of INTELLECT-3 (arXiv:2512.16144), eq. 1.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    ratio = tokens.log_ratio.exp()
    return _as_factor(torch.where(_inside(ratio, limits), ratio, 0.0), tokens)


def geometric_sequence_mask(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = 1 where the completion's geometric mean ratio lies inside the bounds, 0 for all its tokens elsewhere.

    A kept completion is not weighted, as in the source. There the loss divides by the kept tokens; here by all, so
    masking also shortens the step.

    Source: verl's rollout correction, rejection sampling of level "geometric" without importance weights.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    kept = _inside(_mean_log_ratio(tokens).exp(), limits)
    return _as_factor(kept.double()[tokens.completion], tokens)


def ppo_clip(tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits) -> Float[Tensor, " token"]:
    """w = r, but 0 where A > 0 and r is above the bounds, or A < 0 and r is below.

    Surrogate: min(r A, clip(r) A).
    Raises: ValueError if a ratio that is not clipped overflows.
    Source: PPO (arXiv:1707.06347), eq. 7, with the behavior policy as the old one.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    return _as_factor(_clipped(tokens.log_ratio, advantage[tokens.completion], limits), tokens)


def decoupled_ppo_recomputed(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = min(r, C): decoupled PPO whose proximal policy is the learner at the start of the step.

    Surrogate: min(prox / behavior, C) min(q A, clip(q) A), q = learner / prox. A batch gets one optimizer step here, so
    q is 1 and the clip never acts: the same numbers as `truncated_token_is`.

    Raises: ValueError if C is inf and a ratio overflows.
    Source: AReaL (arXiv:2505.24298), decoupled objective; its code can mask above C instead of truncating.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    return truncated_token_is(tokens, advantage, limits)


def decoupled_ppo_log_linear(
    tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits
) -> Float[Tensor, " token"]:
    """w = min(prox / behavior, C) q, 0 where the clip of q = learner / prox is active.

    The proximal policy is that of a learner step ago, guessed on the line between the two known ones:
    log prox = log behavior + (1 - 1/lag) log r, with the token's own lag. At lag 1 that is the behavior policy (so
    `ppo_clip`), and at lag 0 too, as in the source.

    Raises: ValueError if a weight overflows.
    Source: AReaL, proximal log-prob approximation "loglinear"; the objective is that of arXiv:2505.24298.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    last_step = tokens.log_ratio / tokens.lag.double().clamp(min=1)
    earlier = (tokens.log_ratio - last_step).exp().clamp(max=limits.max_importance_weight)
    return _as_factor(earlier * _clipped(last_step, advantage[tokens.completion], limits), tokens)


def gspo(tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits) -> Float[Tensor, " token"]:
    """w = s, the geometric mean ratio of the completion, but 0 for all its tokens where PPO's clip of s is active.

    Surrogate: min(s A, clip(s) A) per completion; grad s = s / length * sum of grad log pi. The source averages over
    completions, so each counts the same; here the loss averages over tokens, so each counts by its length. At equal
    lengths the two agree.

    Raises: ValueError if a ratio that is not clipped overflows.
    Source: GSPO (arXiv:2507.18071), eq. 5.
    Test: test_off_policy.py::test_gspo_is_the_published_loss_at_equal_lengths
    """
    return _as_factor(_clipped(_mean_log_ratio(tokens), advantage, limits)[tokens.completion], tokens)


def cispo(tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits) -> Float[Tensor, " token"]:
    """w = r clipped to the bounds: no token is ever dropped. A lower bound of 0 clips from above only.

    Raises: ValueError if the upper bound is inf and a ratio overflows.
    Source: CISPO of MiniMax-M1 (arXiv:2506.13585), eq. 4.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    return _as_factor(tokens.log_ratio.exp().clamp(limits.ratio_low, limits.ratio_high), tokens)


def topr(tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits) -> Float[Tensor, " token"]:
    """w = 1 where A >= 0 (as supervised), min(R, 1) where A < 0 (what became unlikely is left alone).

    Source: TOPR (arXiv:2503.14286), with the advantage in place of the reward.
    Test: test_off_policy.py::test_factor_is_the_gradient_of_the_published_surrogate
    """
    tapered = sequence_weights(sequence_log_ratio(tokens), max_importance_weight=1.0)
    return _as_factor(torch.where(advantage >= 0, 1.0, tapered)[tokens.completion], tokens)


def m2po(tokens: SampledTokens, advantage: Float[Tensor, " completion"], limits: Limits) -> Float[Tensor, " token"]:
    """w = r, but 0 for the fewest tokens that bring the mean squared log-ratio down to second_moment.

    Only tokens that PPO could clip are counted and masked: A > 0 and r > 1, or A < 0 and r < 1. The largest go first,
    equal ones together. The mean is over the tokens of one call, so how a step is cut into calls matters.

    Raises: ValueError if a ratio that is kept overflows.
    Source: M2PO (arXiv:2510.01161), threshold 0.04 in all its runs.
    Test: test_off_policy.py::test_m2po_masks_the_fewest_largest
    """
    log_ratio = tokens.log_ratio
    square = log_ratio.square()
    outward = log_ratio.sign() * advantage.sign()[tokens.completion] > 0
    ascending = square[outward].sort().values
    mean_of_smallest = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
    too_large = ascending[mean_of_smallest > limits.second_moment]
    cutoff = float(too_large[0]) if len(too_large) else math.inf
    return _as_factor(torch.where(outward & (square >= cutoff), 0.0, log_ratio.exp()), tokens)


CORRECTIONS: dict[str, Correction] = {
    "none": no_weights,
    "sequence_is": sequence_is,
    "truncated_sequence_is": truncated_sequence_is,
    "truncated_token_is": truncated_token_is,
    "masked_token_is": masked_token_is,
    "geometric_sequence_mask": geometric_sequence_mask,
    "ppo_clip": ppo_clip,
    "decoupled_ppo_recomputed": decoupled_ppo_recomputed,
    "decoupled_ppo_log_linear": decoupled_ppo_log_linear,
    "gspo": gspo,
    "cispo": cispo,
    "topr": topr,
    "m2po": m2po,
}
PUBLISHED_BOUNDS: dict[str, tuple[float, float]] = {
    "masked_token_is": (0.5, 5.0),  # IcePop
    "geometric_sequence_mask": (0.99, 1.01),  # SkyRL's recipes; verl suggests 1.0002 to 1.001 for long completions
    "ppo_clip": (0.8, 1.2),
    "decoupled_ppo_log_linear": (0.8, 1.2),
    "gspo": (1 - 3e-4, 1 + 4e-4),
    "cispo": (0.0, 5.0),  # the source bounds from above only and prints no number: 5 is this project's
}
"""Ratio interval that the source of each correction recommends; the others read none."""
M2PO_SECOND_MOMENT = 0.04
"""Mean squared log-ratio [nats^2] at which `m2po` stops masking tokens, as its source has it."""


def _inside(ratio: Float[Tensor, "*shape"], limits: Limits) -> Bool[Tensor, "*shape"]:
    return (limits.ratio_low <= ratio) & (ratio <= limits.ratio_high)


def _clipped(
    log_ratio: Float[Tensor, "*shape"], advantage: Float[Tensor, "*shape"], limits: Limits
) -> Float[Tensor, "*shape"]:
    """Derivative of min(q A, clip(q) A) by A log q: q, or 0 where the clip is active."""
    ratio = log_ratio.exp()
    active = torch.where(advantage > 0, ratio > limits.ratio_high, (advantage < 0) & (ratio < limits.ratio_low))
    return torch.where(active, 0.0, ratio)


def _mean_log_ratio(tokens: SampledTokens) -> Float64[Tensor, " completion"]:
    lengths = torch.bincount(tokens.completion, minlength=tokens.num_completions)
    return sequence_log_ratio(tokens) / lengths.clamp(min=1)


def _as_factor(factor: Float64[Tensor, " token"], tokens: SampledTokens) -> Float[Tensor, " token"]:
    result = factor.to(tokens.learner_logprobs.dtype)
    rule = "exponentials of log-ratios must be finite"
    require(torch.isfinite(result), rule, tokens.log_ratio, TRUNCATE, tokens.completion)
    return result
