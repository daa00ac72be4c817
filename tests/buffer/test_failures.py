"""Processes that fail, documents that fail, steps that cannot be applied, and a buffer that continues another's work.

In many random schedules: the lag bound holds as without failures, and the account of the buffer's counters is that of
its event log, read by other code.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from arrivals import finish

from actors.data.documents import DocumentStream
from actors.rollout import Document, Ticket
from orchestration.buffer.accounting import Account, audit, require_balanced
from orchestration.buffer.claims import MAX_FAILURES
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Use

MakeDocument = Callable[[int], Document]
NUM_STEPS = 8
DOCUMENTS_PER_STEP = 4


@dataclass(frozen=True)
class Conditions:
    """How often what goes wrong."""

    lag_rule: str
    seed: int
    max_lag: int = 2
    max_uses: int = 1
    worker_failures: float = 0.0
    """Share of requests whose worker fails."""
    rejections: float = 0.0
    """Share of steps that cannot be applied."""
    poison: frozenset[str] = frozenset()
    """Documents that no worker survives."""
    num_documents: int = 30
    stop_after: int = NUM_STEPS
    """Steps after which the run is stopped."""


@dataclass
class Run:
    """Two workers and a learner on one event loop, with random pauses."""

    conditions: Conditions
    documents: list[Document]
    events: list[dict[str, object]] = field(default_factory=list)
    batches: list[list[Use[int]]] = field(default_factory=list)
    position: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.conditions.seed)
        self.stream = DocumentStream(self.documents, seed=7, position=self.position)
        self.buffer = self.new_buffer()
        self.version = 0
        self.times_given_back: Counter[int] = Counter()
        self.stopping = asyncio.Event()

    def new_buffer(self) -> RolloutBuffer[int]:
        conditions = self.conditions
        pool = ReusePool(
            documents_per_step=DOCUMENTS_PER_STEP,
            max_uses=conditions.max_uses,
            max_reuse_lag=None,
            order="fifo",
            seed=0,
        )
        return RolloutBuffer(
            self.stream.take,
            pool=pool,
            num_steps=NUM_STEPS,
            lag_rule=conditions.lag_rule,
            max_lag=conditions.max_lag,
            prefetch_steps=conditions.max_lag,
            completions_per_context=3,
            seed=5,
            record=lambda row: self.events.append(json.loads(json.dumps(row))),
        )

    async def play(self) -> "Run":
        async with asyncio.timeout(60):
            workers = [asyncio.create_task(self.work(patience)) for patience in (3, 9)]
            await self.train()
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)
        return self

    async def work(self, patience: int) -> None:
        while tickets := await self.buffer.claim(3):
            await self.pause(patience)
            newest = self.version
            version = newest if tickets[0].max_policy_version is None else tickets[0].max_policy_version
            poisoned = any(ticket.document.document_id in self.conditions.poison for ticket in tickets)
            if poisoned or self.random.random() < self.conditions.worker_failures:
                self.times_given_back.update(ticket.ticket_id for ticket in tickets)
                await self.buffer.give_back(tickets, error="worker died")
                continue
            await self.pause(patience)
            for ticket in tickets:
                await finish(self.buffer, ticket, version, version=version)

    async def train(self) -> None:
        while self.version < self.conditions.stop_after:
            batch = await self.buffer.take()
            await self.pause(5)
            if self.random.random() < self.conditions.rejections:
                await self.buffer.reject(error="loss nan")
            else:
                self.batches.append(batch)
                self.version += 1
                await self.buffer.advance(self.version)
            self.require_balanced()

    def require_balanced(self) -> Account:
        account = self.buffer.account
        require_balanced(account, audit(self.events))
        return account

    async def pause(self, patience: int) -> None:
        for _ in range(self.random.randrange(patience + 1)):
            await asyncio.sleep(0)


def play(conditions: Conditions, make_document: MakeDocument) -> Run:
    documents = [make_document(index) for index in range(conditions.num_documents)]

    async def scenario() -> Run:
        return await Run(conditions, documents).play()

    return asyncio.run(scenario())


RULES = ["in_order", "wait", "drop", "exact", "free"]


@pytest.mark.parametrize("max_uses", [1, 2])
@pytest.mark.parametrize("lag_rule", RULES)
def test_every_ticket_ends_once_and_within_its_lag(lag_rule: str, max_uses: int, make_document: MakeDocument) -> None:
    failed = 0
    for seed in range(12):
        run = play(Conditions(lag_rule, seed, max_uses=max_uses, worker_failures=0.3, rejections=0.2), make_document)
        failed += run.require_balanced().failed
        assert [len(batch) for batch in run.batches] == [DOCUMENTS_PER_STEP] * NUM_STEPS
        uses = Counter((use.ticket.ticket_id, use.reuse_index) for batch in run.batches for use in batch)
        assert set(uses.values()) == {1}, "trained twice"
        for step, batch in enumerate(run.batches):
            fresh = [step - use.payload for use in batch if use.reuse_index == 0]
            assert all(use.lag.total == step - use.payload for use in batch)
            if lag_rule == "exact":
                assert set(fresh) <= {min(2, step)}
            elif lag_rule != "free":
                assert max(fresh, default=0) <= 2
    assert failed > 0


def test_a_worker_that_fails_changes_nothing_of_what_is_trained_on_in_exact_mode(make_document: MakeDocument) -> None:
    def trained(worker_failures: float, seed: int) -> list[list[tuple[int, int, str]]]:
        run = play(Conditions("exact", seed, worker_failures=worker_failures), make_document)
        assert run.buffer.account.failed == 0
        return [[(u.ticket.ticket_id, u.ticket.seed, u.ticket.document.document_id) for u in b] for b in run.batches]

    assert trained(0.15, seed=3) == trained(0.0, seed=4)


def test_a_request_that_failed_once_goes_out_as_it_was_and_then_ticket_by_ticket(make_document: MakeDocument) -> None:
    async def scenario() -> None:
        buffer = Run(Conditions("in_order", 0), [make_document(index) for index in range(30)]).buffer
        first = await buffer.claim(3)
        await buffer.give_back(first, error="died")
        again = await buffer.claim(1)
        assert ids(again) == ids(first) == [0, 1, 2]
        await buffer.give_back(again, error="died")
        assert [ids(await buffer.claim(3)) for _ in range(4)] == [[0], [1], [2], [3, 4, 5]]

    asyncio.run(scenario())


@pytest.mark.parametrize("lag_rule", RULES)
def test_documents_that_kill_workers_are_set_aside_and_their_neighbours_are_not(
    lag_rule: str, make_document: MakeDocument
) -> None:
    poison = frozenset(make_document(index).document_id for index in (3, 11, 17))
    run = play(Conditions(lag_rule, seed=1, poison=poison), make_document)
    failed = [row["document"] for row in run.events if row["event"] == "failed"]
    assert set(failed) <= poison and len(failed) == len(set(failed)) > 0
    trained = {use.ticket.document.document_id for batch in run.batches for use in batch}
    assert not trained & poison
    deaths = Counter(
        document
        for returned, claimed in returned_requests(run.events)
        for document in claimed
        if document in failed and returned
    )
    assert set(deaths.values()) == {MAX_FAILURES}


def returned_requests(events: list[dict[str, object]]) -> list[tuple[bool, list[str]]]:
    """(came back, documents) of each request that went out, by what followed it."""
    out: dict[tuple[int, ...], list[str]] = {}
    found = []
    for row in events:
        if row["event"] == "claimed":
            out[tuple(row["tickets"])] = row["documents"]
        elif row["event"] == "returned":
            found.append((True, out.pop(tuple(row["tickets"]))))
    return found


def test_a_run_whose_documents_all_fail_ends(make_document: MakeDocument) -> None:
    poison = frozenset(make_document(index).document_id for index in range(5))
    with pytest.raises(BaseException, match="all 5 documents of the training split have failed"):
        asyncio.run(killing(poison, [make_document(index) for index in range(5)]))


async def killing(poison: frozenset[str], documents: list[Document]) -> None:
    await Run(Conditions("in_order", 0, poison=poison), documents).work(1)


@pytest.mark.parametrize("max_uses", [1, 2])
@pytest.mark.parametrize("lag_rule", RULES)
def test_a_buffer_continues_where_another_was_left(lag_rule: str, max_uses: int, make_document: MakeDocument) -> None:
    """Stopped after any step, with rollouts that wait and requests that are out: all are accounted for."""
    documents = [make_document(index) for index in range(30)]

    async def scenario(stop_after: int, seed: int) -> None:
        conditions = Conditions(lag_rule, seed, max_uses=max_uses, worker_failures=0.2, stop_after=stop_after)
        first = await Run(conditions, documents).play()
        state, payloads = first.buffer.state()
        waiting = {t.ticket.ticket_id for t in state.arrived}
        out = {ticket.ticket_id for request in state.requests for ticket in request.tickets}
        after = Conditions(lag_rule, seed + 100, max_uses=max_uses)
        second = Run(after, documents, events=first.events, position=first.stream.position)
        second.buffer.restore(state, payloads)
        second.version = stop_after
        assert second.require_balanced() == first.buffer.account
        await second.play()
        resampled = {row["ticket"] for row in second.events[len(first.events) :] if row["event"] == "sampled"}
        assert not resampled & waiting
        used = {(u.ticket.ticket_id, u.reuse_index) for batch in first.batches + second.batches for u in batch}
        assert len(used) == NUM_STEPS * DOCUMENTS_PER_STEP
        if lag_rule in ("in_order", "exact") and max_uses == 1:
            assert {i for i, _ in used} == set(range(NUM_STEPS * DOCUMENTS_PER_STEP)) >= out | waiting

    for seed, stop_after in enumerate((0, 1, 3, 6, NUM_STEPS)):
        asyncio.run(scenario(stop_after, seed))


def test_a_rejected_step_is_taken_again_with_other_documents(make_document: MakeDocument) -> None:
    async def scenario() -> None:
        run = Run(Conditions("in_order", 0, max_uses=2), [make_document(index) for index in range(30)])
        buffer = run.buffer
        for ticket in await buffer.claim(4):
            await finish(buffer, ticket, 0)
        await buffer.take()
        await buffer.advance(1)
        for ticket in await buffer.claim(2):
            await finish(buffer, ticket, 1, version=1)
        batch = await buffer.take()
        fresh = {u.ticket.ticket_id: u.ticket.document.document_id for u in batch if u.reuse_index == 0}
        again = {(u.ticket.ticket_id, u.reuse_index) for u in batch if u.reuse_index > 0}
        await buffer.reject(error="the loss is nan")
        run.require_balanced()
        for _ in fresh:
            (ticket,) = await buffer.claim(4)
            assert fresh[ticket.ticket_id] != ticket.document.document_id
            await finish(buffer, ticket, 1, version=1)
        second = {(u.ticket.ticket_id, u.reuse_index) for u in await buffer.take()}
        assert second == again | {(ticket_id, 0) for ticket_id in fresh}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ([("sampled", 0)], 1),
        ([("claimed", 0), ("sampled", 0), ("sampled", 0)], 3),
        ([("claimed", 0), ("trained", 0, 0)], 2),
        ([("claimed", 0), ("sampled", 0), ("trained", 0, 0), ("trained", 1, 0)], 4),
        ([("claimed", 0), ("sampled", 0), ("trained", 1, 0)], 3),
        ([("claimed", 0), ("sampled", 0), ("claimed", 0)], 3),
        ([("claimed", 0), ("sampled", 0), ("dropped", 0), ("trained", 0, 0)], 4),
    ],
)
def test_a_log_that_no_run_can_have_written_is_refused(rows: list[tuple], row: int) -> None:
    def as_row(name: str, number: int, reuse: int = 0) -> dict[str, object]:
        if name == "claimed":
            return {"event": name, "request": 0, "tickets": [number], "documents": ["a"]}
        if name == "trained":
            return {"event": name, "step": number, "tickets": [0], "reuse": [reuse]}
        return {"event": name, "ticket": number}

    with pytest.raises(ValueError, match=f"row {row} of the event log"):
        audit([as_row(*one) for one in rows])


def test_an_account_that_does_not_add_up_is_refused() -> None:
    counted = Account(issued=5, trained=2, failed=1, dropped=0, pending=1)
    with pytest.raises(RuntimeError, match="5 tickets issued = 2 trained"):
        require_balanced(counted, counted)


def ids(tickets: list[Ticket]) -> list[int]:
    return [ticket.ticket_id for ticket in tickets]


@pytest.mark.parametrize("max_lag", [0, 1, 2, 3])
def test_a_buffer_of_exact_mode_settles_when_no_ticket_to_come_asks_for_older_weights(
    max_lag: int, make_document: MakeDocument
) -> None:
    """A checkpoint holds the newest weights alone: those that are out and those that are next must want no others."""

    async def scenario() -> None:
        buffer = Run(Conditions("exact", 0, max_lag=max_lag), [make_document(index) for index in range(30)]).buffer

        async def sample_one_step() -> list[int]:
            tickets = [*await buffer.claim(3), *await buffer.claim(3)]
            for ticket in tickets:
                await finish(buffer, ticket, ticket.max_policy_version or 0, version=ticket.max_policy_version or 0)
            return [ticket.max_policy_version or 0 for ticket in tickets]

        for step in range(3):
            await sample_one_step()
            await buffer.take()
            await buffer.advance(step + 1)
        settling = asyncio.create_task(buffer.settle())
        for _ in range(max_lag):
            await asyncio.sleep(0)
            assert not settling.done()
            assert max(await sample_one_step()) < 3
        async with asyncio.timeout(60):
            await settling
        assert set(await sample_one_step()) == {3}

    asyncio.run(scenario())
