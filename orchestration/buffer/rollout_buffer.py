"""Admission and order: what may be sampled now, what is trained on next, and its lag.

Lifecycle of a ticket: CLAIMED (claim) -> ARRIVED, scored (finish) -> IN USE, once or several times (take) -> gone.
With lag rule `drop` an arrived one may be DROPPED instead; its document is then claimed again, by another ticket.
There is no other way out. How many tickets may be claimed is counted in admission.py, which rollouts are used again
is decided in reuse.py, and the bound on lag, with its proof for every rule, is in lag_rule.py. With A = prefetch_steps,
at most planned(v + 1 + A) - planned(v) tickets, A + 1 steps of them, are alive between two steps: this bounds every
queue.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.rollout import Document, Ticket, WeightSteps
from orchestration.buffer import event_log
from orchestration.buffer.admission import AdmissionPlan
from orchestration.buffer.lag_rule import LAG_RULES, Candidate, Demand, too_old
from orchestration.buffer.reuse import ReusePool

Payload = TypeVar("Payload")
Record = Callable[[dict[str, object]], None]


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
class Use(Generic[Payload]):
    """A rollout in a batch: what the learner takes, and what it needs to know about it."""

    ticket: Ticket
    payload: Payload
    reuse_index: int
    """0: its first use."""
    lag: Lag


@dataclass(frozen=True, slots=True)
class _Arrived(Generic[Payload]):
    """A finished ticket."""

    ticket: Ticket
    payload: Payload
    version: int
    arrived_at: int
    arrival: int

    def use(self, *, step: int, first_step: int, reuse_index: int) -> Use[Payload]:
        in_flight = self.arrived_at - self.version
        lag = Lag(in_flight=in_flight, in_queue=first_step - self.arrived_at, reuse=step - first_step)
        return Use(ticket=self.ticket, payload=self.payload, reuse_index=reuse_index, lag=lag)


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
        pool: ReusePool[tuple[_Arrived[Payload], int]],
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
        self._num_claimed = self._num_requests = self._num_arrived = 0
        self.num_dropped = 0
        """Rollouts that were stale on arrival, since the start."""
        self._returned: deque[Document] = deque()
        self._claimed: dict[int, tuple[Ticket, int]] = {}
        self._arrived: dict[int, _Arrived[Payload]] = {}
        self._lock = asyncio.Lock()
        self._opened = asyncio.Condition(self._lock)
        """Admission may be wider, or the run over."""
        self._filled = asyncio.Condition(self._lock)
        """More has arrived."""

    @property
    def num_alive(self) -> int:
        """Tickets claimed and not yet trained on."""
        return len(self._claimed) + len(self._arrived)

    @property
    def num_scored(self) -> int:
        """Tickets that wait for their first use."""
        return len(self._arrived)

    @property
    def num_expired(self) -> int:
        """Rollouts that exceeded max_reuse_lag before their last use, since the start."""
        return self._pool.num_expired

    @property
    def oldest_wanted_version(self) -> int:
        """No ticket, claimed or to come, will ask for weights older than these."""
        demanded = [t.max_policy_version for t, _ in self._claimed.values() if t.max_policy_version is not None]
        exact = self._lag_rule == "exact"
        to_come = max(0, self._published_version - self._max_lag) if exact else self._published_version
        return min([*demanded, to_come])

    async def claim(self, count: int) -> list[Ticket]:
        """One request: 1 to `count` new tickets, as soon as the lag bound admits any; empty after the last step."""
        async with self._lock:
            await self._opened.wait_for(lambda: self._over or self._num_free > 0)
            if self._over:
                return []
            first, request = self._num_claimed, self._num_requests
            count = min(count, self._num_free)
            if self._lag_rule == "exact":  # one request, one version: no request reaches into another step
                count = self._plan.num_in_same_step(first, count)
            self._num_claimed += count
            self._num_requests += 1
            tickets = [self._ticket(first + k, document) for k, document in enumerate(self._documents(count))]
            self._claimed |= {ticket.ticket_id: (ticket, request) for ticket in tickets}
            return tickets

    async def finish(self, ticket: Ticket, payload: Payload, *, version: int, weight_steps: WeightSteps) -> None:
        """A ticket was scored; the oldest weights that sampled it are of this version, and those its request saw are
        logged.

        Raises: RuntimeError if it was not claimed, or was finished before: no rollout may count twice.
        """
        async with self._lock:
            if ticket.ticket_id not in self._claimed:
                state = "finished twice" if ticket.ticket_id < self._num_claimed else "never claimed"
                raise RuntimeError(f"ticket {ticket.ticket_id} was {state}; each one is sampled once")
            _, request = self._claimed.pop(ticket.ticket_id)
            self._record(event_log.sampled(request, ticket, version=version, weight_steps=weight_steps))
            self._arrived[ticket.ticket_id] = _Arrived(
                ticket, payload, version, self._published_version, self._num_arrived
            )
            self._num_arrived += 1
            self._drop_stale()
            self._filled.notify_all()

    async def take(self) -> list[Use[Payload]]:
        """The next step's rollouts, fresh ones first, as soon as the lag rule has a batch of them."""
        async with self._lock:
            self._pool.expire(self._step)
            self._plan = self._plan.awaiting(self._step, self._pool.num_wanted)
            self._drop_stale()
            self._opened.notify_all()
            while (chosen := self._choice()) is None:
                await self._filled.wait()
            step = self._step
            fresh = [self._arrived.pop(ticket_id) for ticket_id in chosen]
            again = self._pool.draw(step)
            self._pool.enter([((one, step), one.version) for one in fresh], step=step)
            self._step, self._plan = step + 1, self._plan.batch_taken()
            self._opened.notify_all()
            uses = [one.use(step=step, first_step=step, reuse_index=0) for one in fresh]
            uses += [one.use(step=step, first_step=first, reuse_index=index) for (one, first), index in again]
        self._record(event_log.trained(step, [(use.ticket.ticket_id, use.reuse_index) for use in uses]))
        return uses

    async def advance(self, published_version: int) -> None:
        """Weights of this version can be pulled from now on: admission opens by one step's tickets."""
        async with self._lock:
            if published_version <= self._published_version:
                raise RuntimeError(f"published version {published_version} after {self._published_version}; must rise")
            self._published_version = published_version
            self._opened.notify_all()

    @property
    def _over(self) -> bool:
        return self._step == self._num_steps

    @property
    def _num_free(self) -> int:
        return self._plan.admitted(self._published_version) - self._num_claimed

    def _documents(self, count: int) -> list[Document]:
        again = [self._returned.popleft() for _ in range(min(count, len(self._returned)))]
        return again + self._next_documents(count - len(again))

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

    def _demand(self) -> Demand:
        count = self._pool.num_wanted
        return Demand(step=self._step, count=count, later=self._pool.num_fresh, max_lag=self._max_lag)

    def _candidates(self) -> list[Candidate]:
        coming = [Candidate(i, t.min_policy_version, None) for i, (t, _) in self._claimed.items()]
        return coming + self._arrived_candidates()

    def _arrived_candidates(self) -> list[Candidate]:
        return [Candidate(i, one.version, one.arrival) for i, one in self._arrived.items()]

    def _ticket(self, ticket_id: int, document: Document) -> Ticket:
        due = max(0, self._plan.step_of(ticket_id) - self._max_lag)
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
