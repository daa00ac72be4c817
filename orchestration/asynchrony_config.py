"""Settings of lag and reuse, and the rules between them; lag_rule.py and reuse.py define what they do."""

from typing import Literal

from pydantic import Field, model_validator

from actors.config import Settings, WeightTransport


class LagConfig(Settings):
    """How far rollouts may lag behind the learner, and how often they are used."""

    mode: Literal["bounded", "exact", "free"] = "bounded"
    """`bounded`: no rollout is first trained on more than max_lag learner steps after its weights. `exact`: each one
    exactly max_lag steps after (fewer in the first max_lag steps), for studies. `free`: in order of arrival, whatever
    the lag."""
    max_lag: int = Field(1, ge=0)
    """Learner steps between the weights that sampled a completion and those it trains first; 0 = synchronous."""
    lag_rule: Literal["in_order", "wait", "drop"] = "in_order"
    """How `bounded` enforces the bound. `in_order`: rollouts are trained on in the order of their tickets. `wait`:
    those that arrive first are trained on first, but the learner waits for any that would exceed the bound. `drop`: it
    never waits for them; rollouts that arrive stale are dropped and counted, and their documents sampled again: those
    that take long are trained on less often."""
    prefetch_steps: int | None = Field(None, ge=0)
    """Steps whose documents may be sampled ahead of the learner; None: max_lag. Less leaves `wait` and `drop` slack."""
    max_uses: int = Field(1, gt=0)
    """U: most steps that train on one rollout; of the documents of each step one in U is fresh."""
    max_reuse_lag: int | None = Field(None, gt=0)
    """Largest lag [learner steps] at which a rollout may be used again; None: as large as max_uses makes it."""
    reuse_order: Literal["fifo", "uniform"] = "fifo"
    """Which rollouts are used again: the oldest, in consecutive steps, or any, drawn at random."""

    @property
    def rule(self) -> str:
        """Key of lag_rule.LAG_RULES."""
        return self.lag_rule if self.mode == "bounded" else self.mode

    @property
    def effective_prefetch_steps(self) -> int:
        """Steps whose documents may be sampled ahead."""
        return self.max_lag if self.prefetch_steps is None else self.prefetch_steps

    @property
    def lag_bound(self) -> int | None:
        """Largest lag [learner steps] that any use of a rollout may have; None: unbounded (mode `free`)."""
        if self.mode == "free":
            return None
        of_reuse = [] if self.max_reuse_lag is None else [self.max_reuse_lag]
        if self.reuse_order == "fifo":
            of_reuse.append(self.max_lag + self.max_uses - 1)
        return max(self.max_lag, min(of_reuse))

    @model_validator(mode="after")
    def _rule_suits_mode_and_prefetch(self) -> "LagConfig":
        if self.mode != "bounded" and self.lag_rule != "in_order":
            raise ValueError(
                f"lag_rule={self.lag_rule!r} needs mode='bounded', got {self.mode!r}; leave out one of the two"
            )
        if self.prefetch_steps is None or self.prefetch_steps == self.max_lag or self.mode == "free":
            return self
        if self.rule in ("in_order", "exact"):
            raise ValueError(
                f"prefetch_steps={self.prefetch_steps} differs from max_lag={self.max_lag}, but rollouts that are "
                "trained on in the order of their tickets lag by prefetch_steps; set max_lag alone"
            )
        if self.prefetch_steps > self.max_lag:
            raise ValueError(
                f"prefetch_steps={self.prefetch_steps} exceeds max_lag={self.max_lag}: of the "
                f"{self.prefetch_steps + 1} steps of documents that would be alive, {self.max_lag + 1} can be trained "
                "on within the bound; lower prefetch_steps or raise max_lag"
            )
        return self

    @model_validator(mode="after")
    def _reuse_is_whole(self) -> "LagConfig":
        if self.max_uses == 1 and (self.max_reuse_lag is not None or self.reuse_order != "fifo"):
            raise ValueError(
                f"max_reuse_lag={self.max_reuse_lag} and reuse_order={self.reuse_order!r} have no effect with "
                "max_uses=1: no rollout is used again; raise max_uses, or leave them out"
            )
        if self.reuse_order == "uniform" and self.max_reuse_lag is None:
            raise ValueError(
                "reuse_order='uniform' needs max_reuse_lag: chance alone could keep a rollout forever; set, say, "
                f"max_reuse_lag={self.max_lag + 2 * self.max_uses}"
            )
        oldest = self.max_lag + self.max_uses - 1
        if (
            self.mode == "exact"
            and self.max_reuse_lag is not None
            and (self.reuse_order == "uniform" or self.max_reuse_lag < oldest)
        ):
            raise ValueError(
                f"mode='exact' with max_reuse_lag={self.max_reuse_lag} and reuse_order={self.reuse_order!r}: rollouts "
                "beyond it would be replaced by others before their turn, whose lag is not exact; use "
                f"reuse_order='fifo' with max_reuse_lag >= max_lag + max_uses - 1 = {oldest}, or without max_reuse_lag"
            )
        return self


class AsynchronyConfig(LagConfig):
    """Lag and reuse, how weights travel, and how long processes wait for each other."""

    weight_transport: WeightTransport = "object_store"
    """How weights travel: through Ray's object store; as `files` on a shared disk; in memory of the learner that
    workers on its node map (`ipc`; on GPUs: that share its GPU); or sent by the learner to each worker, between CPUs
    (`gloo`) or between GPUs (`nccl`)."""
    weight_folder: str | None = None
    """Folder on a disk that learner and rollout workers share, for the safetensors files of `files`. Each run makes a
    folder of its own in it and removes it at its end."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for a start-up, a request to a worker, a collective of the learner, or the next batch [s]."""

    @model_validator(mode="after")
    def _files_have_a_folder(self) -> "AsynchronyConfig":
        if (self.weight_transport == "files") != (self.weight_folder is not None):
            raise ValueError(
                f"weight_transport={self.weight_transport!r} with weight_folder={self.weight_folder!r}: files need a "
                "folder, and nothing else does; set both, or leave out both"
            )
        return self
