"""The lag bound as a property of many random schedules, for every lag rule, and each transition of a ticket's life.

Schedules are interleavings on one event loop: every task yields a random number of times between two calls, and some
requests take much longer than others. Workers sample either with the newest published weights, as the controller makes
them do, or, the worst case, with the oldest that a ticket allows.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from arrivals import finish

from actors.data.documents import DocumentStream
from actors.rollout import Document, Ticket
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Use

MakeDocument = Callable[[int], Document]
NUM_STEPS = 7


@dataclass(frozen=True)
class Schedule:
    """One way to run; the seed decides every delay and every request's size."""

    lag_rule: str
    max_lag: int
    documents_per_step: int
    num_workers: int
    seed: int
    weights: str = "newest"
    prefetch_steps: int | None = None
    max_uses: int = 1
    max_reuse_lag: int | None = None
    order: str = "fifo"


@dataclass(frozen=True)
class Record:
    """What an observer notes about one use of a ticket."""

    use: Use
    published_when_claimed: int
    sampling_version: int
    step: int

    @property
    def ticket(self) -> Ticket:
        return self.use.ticket

    @property
    def lag(self) -> int:
        return self.step - self.sampling_version


class Run:
    """A schedule as it happens: the weights' version is the number of steps whose training has ended."""

    def __init__(self, schedule: Schedule, next_documents: Callable[[int], list[Document]]) -> None:
        self.schedule = schedule
        self.random = random.Random(schedule.seed)
        self.events: list[dict[str, object]] = []
        self.buffer: RolloutBuffer[int] = RolloutBuffer(
            next_documents,
            pool=ReusePool(
                documents_per_step=schedule.documents_per_step,
                max_uses=schedule.max_uses,
                max_reuse_lag=schedule.max_reuse_lag,
                order=schedule.order,
                seed=schedule.seed,
            ),
            num_steps=NUM_STEPS,
            lag_rule=schedule.lag_rule,
            max_lag=schedule.max_lag,
            prefetch_steps=schedule.max_lag if schedule.prefetch_steps is None else schedule.prefetch_steps,
            completions_per_context=3,
            seed=schedule.seed,
            record=self.events.append,
        )
        self.version = 0
        self.claimed_at: dict[int, int] = {}
        self.claimed: dict[int, Ticket] = {}
        self.batches: list[list[Record]] = []
        self.most_alive = 0

    @property
    def records(self) -> list[Record]:
        return [record for batch in self.batches for record in batch]

    async def play(self) -> "Run":
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(self.schedule.num_workers):
                group.create_task(self._work(patience=self.random.randrange(1, 12)))
            group.create_task(self._train())
        return self

    async def _work(self, patience: int) -> None:
        while tickets := await self.buffer.claim(self.random.randrange(1, 4)):
            self.most_alive = max(self.most_alive, self.buffer.num_alive)
            self.claimed_at |= {ticket.ticket_id: self.version for ticket in tickets}
            self.claimed |= {ticket.ticket_id: ticket for ticket in tickets}
            await self._pause(patience)
            version = self.version
            if tickets[0].max_policy_version is not None:
                (version,) = {ticket.max_policy_version for ticket in tickets}
            elif self.schedule.weights == "oldest allowed":
                version = max(ticket.min_policy_version for ticket in tickets)
            assert all(ticket.min_policy_version <= version <= self.version for ticket in tickets)
            await self._pause(patience * self.random.choice((1, 1, 1, 10)))
            self.random.shuffle(tickets)
            for ticket in tickets:
                await finish(self.buffer, ticket, version, version=version)
                await self._pause(2)

    async def _train(self) -> None:
        patience = self.random.randrange(1, 12)
        for step in range(NUM_STEPS):
            uses = await self.buffer.take()
            self.batches.append([Record(u, self.claimed_at[u.ticket.ticket_id], u.payload, step) for u in uses])
            await self._pause(patience)
            self.version += 1
            await self.buffer.advance(self.version)
            assert self.buffer.oldest_wanted_version <= self.version
            await self._pause(patience)

    async def _pause(self, patience: int) -> None:
        for _ in range(self.random.randrange(patience + 1)):
            await asyncio.sleep(0)


