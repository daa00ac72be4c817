"""Settings of the objective and of the optimizer."""

import math
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from actors.config import Settings

CorrectionName = Literal[
    "none",
    "sequence_is",
    "truncated_sequence_is",
    "truncated_token_is",
    "masked_token_is",
    "geometric_sequence_mask",
    "ppo_clip",
    "decoupled_ppo_recomputed",
    "decoupled_ppo_log_linear",
    "gspo",
    "cispo",
    "topr",
    "m2po",
]

LossNormalization = Literal["sampled_tokens", "horizon"]


class StepConfig(Settings):
    """What is trained on, and how much of it per step."""

    objective: Literal["ebft", "sft", "rlvr", "self_likelihood"] = "ebft"
    """`ebft`: match the ground truth's features. `sft`: its cross-entropy alone, nothing is sampled for training.
    `rlvr`: the reward is a verifier's (section `verifier`). `self_likelihood`: the reward is the log-likelihood that
    the policy gave its own completion, a control that is known to hurt."""
    documents_per_step: int = Field(8, gt=0)
    """Documents in one optimizer step, over all ranks."""

    @property
    def samples(self) -> bool:
        """False for supervised fine-tuning, which needs no rollouts."""
        return self.objective != "sft"


class LearnerConfig(StepConfig):
    """The objective, its reward, RLOO policy gradient, cross-entropy, and the DeepSpeed engine that applies them."""

    num_steps: int = Field(100, ge=0)
    """Optimizer steps of the run."""
    micro_batch_documents: int = Field(2, gt=0)
    """Documents in one forward and backward pass of one rank."""
    whitening: Literal["pooled", "feature_space", "shrunk", "sample_mixing", "none"] = "pooled"
    """`pooled`: one moment for many contexts (`feature.pooled_moment`); keeps a live diversity term. `feature_space`:
    each group's own moment, as the method is written; `shrunk`: the same with `group_shrinkage`; `sample_mixing`: as
    the authors' code computes it; `none`: raw features."""
    group_shrinkage: float = Field(0.1, gt=0)
    """Share of the group's mean squared norm that whitening `shrunk` adds to its moment; large values: `none`."""
    alignment: Literal["inner_product", "cosine"] = "inner_product"
    """Similarity of completion and ground truth for whitening `pooled` and `none`; the others define their own."""
    alignment_coef: float = Field(1.0, ge=0)
    """Weight of the alignment in the reward."""
    diversity_coef: float = Field(1.0, ge=0)
    """Weight of the subtracted sibling similarity; 1 makes the reward a proper scoring rule."""
    cross_entropy_coef: float = Field(0.0, ge=0)
    """gamma: weight of the ground truth's cross-entropy next to the policy gradient; published runs use 0, 0.03 or
    0.1. Objective `sft` is the cross-entropy alone, whatever this says."""
    loss_normalization: LossNormalization = "sampled_tokens"
    """What the step's policy gradient is divided by. `sampled_tokens`: the tokens that its completions have, the
    published mean over tokens; longer draws shrink the step, so the expected gradient is not exact where completions
    end early. `horizon`: the tokens that they could have, which no draw changes."""
    correction: CorrectionName = "truncated_sequence_is"
    """Factor of each sampled token's gradient where older weights sampled it; docs/off_policy.md has the formulas."""
    reward_weights: Literal["none", "pairwise", "self_normalised"] = "pairwise"
    """Importance weights inside the reward, where siblings stand for the learner's mean feature: `pairwise` is
    unbiased, `self_normalised` divides by their sum, `none` matches the mean feature of the older policy."""
    max_importance_weight: float = Field(2.0, ge=1, allow_inf_nan=True)
    """C: where importance weights are truncated, in the correction and inside the reward; inf never does."""
    ratio_bounds: tuple[float, Annotated[float, Field(allow_inf_nan=True)]] | None = None
    """Interval of the ratio for the corrections that clip or mask, its upper end may be inf; None: the published one of
    each correction."""
    ess_learning_rate: bool = False
    """True: scale each step's learning rate by the square root of its effective sample fraction, not truncated."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW; constant after the warm-up."""
    warmup_frac: float = Field(0.03, ge=0, le=1)
    """Share of num_steps, rounded up, over which the learning rate rises linearly."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger global norm are scaled down to it."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards optimizer states over the ranks, 2 gradients too, 3 parameters too."""
    gradient_checkpointing: bool = False
    """True: recompute activations in the backward pass, for memory."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: ceil(warmup_frac num_steps), exact in decimals, so that 0.07 of 100 are 7."""
        return math.ceil(Fraction(str(self.warmup_frac)) * self.num_steps)

    @property
    def cross_entropy_weight(self) -> float:
        """Factor of the cross-entropy in the loss."""
        return self.cross_entropy_coef if self.samples else 1.0

    @model_validator(mode="after")
    def _weights_exist(self) -> "LearnerConfig":
        if self.ess_learning_rate and not self.samples:
            raise ValueError(
                "learner.ess_learning_rate=True needs importance weights, and learner.objective='sft' samples nothing; "
                "leave out one of the two"
            )
        return self

    @field_validator("ratio_bounds")
    @classmethod
    def _around_one(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0 <= bounds[0] <= 1 <= bounds[1]:
            raise ValueError(
                f"ratio_bounds={bounds} must be two numbers low <= 1 <= high, low >= 0: a ratio of 1 is on policy"
            )
        return bounds
