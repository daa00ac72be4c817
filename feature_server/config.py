"""Settings of the frozen feature map and of the servers that compute it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from actors.config import Settings


class FeatureMapConfig(Settings):
    """Which activations make up a feature."""

    depth_fracs: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths of the residual stream that are concatenated: layer floor(frac * num_layers), but not
    the embedding: at least 1."""
    random_weights: bool = False
    """True: the feature model's weights are random (the same in every run) instead of loaded: a control."""
    foreign_tokenizer: Literal["refuse", "retokenize", "reuse_ids"] = "refuse"
    """What happens if model.feature_model has another tokenizer than the policy. `refuse`: the run does not start;
    `retokenize`: the feature model reads the texts in its own tokens (each context by itself: slower); `reuse_ids`: it
    reads the policy's ids as if they were its own, as the authors' code does."""
    pooling: Literal["last", "mean"] = "last"
    """Feature of a window: that of its last token, or the mean over its tokens."""
    micro_batch_documents: int = Field(2, gt=0)
    """Documents in one forward pass."""

    @field_validator("depth_fracs")
    @classmethod
    def _inside(cls, fracs: tuple[float, ...]) -> tuple[float, ...]:
        if not fracs or not all(0 <= frac < 1 for frac in fracs):
            raise ValueError(f"depth_fracs={fracs} must be one or more numbers in [0, 1), such as (0.25, 0.5, 0.75)")
        return tuple(sorted(fracs))


class FeatureConfig(FeatureMapConfig):
    """Which activations make up a feature, and how their second moment is estimated for pooled whitening."""

    whitening_documents: int = Field(16, gt=0)
    """Training documents whose completions by the initial model estimate the pooled second moment."""
    whitening_shrinkage: float = Field(0.01, gt=0, le=1)
    """Share of the mean eigenvalue that is added to the pooled second moment before its root is inverted."""
    pooled_moment: Literal["initial", "document"] = "initial"
    """Completions whose second moment pooled whitening uses. `initial`: those of the initial model, once for the whole
    run; `document`: those of the document that is scored."""


class VerifierConfig(Settings):
    """What scores whole completions for the objective `rlvr`, and in evaluation."""

    name: str = "exact"
    """`exact`: the text equals the answer; `numeric`: its last number equals the answer's; `unit_tests`: prompt,
    completion and the answer's assertions run as a program in a sandbox; `reasoning_gym`: the task's own scorer; or
    `package.module:function` or `/path/to/file.py:function`, a function (prompt, completion, answer) -> number of
    yours."""
    timeout_s: float = Field(10.0, gt=0)
    """Time limit for scoring one completion [s]; past it the reward is 0 and counted, but a function of yours that
    takes longer ends the run."""
    memory_mib: int = Field(512, gt=0)
    """Memory a sandboxed program may take [MiB]."""
    processes: int = Field(2, gt=0)
    """Sandboxed programs that run concurrently."""

    @field_validator("name")
    @classmethod
    def _absolute_file(cls, name: str) -> str:
        file, colon, function = name.rpartition(":")
        # Servers may run in another folder than the one where the name was typed.
        return f"{Path(file).expanduser().absolute()}:{function}" if colon and file.endswith(".py") else name
