"""The DeepSpeed engine: one optimizer step from any number of micro-batches, on any number of ranks.

Gradients are sums over the step divided by denominators that the caller passes in, so neither the number of
micro-batches nor of ranks changes the update (up to the order of additions).
"""

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor

from actors.weights.store import listening_store
from learner.config import LearnerConfig
from learner.optimizer_state import OptimizerState
from learner.policy import PackedPolicy


def connect_ranks(*, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Join the process group of all learner ranks; a later collective fails after `timeout_s` instead of hanging."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # each rank is a Ray actor that sees its own device only
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE="1",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    import deepspeed

    # The shared-memory collectives would be compiled for 45 s on first use; gloo serves as well at this size.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if not torch.distributed.is_initialized():  # an engine in the same process may have done it
        store = (
            listening_store(address, port, timeout_s=timeout_s)
            if rank == 0
            else torch.distributed.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        )
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, rank=rank, world_size=world_size, timeout=timeout, verbose=False)


class StepNotApplied(FloatingPointError):
    """A step whose loss or gradient is not finite. Every rank raises it and is left as it was before the step."""


class LearnerEngine:
    """Weights, optimizer and learning-rate schedule of one rank."""

    def __init__(self, policy: PackedPolicy, config: LearnerConfig, *, dtype: str) -> None:
        import deepspeed

        self.policy = policy
        """The network under the engine."""
        self._deepspeed = deepspeed
        self._config = config
        self._world_size = torch.distributed.get_world_size()
        policy.is_sharded = self.shards_parameters and self._world_size > 1
        self._optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay
        )
        self._engine, *_ = deepspeed.initialize(
            model=policy, optimizer=self._optimizer, config=self._deepspeed_config(dtype)
        )
        if config.zero_stage == 0 and dtype == "bfloat16":
            self._undo_first_step()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._warmup)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self._engine.device

    def __call__(self, *inputs: object) -> tuple[Tensor, ...]:
        """Forward through the engine, with gradient."""
        return self._engine(*inputs)

    def accumulate(self, loss: Tensor) -> None:
        """Backward of this rank's part of the step's loss."""
        # DeepSpeed averages over ranks; the loss is already a sum over the whole step's denominators.
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def apply(self, *, loss: float, learning_rate_scale: float = 1.0) -> float:
        """One optimizer step with what all micro-batches accumulated. Returns its rate: the scheduled one, scaled.

        `loss`: of the whole step, over all ranks.
        Raises: StepNotApplied, on every rank, if the loss or the norm of the gradient is not finite; the engine is then
        as it was before the step, and takes the next one.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "a step needs all of its micro-batches"
        if not math.isfinite(loss):
            self._drop_gradients()
            raise self._not_applied(f"the loss is {loss}")
        if self._config.zero_stage == 0:
            # Without ZeRO, DeepSpeed clips and forgets the norm.
            gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
            self._unsharded_norm = torch.nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(self._unsharded_norm):
                self._drop_gradients()
                raise self._not_applied(f"the gradient's norm is {self._unsharded_norm}")
        rate = self._set_rate(scale=learning_rate_scale)
        self._engine.step()
        if not (self._engine.was_step_applied() and math.isfinite(self.grad_norm())):  # it skips without a word
            self._set_rate()
            raise self._not_applied(f"the gradient's norm is {self.grad_norm()}")
        self._schedule.step()
        return rate

    def grad_norm(self) -> float:
        """Global norm of the last applied gradient, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else self._unsharded_norm

    @property
    def shards_parameters(self) -> bool:
        """ZeRO-3: each rank keeps a part of every parameter."""
        return self._config.zero_stage == 3

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer holds of each parameter, to read and to replace between two steps."""
        parameters = dict(self.policy.causal_lm.named_parameters())
        return OptimizerState(self._engine.optimizer, self._optimizer, parameters, zero_stage=self._config.zero_stage)

    def resume(self, num_steps: int) -> None:
        """Go on with the optimizer's present numbers as after that many steps. Every rank must call it."""
        self.optimizer_state().apply()
        self._schedule.last_epoch = num_steps
        self._schedule._last_lr = [full * self._warmup(num_steps) for full in self._schedule.base_lrs]
        self._set_rate()

    def gathered(self, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Whole parameters while inside, where ZeRO-3 keeps only shards; every rank must enter."""
        if not self.shards_parameters:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters))

    def _undo_first_step(self) -> None:
        """Without ZeRO, in bfloat16, DeepSpeed makes the state of the optimizer by a step without a gradient."""
        optimizer = self._engine.optimizer
        assert optimizer is not None
        optimizer.refresh_fp32_params()  # the weights had decayed
        self._optimizer.state.clear()  # the step would count in the correction of the means

    def _set_rate(self, *, scale: float = 1.0) -> float:
        """Set the learning rate of the step that comes next: the scheduled one, scaled. Returns it."""
        for group, scheduled in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = scheduled * scale
        return self._optimizer.param_groups[0]["lr"]

    def _drop_gradients(self) -> None:
        """Forget what the step's micro-batches have accumulated, as DeepSpeed does where it skips a step itself."""
        optimizer = self._engine.optimizer
        assert optimizer is not None
        optimizer.zero_grad()
        self._engine.micro_steps += 1  # past the last micro-batch, which `step` would have counted

    def _not_applied(self, cause: str) -> StepNotApplied:
        return StepNotApplied(
            f"step {self._schedule.last_epoch + 1}: {cause}; the step was not applied. Lower learner.learning_rate or "
            "learner.max_importance_weight, or check the data"
        )

    def _warmup(self, step: int) -> float:
        """The step's part of the full learning rate."""
        return min(1.0, (step + 1) / (self._config.warmup_steps + 1))

    def _deepspeed_config(self, dtype: str) -> dict[str, object]:
        config = self._config
        per_rank = config.documents_per_step // self._world_size
        return {
            "train_micro_batch_size_per_gpu": config.micro_batch_documents,
            "gradient_accumulation_steps": per_rank // config.micro_batch_documents,
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "bfloat16"},
            "steps_per_print": 2**31,
        }
