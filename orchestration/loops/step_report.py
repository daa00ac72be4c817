"""What the metrics say of each step's batch, of the buffer, and of who waited."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from actors.rollout import Ticket
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Use
from orchestration.idle_time import IdleTime
from orchestration.output.metrics import MetricsLog

Payload = TypeVar("Payload")


def observe_rollouts(metrics: MetricsLog, batch: Sequence[Use[Payload]], *, lag_bound: int | None) -> None:
    """Lag and reuse of a batch."""
    for use in batch:
        for part in ("in_flight", "in_queue", "reuse"):
            metrics.observe(f"lag/{part}/mean", getattr(use.lag, part))
        metrics.observe("reuse/index/mean", use.reuse_index)
    if lag_bound is not None:
        metrics.observe("lag/bound", lag_bound)


def observe_buffer(metrics: MetricsLog, buffer: RolloutBuffer[Payload] | ReplayBuffer[Payload]) -> None:
    """Where all tickets are."""
    metrics.observe("buffer/scored", buffer.num_scored)
    metrics.observe("buffer/alive", buffer.num_alive)
    metrics.observe("reuse/expired", buffer.num_expired)
    account = buffer.account
    for name in ("issued", "trained", "failed", "dropped", "pending"):
        metrics.observe(f"tickets/{name}", getattr(account, name))


def observe_idle_time(metrics: MetricsLog, idle: IdleTime, *, sizes: dict[str, int]) -> None:
    """Share of time that each role waited since the last step, by reason; `sizes`: its processes."""
    seconds, interval = idle.flush()
    for reason, idle_s in seconds.items():
        metrics.observe(f"idle/{reason}_frac", idle_s / (interval * sizes[reason.split("/")[0]] or 1.0))


class FirstRollouts:
    """Tells when the first rollout of a worker that joined is trained on."""

    def __init__(self) -> None:
        self._joining: dict[Hashable, tuple[set[int], Callable[[], None]]] = {}

    def expect(self, worker: Hashable, on_trained: Callable[[], None]) -> None:
        """This worker has joined."""
        self._joining[worker] = (set(), on_trained)

    def forget(self, worker: Hashable) -> None:
        """It has left, or failed."""
        self._joining.pop(worker, None)

    def sampling(self, worker: Hashable, tickets: Sequence[Ticket]) -> None:
        """The worker has these tickets."""
        if worker in self._joining:
            self._joining[worker][0].update(ticket.ticket_id for ticket in tickets)

    def training(self, batch: Sequence[Use[Payload]]) -> None:
        """The learner is about to train on these."""
        batch_ids = {use.ticket.ticket_id for use in batch}
        for worker in [worker for worker, (ticket_ids, _) in self._joining.items() if ticket_ids & batch_ids]:
            _, on_trained = self._joining.pop(worker)
            on_trained()
