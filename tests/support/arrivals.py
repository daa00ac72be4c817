"""One ticket that arrives at a buffer by itself."""

from typing import TypeVar

from actors.rollout import Ticket, WeightSteps
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Arrival

Payload = TypeVar("Payload")


async def finish(
    buffer: RolloutBuffer[Payload] | ReplayBuffer[Payload],
    ticket: Ticket,
    payload: Payload,
    *,
    version: int = 0,
    weight_steps: WeightSteps | None = None,
) -> None:
    """It was scored; all of its request began and ended with `version` unless `weight_steps` says otherwise."""
    steps = ((0, version),) if weight_steps is None else weight_steps
    await buffer.finish([Arrival(ticket=ticket, payload=payload, version=version, weight_steps=steps)])
