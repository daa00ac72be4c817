"""What is measured of one optimizer step: means, maxima and log-ratios, over all micro-batches and ranks."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from learner.batch import MicroBatch
from learner.credit import Credit
from learner.objective.importance import effective_sample_frac

LAG_0 = "off_policy/log_ratio_lag_0_abs/mean"
"""Name of the mean by which learner and engine are compared."""


class StepMetrics:
    """Collects values under metric names; `of_all_ranks` combines ranks, which need not have seen the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._maxima: dict[str, float] = {}
        self._log_ratios: list[Tensor] = [torch.zeros(0, dtype=torch.float64)]
        self.loss = 0.0
        """Sum of what was accumulated."""

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss."""
        self.loss += float(loss.detach())

    def add_log_ratios(self, log_ratio: Float64[Tensor, " completion"]) -> None:
        """Add those of completions [nats]."""
        self._log_ratios.append(log_ratio)

    def mean(self, name: str, values: Tensor) -> None:
        """Add values to a mean over everything collected under this name."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + float(values.detach().double().sum()), count + values.numel())

    def max(self, name: str, values: Tensor) -> None:
        """Add values to a maximum."""
        if values.numel():
            self._maxima[name] = max(self._maxima.get(name, -torch.inf), float(values.detach().max()))

    def of_all_ranks(self) -> "StepMetrics":
        """Collective: what all ranks collected, equal on each of them."""
        ranks: list[StepMetrics] = [self] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, self)
        whole = StepMetrics()
        for rank in ranks:
            for name, (total, count) in rank._sums.items():
                so_far = whole.sum_and_count(name)
                whole._sums[name] = (so_far[0] + total, so_far[1] + count)
            for name, value in rank._maxima.items():
                whole._maxima[name] = max(whole._maxima.get(name, -torch.inf), value)
            whole._log_ratios += rank._log_ratios
            whole.loss += rank.loss
        return whole

    def sum_and_count(self, name: str) -> tuple[float, int]:
        """Of the values of a mean."""
        return self._sums.get(name, (0.0, 0))

    def log_ratios(self) -> Float64[Tensor, " completion"]:
        """Of all completions [nats]."""
        return torch.cat(self._log_ratios)

    def values(self) -> dict[str, float]:
        """The mean or maximum of each name; a name without a value is left out."""
        return {name: total / count for name, (total, count) in self._sums.items() if count} | self._maxima


def describe_credit(credit: Credit, metrics: StepMetrics) -> None:
    """Lag, rewards and importance weights of a micro-batch's completions."""
    metrics.add_log_ratios(credit.log_ratio)
    metrics.mean("lag/mean", credit.lag)
    metrics.max("lag/max", credit.lag)
    for rewards in credit.rewards:
        metrics.mean("reward/total/mean", rewards.reward)
        metrics.mean("reward/advantage_abs/mean", rewards.advantage.abs())
        if rewards.alignment is not None and rewards.similarity is not None:
            metrics.mean("reward/alignment/mean", rewards.alignment)
            metrics.mean("reward/sibling_similarity/mean", rewards.similarity)
    for cfm_loss in credit.cfm_losses:
        metrics.mean("reward/cfm_loss/mean", cfm_loss)
    metrics.mean("off_policy/weight/mean", credit.weights)
    metrics.max("off_policy/weight/max", credit.weights)
    metrics.mean("off_policy/truncated_frac", credit.is_truncated)
    metrics.mean("off_policy/masked_frac", credit.correction == 0)
    # k3 = r - 1 - log r with r = learner / behavior: non-negative, its mean under the behavior policy is the KL.
    metrics.mean("off_policy/kl_k3/mean", credit.log_ratio.expm1() - credit.log_ratio)
    metrics.max("off_policy/log_ratio_abs/max", credit.log_ratio.abs())


def describe_weights(log_ratio: Float64[Tensor, " completion"], max_importance_weight: float) -> dict[str, float]:
    """Effective sample fraction of the whole step's completions, whose log-ratios these are; nothing without any."""
    if log_ratio.numel() == 0:
        return {}
    truncated = effective_sample_frac(log_ratio, max_importance_weight=max_importance_weight)
    return {
        "off_policy/ess_frac": float(effective_sample_frac(log_ratio)),
        "off_policy/ess_truncated_frac": float(truncated),
    }


def describe_agreement(
    batch: MicroBatch, learner_logprobs: Float[Tensor, " token"], metrics: StepMetrics, *, policy_version: int
) -> None:
    """How far learner and engine are apart at equal weights: on the tokens that the learner's present ones sampled."""
    now = batch.sampled_at == policy_version
    log_ratio = learner_logprobs.detach().cpu() - batch.behavior_logprobs
    metrics.mean(LAG_0, log_ratio[now].abs())
