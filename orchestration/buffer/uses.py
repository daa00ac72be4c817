"""Rollouts on their way through a buffer: as they arrive, while they wait, and in the batch that trains on them."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.rollout import Ticket, WeightSteps
from orchestration.buffer.buffer_state import ArrivedTicket
from orchestration.buffer.reuse import Pooled

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """Learner steps between the oldest weights that sampled a rollout and those it trains, by where they went."""

    in_flight: int
    """Published while it was sampled and scored."""
    in_queue: int
    """From its arrival to its first use."""
    reuse: int
    """From its first use to this one."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.in_flight + self.in_queue + self.reuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival(Generic[Payload]):
    """A ticket that was sampled and scored."""

    ticket: Ticket
    payload: Payload
    version: int
    """Oldest weights that sampled it."""
    weight_steps: WeightSteps
    """Of its request, for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use(Generic[Payload]):
    """A rollout in a batch: what the learner takes, and what it needs to know about it."""

    ticket: Ticket
    payload: Payload
    reuse_index: int
    """0: its first use."""
    lag: Lag


@dataclass(frozen=True, slots=True)
class Arrived(Generic[Payload]):
    """A finished ticket, and what it brought."""

    told: ArrivedTicket
    payload: Payload

    @property
    def ticket(self) -> Ticket:
        return self.told.ticket

    @property
    def version(self) -> int:
        return self.told.version

    def use(self, *, step: int, first_step: int, reuse_index: int) -> Use[Payload]:
        arrived_at = self.told.arrived_at
        lag = Lag(in_flight=arrived_at - self.version, in_queue=first_step - arrived_at, reuse=step - first_step)
        return Use(ticket=self.ticket, payload=self.payload, reuse_index=reuse_index, lag=lag)


@dataclass(frozen=True, slots=True)
class Taken(Generic[Payload]):
    """The batch of a step that is being computed, and what to go back to if it cannot be applied."""

    uses: list[Use[Payload]]
    pool: list[Pooled[tuple[Arrived[Payload], int]]]
    num_fills: int

    @property
    def fresh(self) -> list[Ticket]:
        return [use.ticket for use in self.uses if use.reuse_index == 0]
