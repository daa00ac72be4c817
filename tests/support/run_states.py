"""What a driver knows of a run, in the midst of it or at its start."""

import torch

from actors.data.documents import DocumentStream
from actors.rollout import Document
from orchestration.buffer.buffer_state import BufferState
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.supervision.run_state import RunState


def make_buffer(documents: list[Document], *, num_steps: int = 8) -> RolloutBuffer[Document]:
    """Four documents a step, in order; its tickets bring documents."""
    pool = ReusePool(documents_per_step=4, max_uses=1, max_reuse_lag=None, order="fifo", seed=0)
    return RolloutBuffer(
        DocumentStream(documents, seed=7).take,
        pool=pool,
        num_steps=num_steps,
        lag_rule="in_order",
        max_lag=2,
        prefetch_steps=2,
        completions_per_context=3,
        seed=5,
        record=lambda row: None,
    )


def run_state(buffer: BufferState, *, config: str = "{}", data_digest: str = "digest") -> RunState:
    """Of a run whose buffer is in this state."""
    return RunState(
        buffer=buffer,
        position=17,
        data_digest=data_digest,
        config=config,
        events_bytes=1234,
        metrics_bytes=567,
        elapsed_s=0.1,
        whitening_moment=torch.arange(6.0).reshape(2, 3),
        first_evaluation=None,
        evaluated_step=-1,
        wandb_id="0123abcd",
    )
