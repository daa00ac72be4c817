"""Admission and order: what may be sampled now, what is trained on next, and its lag.

Lifecycle of a ticket: CLAIMED (claim) -> ARRIVED, scored (finish) -> IN USE, once or several times (take, advance) ->
gone. What its process could not finish is CLAIMED again (give_back, claims.py). With lag rule `drop` an arrived one may
be DROPPED; its document is then claimed again, by another ticket. A document that fails too often, or that was in a
step that could not be applied (reject), is set aside: FAILED; its ticket is claimed again with another. There is no
other way out, which accounting.py checks. How many tickets may be claimed is counted in admission.py, which rollouts
are used again is decided in reuse.py, and the bound on lag, with its proof for every rule, is in lag_rule.py. With
A = prefetch_steps, at most planned(v + 1 + A) - planned(v) tickets, A + 1 steps of them, are alive between two steps:
this bounds every queue.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from actors.rollout import Document, Ticket
from orchestration.buffer import event_log
from orchestration.buffer.accounting import Account
from orchestration.buffer.admission import AdmissionPlan
from orchestration.buffer.buffer_state import ArrivedTicket, BufferState, PooledTicket
from orchestration.buffer.claims import Claims
from orchestration.buffer.lag_rule import LAG_RULES, Candidate, Demand, too_old
from orchestration.buffer.reuse import Pooled, ReusePool
from orchestration.buffer.uses import Arrival, Arrived, Taken, Use

Payload = TypeVar("Payload")
Record = Callable[[dict[str, object]], None]


def ticket_seed(run_seed: int, ticket_id: int) -> int:
    """Seed of a ticket's completions: distinct within a run, and between runs for their first 1,000,003 tickets.

    Ticket 1,000,003 + i has the seed of ticket i of the run whose seed is one higher.
    """
    return run_seed * 1_000_003 + ticket_id


class RolloutBuffer(Generic[Payload]):
    """Hands out tickets within the lag bound and returns their scored rollouts batch by batch."""

    def __init__(
        self,
        next_documents: Callable[[int], list[Document]],
        *,
        pool: ReusePool[tuple[Arrived[Payload], int]],
        num_steps: int,
        lag_rule: str,
        max_lag: int,
        prefetch_steps: int,
        completions_per_context: int,
        seed: int,
        record: Record = lambda event: None,
    ) -> None:
        """`lag_rule` is a key of LAG_RULES; `record` receives whatever a replay needs."""
        self._next_documents = next_documents
        self._pool, self._num_steps = pool, num_steps
        self._plan = AdmissionPlan(
            num_steps=num_steps,
            prefetch_steps=prefetch_steps,
            first_step=pool.documents_per_step,
            later_steps=pool.num_fresh,
        )
        self._lag_rule, self._max_lag = lag_rule, max_lag
        self._completions_per_context, self._seed = completions_per_context, seed
        self._record = record
        self._published_version = 0
        self._step = 0
        self._num_claimed = self._num_issued = self._num_trained = self._num_arrived = 0
        self.num_dropped = 0
        """Rollouts that were stale on arrival, since the start."""
        self.num_failed = 0
        """Documents that were set aside, since the start."""
        self._returned: deque[Document] = deque()
        self._set_aside: set[str] = set()
        self._claims = Claims()
        self._arrived: dict[int, Arrived[Payload]] = {}
        self._taken: Taken[Payload] | None = None
        self._lock = asyncio.Lock()
        self._opened = asyncio.Condition(self._lock)
        """Admission may be wider, or the run over."""
        self._filled = asyncio.Condition(self._lock)
        """More has arrived."""

    @property
    def num_alive(self) -> int:
        """Tickets claimed and not yet trained on."""
        return len(self._claims) + len(self._arrived)

    @property
    def num_scored(self) -> int:
        """Tickets that wait for their first use."""
        return len(self._arrived)

    @property
    def account(self) -> Account:
        """Where all tickets are."""
        in_use = len(self._taken.fresh) if self._taken is not None else 0
        return Account(
            issued=self._num_issued,
            trained=self._num_trained,
            failed=self.num_failed,
            dropped=self.num_dropped,
            pending=self.num_alive + in_use,
        )

    @property
    def num_expired(self) -> int:
        """Rollouts that exceeded max_reuse_lag before their last use, since the start."""
        return self._pool.num_expired

    @property
    def oldest_wanted_version(self) -> int:
        """No ticket, claimed or to come, will ask for weights older than these."""
        demanded = [t.max_policy_version for t in self._claims.tickets if t.max_policy_version is not None]
        exact = self._lag_rule == "exact"
        to_come = max(0, self._published_version - self._max_lag) if exact else self._published_version
        return min([*demanded, to_come])

    async def claim(self, count: int) -> list[Ticket]:
        """One request: one that was given back, or 1 to `count` new tickets as soon as the lag bound admits any; empty
        after the last step."""
        async with self._lock:
            await self._opened.wait_for(lambda: self._over or self._claims.has_back or self._num_free > 0)
            if self._over:
                return []
            request = self._claims.hand_out_again() if self._claims.has_back else None
            request = request or self._claims.hand_out(self._new_tickets(count))
            self._record(event_log.claimed(request.number, request.tickets))
            return list(request.tickets)

    async def give_back(self, tickets: Sequence[Ticket], *, error: str) -> None:
        """The process that was to finish these tickets could not: they are claimed again, with the same seeds."""
        async with self._lock:
            self._record(event_log.returned(tickets, error=error))
            failed = self._claims.failing_too_often(tickets)
            failed_ids = {ticket.ticket_id for ticket in failed}
            self._set_aside |= {ticket.document.document_id for ticket in failed}
            for ticket in failed:
                self._issue_again(ticket, error=error)
            self._claims.give_back([ticket for ticket in tickets if ticket.ticket_id not in failed_ids])
            self._opened.notify_all()

    async def finish(self, request: Sequence[Arrival[Payload]]) -> None:
        """The tickets of a request were scored, all or none.

        Raises: RuntimeError if one was not claimed, or was finished before: no rollout may count twice.
        """
        async with self._lock:
            for arrival in request:
                self._arrive(arrival)
            self._drop_stale()
            self._filled.notify_all()

    async def take(self) -> list[Use[Payload]]:
        """The next step's rollouts, fresh ones first, as soon as the lag rule has a batch of them.

        `advance` follows when the step is applied and published, `reject` if it cannot be applied.
        """
        async with self._lock:
            self._pool.expire(self._step)
            self._plan = self._plan.awaiting(self._step, self._pool.num_wanted)
            self._drop_stale()
            self._opened.notify_all()
            while (chosen := self._choice()) is None:
                await self._filled.wait()
            step, pool, num_fills = self._step, self._pool.pooled, self._plan.num_fills
            fresh = [self._arrived.pop(ticket_id) for ticket_id in chosen]
            again = self._pool.draw(step)
            self._pool.enter([((one, step), one.version) for one in fresh], step=step)
            self._step, self._plan = step + 1, self._plan.batch_taken()
            self._opened.notify_all()
            uses = [one.use(step=step, first_step=step, reuse_index=0) for one in fresh]
            uses += [one.use(step=step, first_step=first, reuse_index=index) for (one, first), index in again]
            self._taken = Taken(uses, pool, num_fills)
        self._record(event_log.trained(step, [(use.ticket.ticket_id, use.reuse_index) for use in uses]))
        return uses

    async def advance(self, published_version: int) -> None:
        """Weights of this version can be pulled from now on: admission opens by one step's tickets."""
        async with self._lock:
            if published_version <= self._published_version:
                raise RuntimeError(f"published version {published_version} after {self._published_version}; must rise")
            self._published_version = published_version
            if self._taken is not None:
                self._num_trained += len(self._taken.fresh)
                self._taken = None
            self._opened.notify_all()

    async def reject(self, *, error: str) -> None:
        """The batch that was taken last could not be applied: the same step takes another.

        Its fresh tickets are claimed again with other documents; what it used again is used again.
        """
        async with self._lock:
            taken, self._taken = self._taken, None
            assert taken is not None, "a batch that was taken is rejected"
            self._step -= 1
            self._plan = replace(self._plan, num_fills=taken.num_fills)
            self._pool.restore(taken.pool)
            self._record(event_log.rejected(self._step, [u.ticket.ticket_id for u in taken.uses], error=error))
            for ticket in taken.fresh:
                self._issue_again(ticket, error=error)
            self._opened.notify_all()

    async def settle(self) -> None:
        """Returns when no ticket, claimed or to come, demands weights older than the newest: a checkpoint holds those.

        Tickets must be claimed and finished meanwhile.
        """
        async with self._lock:
            await self._filled.wait_for(self._demands_newest_only)

    def state(self) -> tuple[BufferState, list[Payload]]:
        """Between two steps: all that `restore` needs; the payloads are of `arrived`, then of `pool`."""
        assert self._taken is None, "no state in the middle of a step"
        arrived, pooled = list(self._arrived.values()), self._pool.pooled
        state = BufferState(
            step=self._step,
            num_extra=self._plan.num_extra,
            num_fills=self._plan.num_fills,
            num_claimed=self._num_claimed,
            num_issued=self._num_issued,
            num_trained=self._num_trained,
            num_arrived=self._num_arrived,
            num_dropped=self.num_dropped,
            num_failed=self.num_failed,
            num_expired=self.num_expired,
            num_requests=self._claims.num_requests,
            failures=sorted(self._claims.failures.items()),
            set_aside=sorted(self._set_aside),
            returned=list(self._returned),
            requests=self._claims.requests,
            arrived=[one.told for one in arrived],
            pool=[PooledTicket(p.item[0].told, p.item[1], p.num_uses, p.max_uses) for p in pooled],
        )
        return state, [one.payload for one in arrived] + [p.item[0].payload for p in pooled]

    def restore(self, state: BufferState, payloads: Sequence[Payload]) -> None:
        """As another buffer was, before anything else; what was claimed there is claimed again here."""
        self._step = self._published_version = state.step
        self._plan = replace(self._plan, num_extra=state.num_extra, num_fills=state.num_fills)
        self._num_claimed, self._num_issued = state.num_claimed, state.num_issued
        self._num_trained, self._num_arrived = state.num_trained, state.num_arrived
        self.num_dropped, self.num_failed = state.num_dropped, state.num_failed
        self._returned, self._set_aside = deque(state.returned), set(state.set_aside)
        self._claims.restore(state.requests, num_requests=state.num_requests, failures=dict(state.failures))
        brought = [Arrived(told, payload) for told, payload in zip(state.all_arrived, payloads, strict=True)]
        self._arrived = {one.ticket.ticket_id: one for one in brought[: len(state.arrived)]}
        again = zip(state.pool, brought[len(state.arrived) :], strict=True)
        pool = [Pooled((one, p.first_step), one.version, p.num_uses, p.max_uses) for p, one in again]
        self._pool.restore(pool, num_expired=state.num_expired)

    @property
    def _over(self) -> bool:
        return self._published_version >= self._num_steps

    @property
    def _num_free(self) -> int:
        return self._plan.admitted(self._published_version) - self._num_claimed

    def _arrive(self, arrival: Arrival[Payload]) -> None:
        ticket, version = arrival.ticket, arrival.version
        try:
            request = self._claims.arrive(ticket)
        except KeyError as error:
            state = "finished twice" if ticket.ticket_id < self._num_claimed else "never claimed"
            raise RuntimeError(f"ticket {ticket.ticket_id} was {state}; each one is sampled once") from error
        self._record(event_log.sampled(request, ticket, version=version, weight_steps=arrival.weight_steps))
        told = ArrivedTicket(ticket, version, arrived_at=self._published_version, arrival=self._num_arrived)
        self._arrived[ticket.ticket_id] = Arrived(told, arrival.payload)
        self._num_arrived += 1

    def _new_tickets(self, count: int) -> list[Ticket]:
        first, count = self._num_claimed, min(count, self._num_free)
        if self._lag_rule == "exact":  # one request, one version: no request reaches into another step
            count = self._plan.num_in_same_step(first, count)
        self._num_claimed += count
        self._num_issued += count
        return [self._ticket(first + k, document) for k, document in enumerate(self._documents(count))]

    def _documents(self, count: int) -> list[Document]:
        again = [self._returned.popleft() for _ in range(min(count, len(self._returned)))]
        return again + [self._usable_document() for _ in range(count - len(again))]

    def _usable_document(self) -> Document:
        """The next that was not set aside."""
        for _ in range(2 * len(self._set_aside) + 1):  # as many as two epochs have in a row, if there is another
            document = self._next_documents(1)[0]
            if document.document_id not in self._set_aside:
                return document
        raise RuntimeError(
            f"all {len(self._set_aside)} documents of the training split have failed; events.jsonl says with what error"
        )

    def _issue_again(self, ticket: Ticket, *, error: str) -> None:
        """With another document: this one is done with."""
        self.num_failed += 1
        self._num_issued += 1
        self._record(event_log.failed(ticket, error=error))
        self._claims.replace(ticket, replace(ticket, document=self._documents(1)[0]))

    def _drop_stale(self) -> None:
        if self._lag_rule != "drop":
            return
        dropped = too_old(self._demand(), self._arrived_candidates())
        for ticket_id in dropped:
            old = self._arrived.pop(ticket_id)
            self._returned.append(old.ticket.document)
            self.num_dropped += 1
            self._record(event_log.dropped(old.ticket, version=old.version))
        if dropped:
            self._plan = self._plan.replacing(len(dropped))
            self._opened.notify_all()

    def _choice(self) -> list[int] | None:
        if len(self._arrived) < self._pool.num_wanted:  # no rule takes fewer, and most calls end here
            return None
        return LAG_RULES[self._lag_rule](self._demand(), self._candidates())

    def _demands_newest_only(self) -> bool:
        newest, coming = self._published_version, self._num_claimed < self._plan.admitted(self._num_steps)
        if self._lag_rule == "exact" and coming and self._due(self._num_claimed) < newest:
            return False
        return all(t.max_policy_version is None or t.max_policy_version >= newest for t in self._claims.tickets)

    def _demand(self) -> Demand:
        count = self._pool.num_wanted
        return Demand(step=self._step, count=count, later=self._pool.num_fresh, max_lag=self._max_lag)

    def _candidates(self) -> list[Candidate]:
        coming = [Candidate(t.ticket_id, t.min_policy_version, None) for t in self._claims.tickets]
        return coming + self._arrived_candidates()

    def _arrived_candidates(self) -> list[Candidate]:
        return [Candidate(i, one.version, one.told.arrival) for i, one in self._arrived.items()]

    def _due(self, ticket_id: int) -> int:
        """The oldest weights that may sample the ticket that is claimed next, if it keeps to the plan."""
        return max(0, self._plan.step_of(ticket_id) - self._max_lag)

    def _ticket(self, ticket_id: int, document: Document) -> Ticket:
        due = self._due(ticket_id)
        # A fill is needed now, and the newer it is the longer it can be reused.
        planned = self._lag_rule in ("in_order", "exact") and self._plan.num_fills == 0
        return Ticket(
            ticket_id=ticket_id,
            document=document,
            seed=ticket_seed(self._seed, ticket_id),
            completions_per_context=self._completions_per_context,
            min_policy_version=due if planned else self._published_version,
            max_policy_version=due if self._lag_rule == "exact" else None,
        )
