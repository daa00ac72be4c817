"""Settings of the objective and of the optimizer."""

from typing import Literal

from pydantic import Field, model_validator

from actors.config import Settings


class LearnerConfig(Settings):
    """CFM reward, RLOO policy gradient, cross-entropy, and the DeepSpeed engine that applies them."""

    num_steps: int = Field(100, ge=0)
    """Optimizer steps of the run."""
    documents_per_step: int = Field(8, gt=0)
    """Documents in one optimizer step, over all ranks."""
    micro_batch_documents: int = Field(2, gt=0)
    """Documents in one forward and backward pass of one rank."""
    whitening: Literal["pooled", "feature_space", "sample_mixing", "none"] = "pooled"
    """`pooled`: one map for all contexts, fitted to the initial model's completions; keeps a live diversity term.
    `feature_space`: each group's own second moment, as the method is written; `sample_mixing`: as the authors' code
    computes it; `none`: raw features."""
    alignment: Literal["inner_product", "cosine"] = "inner_product"
    """Similarity of completion and ground truth for whitening `pooled` and `none`; the other two define their own."""
    alignment_coef: float = Field(1.0, ge=0)
    """Weight of the alignment in the reward."""
    diversity_coef: float = Field(1.0, ge=0)
    """Weight of the subtracted sibling similarity; 1 makes the reward a proper scoring rule."""
    policy_gradient_coef: float = Field(1.0, ge=0)
    """Weight of the policy-gradient loss; 0 is supervised fine-tuning: nothing is sampled for training."""
    cross_entropy_coef: float = Field(0.0, ge=0)
    """gamma: weight of the ground truth's cross-entropy; published runs use 0, 0.03 or 0.1."""
    correction: Literal["none", "truncated_sequence_is"] = "truncated_sequence_is"
    """Correction for completions sampled by older weights: importance weights of whole completions, truncated."""
    max_importance_weight: float = Field(2.0, ge=1)
    """C: where importance weights are truncated."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW; constant after the warm-up."""
    warmup_steps: int = Field(3, ge=0)
    """Steps over which the learning rate rises linearly."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger global norm are scaled down to it."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards optimizer states over the ranks, 2 gradients too, 3 parameters too."""
    logits_chunk_tokens: int = Field(1024, gt=0)
    """Positions whose logits stand in memory at once."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """Kernel for the packed rows: exact dense masks, or block-sparse ones (GPU)."""
    gradient_checkpointing: bool = False
    """True: recompute activations in the backward pass, for memory."""

    @model_validator(mode="after")
    def _objective_is_whole(self) -> "LearnerConfig":
        if self.policy_gradient_coef == 0 and self.cross_entropy_coef == 0:
            raise ValueError(
                "policy_gradient_coef=0 and cross_entropy_coef=0 leave nothing to train on; raise one of them"
            )
        return self
