"""Corrections for completions that an older policy sampled (pure).

Guarantees: weights carry no gradient, are finite, and are 1 where the learner and behavior policies agree.
The learner looks one up in `CORRECTIONS` by its configured name and multiplies each completion's
policy-gradient term by its weight.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SequenceCorrection(Protocol):
    """From log-ratios [nats] of whole completions to their weights."""

    def __call__(
        self, log_ratio: Float[Tensor, " completion"], *, max_importance_weight: float
    ) -> Float[Tensor, " completion"]: ...


def sequence_log_ratio(
    learner_logprobs: Float[Tensor, " token"],
    behavior_logprobs: Float[Tensor, " token"],
    completion: Int[Tensor, " token"],
    num_completions: int,
) -> Float[Tensor, " completion"]:
    """log p_learner(completion) - log p_behavior(completion): the sum over the completion's own tokens.

    The tokens of all completions stand in one flat run; `completion` says which one each belongs to.

    Units: nats. Carries the gradient of learner_logprobs.
    Raises: ValueError if a result is not finite, with the completion's index.
    Source: importance sampling of sequences (Precup et al., 2000).
    Test: test_off_policy.py::test_sequence_log_ratio_sums_own_tokens
    """
    difference = learner_logprobs - behavior_logprobs
    log_ratio = difference.new_zeros(num_completions).index_add(0, completion, difference)
    _require_finite(log_ratio)
    return log_ratio


def no_weights(
    log_ratio: Float[Tensor, " completion"], *, max_importance_weight: float
) -> Float[Tensor, " completion"]:
    """w = 1: train as if the learner policy had sampled; the bias grows with lag.

    max_importance_weight has no effect: all corrections share one signature.

    Raises: ValueError on a log-ratio that is not finite.
    Source: the uncorrected policy gradient, as EBFT (arXiv:2603.12248) uses it on-policy.
    Test: test_off_policy.py::test_weights_are_one_when_the_policies_agree
    """
    _require_finite(log_ratio)
    return torch.ones_like(log_ratio)


def truncated_sequence_weights(
    log_ratio: Float[Tensor, " completion"], *, max_importance_weight: float
) -> Float[Tensor, " completion"]:
    """w = min(p_learner / p_behavior, max_importance_weight), detached.

    Unbiased for terms of a single completion where nothing is truncated; truncation bounds the variance and
    pulls towards the behavior policy. Pairs of completions (the diversity term) still average over the
    behavior policy's siblings.

    Raises: ValueError on a log-ratio that is not finite, or a bound that is not finite and at least 1.
    Source: truncated importance sampling (Ionides, 2008).
    Test: test_off_policy.py::test_truncated_weights_equal_the_transcription
    """
    _require_finite(log_ratio)
    if not (math.isfinite(max_importance_weight) and max_importance_weight >= 1):
        raise ValueError(
            f"max_importance_weight must be finite and at least 1, got {max_importance_weight}; "
            "below 1 even on-policy completions would be scaled down"
        )
    # Clamped before exp, where overflow could happen, and after, because exp(log C) may round to above C.
    clamped = log_ratio.detach().clamp(max=math.log(max_importance_weight))
    return clamped.exp().clamp(max=max_importance_weight)


CORRECTIONS: dict[str, SequenceCorrection] = {
    "none": no_weights,
    "truncated_sequence_is": truncated_sequence_weights,
}


def effective_sample_frac(weights: Float[Tensor, " completion"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (n sum w^2): the fraction of the n completions that would do, were they weighted equally.

    Range: [1/n, 1], 1 when all weights are equal; 0 when every weight is 0.
    Raises: ValueError if there are no weights.
    Source: effective sample size (Kong, 1992).
    Test: test_off_policy.py::test_effective_sample_frac
    """
    if weights.numel() == 0:
        raise ValueError("effective_sample_frac needs at least 1 weight, got 0; skip an empty batch")
    # Scale-free, and scaled so that the squares of tiny weights do not underflow.
    scaled = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    return scaled.sum().square() / (weights.numel() * scaled.square().sum()).clamp(min=1)


def _require_finite(log_ratio: Float[Tensor, " completion"]) -> None:
    broken = (~torch.isfinite(log_ratio)).nonzero()
    if len(broken):
        index = int(broken[0, 0])
        raise ValueError(
            f"log-ratios must be finite, got {float(log_ratio[index])} for completion {index}; "
            "check that both policies score its tokens with the same temperature and vocabulary"
        )
