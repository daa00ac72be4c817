"""The buffer of a replay: the same methods as RolloutBuffer, every decision taken from a log.

A request is handed out as soon as all versions that sampled it are published, in the order in which requests are
needed; it names them, so its worker begins with the first even if newer ones exist, and loads the others before the
same engine steps as in the run (rollout.in_flight_updates = keep). Batches are composed as they were.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from actors.rollout import Document, Ticket, WeightSteps
from orchestration.buffer import event_log
from orchestration.buffer.accounting import Account
from orchestration.buffer.event_log import LoggedRequest, LoggedTicket, Recording
from orchestration.buffer.rollout_buffer import Record, ticket_seed
from orchestration.buffer.uses import Arrival, Lag, Use

Payload = TypeVar("Payload")


class ReplayBuffer(Generic[Payload]):
    """Hands out the tickets of a log and returns their scored rollouts in the batches of the log."""

    def __init__(
        self,
        recording: Recording,
        documents: Iterable[Document],
        *,
        num_steps: int,
        completions_per_context: int,
        seed: int,
        record: Record = lambda event: None,
    ) -> None:
        """`documents`: all of the training split. `record` receives every decision, as in the run.

        Raises: ValueError if the log names a document that is not among them.
        """
        self._batches = recording.batches[:num_steps]
        self._first_step: dict[int, int] = {}
        for step, batch in enumerate(self._batches):
            for ticket_id, _ in batch:
                self._first_step.setdefault(ticket_id, step)
        self._last_use = {ticket_id: step for step, batch in enumerate(self._batches) for ticket_id, _ in batch}
        self._waiting = sorted(self._used(recording.requests), key=self._needed_in)
        self._documents = _by_id(documents, self._waiting, recording)
        self._completions_per_context, self._seed = completions_per_context, seed
        self._record = record
        self._published_version = self._step = 0
        self._versions = {ticket.ticket_id: ticket.version for r in self._waiting for ticket in r.tickets}
        self._document_of = {t.ticket_id: t.document_id for request in self._waiting for t in request.tickets}
        """With which each is trained on: a ticket may have been sampled with another one before, that was set aside."""
        self._sampling: dict[tuple[int, str], LoggedRequest] = {}
        self._arrived: dict[int, tuple[Ticket, Payload]] = {}
        self._changed = asyncio.Condition()
        self._issued: set[int] = set()
        self._trained: set[int] = set()
        self.num_dropped = self.num_expired = 0

    @property
    def num_alive(self) -> int:
        """Tickets handed out and not yet used for the last time."""
        return len(self._sampling) + len(self._arrived)

    @property
    def num_scored(self) -> int:
        """Rollouts that wait for a use."""
        return len(self._arrived)

    @property
    def account(self) -> Account:
        """Where the tickets are that were handed out."""
        issued, trained = len(self._issued), len(self._trained)
        return Account(issued=issued, trained=trained, failed=0, dropped=0, pending=issued - trained)

    @property
    def oldest_wanted_version(self) -> int:
        """No ticket, handed out or to come, will ask for weights older than these."""
        requests = [*self._sampling.values(), *self._waiting]
        return min([self._published_version, *(request.oldest_version for request in requests)])

    async def claim(self, count: int) -> list[Ticket]:
        """The next request of the log, whatever `count`, once its weights are published; empty after the last one."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._waiting or self._ready() is not None)
            request = self._ready()
            if request is None:
                return []
            self._waiting.remove(request)
            self._sampling |= {(ticket.ticket_id, ticket.document_id): request for ticket in request.tickets}
            self._issued |= {ticket.ticket_id for ticket in request.tickets}
            tickets = [self._ticket(ticket, request.weight_steps) for ticket in request.tickets]
            self._record(event_log.claimed(request.number, tickets))
            return tickets

    async def give_back(self, tickets: Sequence[Ticket], *, error: str) -> None:
        """Raises: RuntimeError always: who restarts a replay loses nothing."""
        raise RuntimeError(f"a process of this replay failed: {error}; start the replay again")

    async def settle(self) -> None:
        """Returns at once: a replay has no checkpoints."""

    async def reject(self, *, error: str) -> None:
        """Raises: RuntimeError always: the run applied this step."""
        raise RuntimeError(f"step {self._step} of the log cannot be applied in its replay: {error}")

    async def finish(self, request: Sequence[Arrival[Payload]]) -> None:
        """Tickets were sampled and scored; those that the run never trained on are not kept.

        Raises: RuntimeError if one was sampled by other weights than in the log, or was not handed out.
        """
        async with self._changed:
            for arrival in request:
                self._arrive(arrival)
            self._changed.notify_all()

    async def take(self) -> list[Use[Payload]]:
        """The next batch of the log, as soon as all of it has arrived."""
        async with self._changed:
            batch, step = self._batches[self._step], self._step
            await self._changed.wait_for(lambda: all(ticket_id in self._arrived for ticket_id, _ in batch))
            uses = [self._use(ticket_id, reuse_index, step) for ticket_id, reuse_index in batch]
            for ticket_id, _ in batch:
                if self._last_use[ticket_id] == step:
                    del self._arrived[ticket_id]
            self._step += 1
            self._record(event_log.trained(step, batch))
            self._trained |= {ticket_id for ticket_id, _ in batch}
            return uses

    async def advance(self, published_version: int) -> None:
        """Weights of this version can be pulled from now on."""
        async with self._changed:
            self._published_version = published_version
            self._changed.notify_all()

    def _arrive(self, arrival: Arrival[Payload]) -> None:
        ticket, version, weight_steps = arrival.ticket, arrival.version, arrival.weight_steps
        document_id = ticket.document.document_id
        request = self._sampling.pop((ticket.ticket_id, document_id), None)
        if request is None:
            raise RuntimeError(f"ticket {ticket.ticket_id} was not being sampled; each one is handed out once")
        logged = next(t for t in request.tickets if t.ticket_id == ticket.ticket_id)
        if (weight_steps, version) != (request.weight_steps, logged.version):
            raise RuntimeError(
                f"the request of ticket {ticket.ticket_id} saw weights at (engine step, version) "
                f"{list(weight_steps)}, the oldest of its tokens is of version {version}; the log says "
                f"{list(request.weight_steps)} and {logged.version}"
            )
        self._record(event_log.sampled(request.number, ticket, version=version, weight_steps=weight_steps))
        if ticket.ticket_id in self._first_step and document_id == self._document_of[ticket.ticket_id]:
            self._arrived[ticket.ticket_id] = (ticket, arrival.payload)

    def _used(self, requests: list[LoggedRequest]) -> list[LoggedRequest]:
        return [r for r in requests if any(ticket.ticket_id in self._first_step for ticket in r.tickets)]

    def _needed_in(self, request: LoggedRequest) -> int:
        ids = [ticket.ticket_id for ticket in request.tickets]
        return min(self._first_step[ticket_id] for ticket_id in ids if ticket_id in self._first_step)

    def _ready(self) -> LoggedRequest | None:
        return next((r for r in self._waiting if r.newest_version <= self._published_version), None)

    def _ticket(self, logged: LoggedTicket, weight_steps: WeightSteps) -> Ticket:
        _, first_version = weight_steps[0]
        return Ticket(
            ticket_id=logged.ticket_id,
            document=self._documents[logged.document_id],
            seed=ticket_seed(self._seed, logged.ticket_id),
            completions_per_context=self._completions_per_context,
            min_policy_version=first_version,
            max_policy_version=first_version,
            weight_steps=weight_steps,
        )

    def _use(self, ticket_id: int, reuse_index: int, step: int) -> Use[Payload]:
        ticket, payload = self._arrived[ticket_id]
        first = self._first_step[ticket_id]
        # A replay does not repeat how the lag before the first use came about.
        lag = Lag(in_flight=0, in_queue=first - self._versions[ticket_id], reuse=step - first)
        return Use(ticket=ticket, payload=payload, reuse_index=reuse_index, lag=lag)


def _by_id(documents: Iterable[Document], requests: list[LoggedRequest], recording: Recording) -> dict[str, Document]:
    wanted = {ticket.document_id for request in requests for ticket in request.tickets}
    found = {document.document_id: document for document in documents if document.document_id in wanted}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"{recording.path} names {len(missing)} documents that the data does not hold, such as {missing[0]!r}; the "
            "data has changed since that run"
        )
    return found
