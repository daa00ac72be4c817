"""Admission, order and lag: who may be sampled now, and what is trained on next.

Tickets are numbered; ticket i is trained on in learner step i // D (D documents a step), in order, always. A ticket is
admitted only while

    i < (published_version + 1 + max_lag) * D.

Bound: let ticket i be trained on in step s = i // D, whose weights before the update are version s. When it was
admitted the published version v satisfied i < (v + 1 + max_lag) * D, hence s <= v + max_lag. Its worker samples with
weights at least as new as v (the ticket says so and the worker refuses otherwise), so its lag is at most
s - v <= max_lag. With max_lag = 0 nothing of step s + 1 is sampled before step s is published: the synchronous
algorithm. At most (max_lag + 1) * D tickets are alive, which bounds every queue.

Lifecycle of a ticket: ADMITTED (claim) -> SCORED (finish) -> TRAINED (take); nothing leaves it any other way.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.rollout import Document, Ticket

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Scored(Generic[Payload]):
    """A finished ticket: what the learner takes, and the controller's metadata about it."""

    ticket: Ticket
    payload: Payload


class RolloutBuffer(Generic[Payload]):
    """Hands out tickets within the lag bound and gives them back, scored, in their order."""

    def __init__(
        self,
        next_documents: Callable[[int], list[Document]],
        *,
        documents_per_step: int,
        num_steps: int,
        max_lag: int,
        completions_per_context: int,
        seed: int,
    ) -> None:
        self._next_documents = next_documents
        self._documents_per_step = documents_per_step
        self._num_tickets = num_steps * documents_per_step
        self._max_lag = max_lag
        self._completions_per_context = completions_per_context
        self._seed = seed
        self._published_version = 0
        self._num_admitted = 0
        self._num_trained = 0
        self._scored: dict[int, Scored[Payload]] = {}
        self._changed = asyncio.Condition()

    @property
    def num_alive(self) -> int:
        """Tickets admitted and not yet trained on; at most (max_lag + 1) * documents_per_step."""
        return self._num_admitted - self._num_trained

    @property
    def num_scored(self) -> int:
        """Tickets that wait for the learner."""
        return len(self._scored)

    async def claim(self, count: int) -> list[Ticket]:
        """1 to `count` new tickets, as soon as the lag bound admits any; empty once every ticket of the run is out."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._exhausted or self._num_free > 0)
            count = min(count, self._num_free)
            first = self._num_admitted
            self._num_admitted += count
            return [self._ticket(first + k, document) for k, document in enumerate(self._next_documents(count))]

    async def finish(self, ticket: Ticket, payload: Payload) -> None:
        """A ticket was sampled and scored.

        Raises: RuntimeError if it was finished or trained on before: no rollout may count twice.
        """
        async with self._changed:
            if ticket.ticket_id >= self._num_admitted:
                raise RuntimeError(f"ticket {ticket.ticket_id} was never admitted; {self._num_admitted} were")
            if ticket.ticket_id in self._scored or ticket.ticket_id < self._num_trained:
                raise RuntimeError(f"ticket {ticket.ticket_id} was finished twice; each rollout is trained on once")
            self._scored[ticket.ticket_id] = Scored(ticket, payload)
            self._changed.notify_all()

    async def take(self) -> list[Scored[Payload]]:
        """The next step's documents, in ticket order, as soon as the last of them is scored."""
        async with self._changed:
            wanted = range(self._num_trained, self._num_trained + self._documents_per_step)
            await self._changed.wait_for(lambda: all(i in self._scored for i in wanted))
            self._num_trained += self._documents_per_step
            return [self._scored.pop(i) for i in wanted]

    async def advance(self, published_version: int) -> None:
        """Weights of this version can be pulled from now on: admission opens by one step's tickets."""
        async with self._changed:
            if published_version <= self._published_version:
                raise RuntimeError(f"published version {published_version} after {self._published_version}; must rise")
            self._published_version = published_version
            self._changed.notify_all()

    @property
    def _exhausted(self) -> bool:
        return self._num_admitted == self._num_tickets

    @property
    def _num_free(self) -> int:
        open_until = (self._published_version + 1 + self._max_lag) * self._documents_per_step
        return min(open_until, self._num_tickets) - self._num_admitted

    def _ticket(self, ticket_id: int, document: Document) -> Ticket:
        step = ticket_id // self._documents_per_step
        return Ticket(
            ticket_id=ticket_id,
            document=document,
            seed=self._seed * 1_000_003 + ticket_id,
            completions_per_context=self._completions_per_context,
            min_policy_version=max(0, step - self._max_lag),
        )
