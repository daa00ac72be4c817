"""Settings of the frozen feature map and of the servers that compute it."""

from typing import Literal

from pydantic import Field, field_validator

from actors.config import Settings


class FeatureConfig(Settings):
    """Which activations make up a feature, and how their second moment is estimated for pooled whitening."""

    depth_fracs: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths of the residual stream that are concatenated: layer floor(frac * num_layers)."""
    pooling: Literal["last", "mean"] = "last"
    """Feature of a window: that of its last token, or the mean over its tokens."""
    normalization: Literal["joint", "per_layer"] = "joint"
    """One L2 norm over the concatenated vector of a token, or one for each layer's part."""
    whitening_documents: int = Field(16, gt=0)
    """Training documents whose completions by the initial model estimate the pooled second moment."""
    whitening_shrinkage: float = Field(0.01, gt=0, le=1)
    """Share of the mean eigenvalue that is added to the pooled second moment before its root is inverted."""
    micro_batch_documents: int = Field(2, gt=0)
    """Documents in one forward pass."""
    cached_documents: int = Field(4096, ge=0)
    """Documents whose ground-truth features are kept."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """Kernel for the packed rows: exact dense masks, or block-sparse ones (GPU)."""

    @field_validator("depth_fracs")
    @classmethod
    def _inside(cls, fracs: tuple[float, ...]) -> tuple[float, ...]:
        if not fracs or not all(0 <= frac < 1 for frac in fracs):
            raise ValueError(f"depth_fracs={fracs} must be one or more numbers in [0, 1), such as (0.25, 0.5, 0.75)")
        return tuple(sorted(fracs))


class VerifierConfig(Settings):
    """Who judges whole completions for the objective `rlvr`, and in evaluation."""

    name: str = "exact"
    """`exact`: the text equals the answer; `numeric`: its last number equals the answer's; `unit_tests`: prompt,
    completion and the answer's program of assertions run in a sandbox; `reasoning_gym`: the task's own scorer; or
    `package.module:function`, a function (prompt, completion, answer) -> number of yours."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest time one completion may be judged [s]; past it the reward is 0 and counted."""
    memory_mib: int = Field(512, gt=0)
    """Memory a sandboxed program may take [MiB]."""
    processes: int = Field(2, gt=0)
    """Sandboxed programs that run side by side."""