def play(schedule: Schedule, make_document: MakeDocument) -> Run:
    return asyncio.run(Run(schedule, counted_documents(make_document)).play())


def counted_documents(make_document: MakeDocument) -> Callable[[int], list[Document]]:
    numbers = itertools.count()
    return lambda count: [make_document(next(numbers)) for _ in range(count)]


def schedules(
    lag_rule: str, max_lag: int, weights: str = "newest", *, seeds: int = 6, **reuse: object
) -> list[Schedule]:
    sizes = (2, 6) if reuse else (1, 4)
    prefetches = (None,) if lag_rule in ("in_order", "exact") else (None, max_lag // 2)
    shapes = itertools.product(sizes, (1, 3), prefetches, range(seeds))
    return [
        Schedule(lag_rule, max_lag, documents_per_step, num_workers, seed, weights, prefetch_steps, **reuse)
        for documents_per_step, num_workers, prefetch_steps, seed in shapes
    ]


BOUNDED = ["in_order", "wait", "drop", "exact"]


@pytest.mark.parametrize("weights", ["newest", "oldest allowed"])
@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
@pytest.mark.parametrize("lag_rule", BOUNDED)
def test_lag_stays_within_its_bound_in_every_schedule(
    lag_rule: str, max_lag: int, weights: str, make_document: MakeDocument
) -> None:
    for schedule in schedules(lag_rule, max_lag, weights):
        run = play(schedule, make_document)
        lags = [record.lag for record in run.records]
        assert min(lags) >= 0, schedule
        assert max(lags) <= max_lag, schedule
        assert run.most_alive <= (max_lag + 1) * schedule.documents_per_step, schedule


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
@pytest.mark.parametrize("lag_rule", BOUNDED)
def test_lag_bound_is_tight(lag_rule: str, max_lag: int, make_document: MakeDocument) -> None:
    runs = [play(schedule, make_document) for schedule in schedules(lag_rule, max_lag)]
    assert max(record.lag for run in runs for record in run.records) == max_lag


def test_free_keeps_no_bound(make_document: MakeDocument) -> None:
    runs = [play(schedule, make_document) for schedule in schedules("free", 1)]
    assert max(record.lag for run in runs for record in run.records) > 1


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_exact_means_exact(max_lag: int, make_document: MakeDocument) -> None:
    for schedule in schedules("exact", max_lag):
        for record in play(schedule, make_document).records:
            assert record.lag == min(max_lag, record.step), schedule
            assert record.ticket.min_policy_version == record.ticket.max_policy_version == record.sampling_version


@pytest.mark.parametrize("lag_rule", [*BOUNDED, "free"])
def test_lag_is_the_sum_of_its_parts(lag_rule: str, make_document: MakeDocument) -> None:
    seen: Counter[str] = Counter()
    for schedule in schedules(lag_rule, 2, max_uses=2):
        for record in play(schedule, make_document).records:
            lag = record.use.lag
            assert lag.total == record.lag, schedule
            assert min(lag.in_flight, lag.in_queue, lag.reuse) >= 0
            assert (lag.reuse > 0) == (record.use.reuse_index > 0)
            seen += Counter(in_flight=lag.in_flight, in_queue=lag.in_queue, reuse=lag.reuse)
    assert set(seen) == {"in_flight", "in_queue", "reuse"}


@pytest.mark.parametrize("lag_rule", ["wait", "free"])
def test_the_fast_overtake_the_slow_and_nothing_is_lost(lag_rule: str, make_document: MakeDocument) -> None:
    overtaken = 0
    for schedule in schedules(lag_rule, 3):
        run = play(schedule, make_document)
        trained = [record.ticket.ticket_id for record in run.records]
        assert len(set(trained)) == len(trained) == NUM_STEPS * schedule.documents_per_step
        assert set(run.claimed) == set(trained), schedule
        assert run.buffer.num_dropped == run.buffer.num_alive == 0
        overtaken += trained != sorted(trained)
    assert overtaken > 0


def test_dropped_documents_are_counted_and_sampled_again(make_document: MakeDocument) -> None:
    num_dropped = 0
    for schedule in schedules("drop", 1):
        run = play(schedule, make_document)
        dropped = [event["ticket"] for event in run.events if event["event"] == "dropped"]
        assert len(dropped) == run.buffer.num_dropped
        trained = [record.ticket.ticket_id for record in run.records]
        assert len(set(trained)) == len(trained) == NUM_STEPS * schedule.documents_per_step
        assert set(trained).isdisjoint(dropped)
        # Documents of the stream are claimed once each, and once more for every time they were dropped and reclaimed.
        claims = Counter(ticket.document.document_id for ticket in run.claimed.values())
        drops = Counter(run.claimed[ticket_id].document.document_id for ticket_id in dropped)
        assert all(1 <= claims[name] <= 1 + drops[name] for name in claims), schedule
        assert sum(claims.values()) - len(claims) + len(run.buffer._returned) == len(dropped)
        num_dropped += len(dropped)
    assert num_dropped > 0


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@pytest.mark.parametrize("lag_rule", ["in_order", "exact"])
def test_every_ticket_is_trained_on_once_and_in_its_order(
    lag_rule: str, max_lag: int, make_document: MakeDocument
) -> None:
    for schedule in schedules(lag_rule, max_lag):
        run = play(schedule, make_document)
        numbers = list(range(NUM_STEPS * schedule.documents_per_step))
        assert [record.ticket.ticket_id for record in run.records] == numbers, schedule
        assert [record.step for record in run.records] == [i // schedule.documents_per_step for i in numbers]
        assert len({record.ticket.seed for record in run.records}) == len(numbers)
        assert run.buffer.num_alive == run.buffer.num_scored == 0


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_tickets_demand_the_oldest_weights_within_the_bound(max_lag: int, make_document: MakeDocument) -> None:
    for schedule in schedules("in_order", max_lag):
        for record in play(schedule, make_document).records:
            needed = record.ticket.min_policy_version
            assert needed == max(0, record.step - max_lag)
            assert needed <= record.published_when_claimed, "no worker could have such weights yet"


@pytest.mark.parametrize("lag_rule", BOUNDED)
def test_lag_0_claims_a_step_only_after_the_step_before_was_published(
    lag_rule: str, make_document: MakeDocument
) -> None:
    for schedule in schedules(lag_rule, 0):
        for record in play(schedule, make_document).records:
            assert record.published_when_claimed == record.sampling_version == record.step


def test_documents_are_trained_on_in_the_order_of_the_stream(make_document: MakeDocument) -> None:
    documents = [make_document(index) for index in range(7)]
    for schedule in schedules("in_order", 2):
        stream = DocumentStream(documents, seed=schedule.seed)
        run = asyncio.run(Run(schedule, stream.take).play())
        alone = DocumentStream(documents, seed=schedule.seed).take(NUM_STEPS * schedule.documents_per_step)
        assert [record.ticket.document.document_id for record in run.records] == [d.document_id for d in alone]


@pytest.mark.parametrize("order", ["fifo", "uniform"])
@pytest.mark.parametrize("lag_rule", [*BOUNDED, "free"])
def test_no_rollout_is_used_more_often_than_max_uses(lag_rule: str, order: str, make_document: MakeDocument) -> None:
    if (lag_rule, order) == ("exact", "uniform"):
        return  # refused by the configuration
    for schedule in schedules(lag_rule, 1, seeds=4, max_uses=2, max_reuse_lag=3, order=order):
        run = play(schedule, make_document)
        for step, batch in enumerate(run.batches):
            tickets = [record.ticket.ticket_id for record in batch]
            assert len(set(tickets)) == len(tickets) == schedule.documents_per_step, schedule
            num_fresh = sum(record.use.reuse_index == 0 for record in batch)
            assert (
                num_fresh == schedule.documents_per_step if step == 0 else num_fresh >= schedule.documents_per_step / 2
            )
        for ticket_id, count in Counter(record.ticket.ticket_id for record in run.records).items():
            uses = [record for record in run.records if record.ticket.ticket_id == ticket_id]
            assert count <= 2
            assert [record.use.reuse_index for record in uses] == list(range(count))
            assert [record.lag for record in uses[1:]] <= [3]


@pytest.mark.parametrize("max_uses", [2, 3])
@pytest.mark.parametrize("max_lag", [0, 2])
def test_fifo_uses_a_rollout_in_consecutive_steps(max_lag: int, max_uses: int, make_document: MakeDocument) -> None:
    for schedule in schedules("exact", max_lag, seeds=4, max_uses=max_uses):
        run = play(replace(schedule, documents_per_step=6), make_document)
        counts = Counter(record.ticket.ticket_id for record in run.records)
        fresh = 6 // max_uses
        assert [counts[ticket_id] for ticket_id in range(6)] == [1 + i // fresh for i in range(6)], "the first batch"
        last_to_end = 6 + (NUM_STEPS - max_uses) * fresh
        assert {counts[ticket_id] for ticket_id in range(6, last_to_end)} == {max_uses}
        for record in run.records:
            assert record.lag == min(max_lag, record.step - record.use.reuse_index) + record.use.reuse_index


def test_uniform_draws_by_seed_and_not_by_age(make_document: MakeDocument) -> None:
    base = Schedule("in_order", 1, 6, 2, 0, max_uses=2, max_reuse_lag=6, order="uniform")
    runs = [play(replace(base, seed=seed), make_document) for seed in range(12)]
    ages = Counter(record.use.lag.reuse for run in runs for record in run.records if record.use.reuse_index)
    assert len(ages) >= 4, "always the same age: nothing was drawn"
    again = play(base, make_document)
    drawn = [[r.ticket.ticket_id for r in run.records if r.use.reuse_index] for run in (runs[0], again)]
    assert drawn[0] == drawn[1]


def test_expired_rollouts_are_replaced_by_fresh_ones(make_document: MakeDocument) -> None:
    num_expired = 0
    for schedule in schedules("in_order", 1, seeds=4, max_uses=2, max_reuse_lag=1):
        run = play(schedule, make_document)
        assert [len(batch) for batch in run.batches] == [schedule.documents_per_step] * NUM_STEPS
        assert max(record.lag for record in run.records) <= 1
        num_expired += run.buffer.num_expired
    assert num_expired > 0


def test_a_request_of_exact_mode_stays_within_one_step(make_document: MakeDocument) -> None:
    async def scenario() -> list[list[int]]:
        buffer = make_buffer(make_document, lag_rule="exact", max_lag=2)
        return [[ticket.ticket_id for ticket in await buffer.claim(3)] for _ in range(3)]

    assert asyncio.run(scenario()) == [[0, 1], [2, 3], [4, 5]]


def make_buffer(
    make_document: MakeDocument, *, max_lag: int, num_steps: int = 3, lag_rule: str = "in_order"
) -> RolloutBuffer[str]:
    return RolloutBuffer(
        counted_documents(make_document),
        pool=ReusePool(documents_per_step=2, max_uses=1, max_reuse_lag=None, order="fifo", seed=0),
        num_steps=num_steps,
        lag_rule=lag_rule,
        max_lag=max_lag,
        prefetch_steps=max_lag,
        completions_per_context=3,
        seed=5,
    )


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_admission_opens_by_one_step_for_each_publication(max_lag: int, make_document: MakeDocument) -> None:
    async def scenario() -> list[list[int]]:
        buffer = make_buffer(make_document, max_lag=max_lag, num_steps=max_lag + 3)
        claims = [await buffer.claim(1000)]
        for version in (1, 2):
            waiting = asyncio.create_task(buffer.claim(1000))
            await asyncio.sleep(0)
            assert not waiting.done(), "claimed beyond the bound"
            await buffer.advance(version)
            claims.append(await waiting)
        return [[ticket.ticket_id for ticket in claim] for claim in claims]

    first = 2 * (max_lag + 1)
    assert asyncio.run(scenario()) == [list(range(first)), [first, first + 1], [first + 2, first + 3]]


def test_every_claimer_learns_that_the_run_is_over(make_document: MakeDocument) -> None:
    async def scenario() -> list[list[Ticket]]:
        buffer = make_buffer(make_document, max_lag=0, num_steps=1)
        tickets = await buffer.claim(2)
        waiting = [asyncio.create_task(buffer.claim(2)) for _ in range(3)]
        for ticket in tickets:
            await finish(buffer, ticket, "payload")
        assert not any(claim.done() for claim in waiting)
        await buffer.take()
        await buffer.advance(1)
        async with asyncio.timeout(60):
            return await asyncio.gather(*waiting)

    assert asyncio.run(scenario()) == [[], [], []]


def test_a_cancelled_wait_loses_nothing(make_document: MakeDocument) -> None:
    async def scenario() -> list[int]:
        buffer = make_buffer(make_document, max_lag=0)
        tickets = await buffer.claim(2)
        for wait in (buffer.claim(2), buffer.take()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await wait
        for ticket in tickets:
            await finish(buffer, ticket, "payload")
        taken = [use.ticket for use in await buffer.take()]
        await buffer.advance(1)
        return [ticket.ticket_id for ticket in (*taken, *await buffer.claim(2))]

    assert asyncio.run(scenario()) == [0, 1, 2, 3]


def test_take_returns_each_payload_with_its_ticket(make_document: MakeDocument) -> None:
    async def scenario() -> list[tuple[int, str]]:
        buffer = make_buffer(make_document, max_lag=1)
        for ticket in reversed(await buffer.claim(4)):
            await finish(buffer, ticket, f"scored {ticket.ticket_id}")
        return [(use.ticket.ticket_id, use.payload) for use in await buffer.take()]

    assert asyncio.run(scenario()) == [(0, "scored 0"), (1, "scored 1")]


@pytest.mark.parametrize("trained", [False, True])
def test_finishing_twice_is_refused(trained: bool, make_document: MakeDocument) -> None:
    async def scenario() -> None:
        buffer = make_buffer(make_document, max_lag=0)
        tickets = await buffer.claim(2)
        for ticket in tickets:
            await finish(buffer, ticket, "payload")
        if trained:
            await buffer.take()
        with pytest.raises(RuntimeError, match="ticket 1 was finished twice"):
            await finish(buffer, tickets[1], "payload")
        with pytest.raises(RuntimeError, match="ticket 9 was never claimed"):
            await finish(buffer, replace(tickets[1], ticket_id=9), "payload")

    asyncio.run(scenario())


@pytest.mark.parametrize("version", [0, 1])
def test_published_versions_must_rise(version: int, make_document: MakeDocument) -> None:
    async def scenario() -> None:
        buffer = make_buffer(make_document, max_lag=0)
        await buffer.advance(1)
        with pytest.raises(RuntimeError, match=f"published version {version} after 1"):
            await buffer.advance(version)

    asyncio.run(scenario())


def test_runs_of_other_seeds_draw_other_completions(make_document: MakeDocument) -> None:
    async def seeds(run_seed: int) -> set[int]:
        buffer: RolloutBuffer[str] = RolloutBuffer(
            counted_documents(make_document),
            pool=ReusePool(documents_per_step=50, max_uses=1, max_reuse_lag=None, order="fifo", seed=0),
            num_steps=20,
            lag_rule="in_order",
            max_lag=19,
            prefetch_steps=19,
            completions_per_context=3,
            seed=run_seed,
        )
        return {ticket.seed for ticket in await buffer.claim(1000)}

    drawn = [asyncio.run(seeds(run_seed)) for run_seed in range(4)]
    assert len(set.union(*drawn)) == 4 * 1000
