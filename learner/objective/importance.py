"""Importance weights: how much likelier a sample is under the learner than under the weights that drew it (pure).

r is the ratio p_learner / p_behavior of a token, R that of a whole completion, the product of its tokens'. Ratios are
computed in float64 and carry no gradient.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

COUNT_STEPS = "count learner steps since the weights that sampled the token"
RESCORE = "check that both policies score its tokens with the same temperature and vocabulary"
TRUNCATE = "use a correction that truncates, with finite max_importance_weight or ratio_high, or lower max_lag"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """The sampled tokens of some completions, in one flat run.

    Raises: ValueError, naming the completion, on a log-prob that is not finite, a positive behavior log-prob, or a
    negative lag.
    """

    learner_logprobs: Float[Tensor, " token"]
    """Nats, under the weights that are being trained."""
    behavior_logprobs: Float[Tensor, " token"]
    """Nats, under the weights that sampled the token."""
    completion: Int[Tensor, " token"]
    """Which completion each token belongs to, ascending."""
    num_completions: int
    lag: Float[Tensor, " token"]
    """Learner steps since the weights that sampled the token."""

    def __post_init__(self) -> None:
        learner, behavior, lag = self.learner_logprobs, self.behavior_logprobs, self.lag
        require(torch.isfinite(learner), "learner_logprobs must be finite", learner, RESCORE, self.completion)
        require(torch.isfinite(behavior), "behavior_logprobs must be finite", behavior, RESCORE, self.completion)
        require(behavior <= 0, "behavior_logprobs must not be positive", behavior, RESCORE, self.completion)
        require((lag >= 0) & torch.isfinite(lag), "lag must be finite and >= 0", lag, COUNT_STEPS, self.completion)

    @property
    def log_ratio(self) -> Float64[Tensor, " token"]:
        """log r of each token [nats], without gradient."""
        return self.learner_logprobs.detach().double() - self.behavior_logprobs.double()


def sequence_log_ratio(tokens: SampledTokens) -> Float64[Tensor, " completion"]:
    """log R = log p_learner(completion) - log p_behavior(completion): the sum over the completion's own tokens.

    Units: nats. No gradient; finite, as SampledTokens are; 0 for a completion without tokens.
    Source: importance sampling of sequences (Precup et al., 2000).
    Test: test_off_policy.py::test_sequence_log_ratio_sums_own_tokens
    """
    log_ratio = tokens.log_ratio
    return log_ratio.new_zeros(tokens.num_completions).index_add(0, tokens.completion, log_ratio)


def largest_lag(tokens: SampledTokens) -> Float[Tensor, " completion"]:
    """Learner steps since the oldest weights that sampled a token of the completion; 0 without tokens.

    Test: test_off_policy.py::test_the_oldest_token_dates_a_completion
    """
    lag = tokens.lag
    return lag.new_zeros(tokens.num_completions).scatter_reduce(0, tokens.completion, lag, "amax")


def sequence_weights(
    log_ratio: Float[Tensor, " completion"], *, max_importance_weight: float
) -> Float[Tensor, " completion"]:
    """min(R, max_importance_weight): importance weights of whole completions.

    Raises: ValueError on a log-ratio that is not finite, one whose exponential is not (no truncation), or a bound
    below 1.
    Source: truncated importance sampling (Ionides, 2008).
    Test: test_off_policy.py::test_sequence_weights_equal_the_transcription
    """
    require_truncation(max_importance_weight)
    require(torch.isfinite(log_ratio), "log-ratios must be finite", log_ratio, RESCORE)
    weights = log_ratio.detach().exp().clamp(max=max_importance_weight)
    require(torch.isfinite(weights), "exponentials of log-ratios must be finite", log_ratio, TRUNCATE)
    return weights


def effective_sample_frac(
    log_ratio: Float[Tensor, " completion"], *, max_importance_weight: float = math.inf
) -> Float[Tensor, ""]:
    """(sum w)^2 / (n sum w^2), w = min(R, max_importance_weight): the fraction of the n completions that would do if
    weighted equally. n is what it is called with: a mean over parts of a step is not that of the step.

    Range: [1/n, 1], 1 when all weights are equal. In logarithms, so no log-ratio is too large or too small.
    Raises: ValueError if there are no completions.
    Source: effective sample size (Kong, 1992).
    Test: test_off_policy.py::test_effective_sample_frac
    """
    if log_ratio.numel() == 0:
        raise ValueError("effective_sample_frac needs at least 1 completion, got 0; skip an empty batch")
    log_weight = log_ratio.detach().double().clamp(max=math.log(max_importance_weight))
    log_frac = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0) - math.log(log_weight.numel())
    return log_frac.exp().clamp(max=1.0)  # rounding may exceed 1


def ess_learning_rate_scale(log_ratio: Float[Tensor, " completion"]) -> float:
    """sqrt(effective_sample_frac), not truncated: what to multiply a step's learning rate by, for AdamW and its like.

    Range: [sqrt(1/n), 1]; 1 on policy.
    Raises: ValueError if there are no completions.
    Source: VCPO (arXiv:2602.17616): the effective sample size acts as a batch size, and AdamW's learning rate goes
    with the root of that. Its code, with which this agrees at its settings: min(1, frac / base)^(1/2), base 1, of all
    ranks' completions, weights not truncated.
    Test: test_off_policy.py::test_learning_rate_scale_is_the_root_of_the_effective_sample_frac
    """
    return math.sqrt(float(effective_sample_frac(log_ratio)))


def require_truncation(max_importance_weight: float) -> None:
    """Raises: ValueError on a bound that would scale down on-policy completions.

    Test: test_off_policy.py::test_sequence_weights_refuse_what_has_no_weight
    """
    if not max_importance_weight >= 1:
        raise ValueError(
            f"max_importance_weight must be at least 1 (inf: no truncation), got {max_importance_weight}; "
            "below 1 even on-policy completions would be scaled down"
        )


def require(
    valid: Bool[Tensor, " value"],
    rule: str,
    values: Float[Tensor, " value"],
    remedy: str,
    completion: Int[Tensor, " value"] | None = None,
) -> None:
    """Raise the rule with the first value that breaks it; without `completion` each value is a completion's own."""
    if not valid.all():
        index = int((~valid).nonzero()[0])
        where = index if completion is None else int(completion[index])
        raise ValueError(f"{rule}, got {float(values[index])} for completion {where}; {remedy}")
