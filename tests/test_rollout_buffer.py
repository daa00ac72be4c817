"""The lag bound as a property of many random schedules, and each transition of a ticket's life.

Schedules are interleavings on one event loop: everybody yields a random number of times between two verbs. Workers
sample either with the newest published weights, as the controller makes them do, or, worst of all that a ticket allows,
with the oldest that it permits.
"""

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from actors.documents import DocumentStream
from actors.rollout import Document, Ticket
from orchestration.rollout_buffer import RolloutBuffer

MakeDocument = Callable[[int], Document]
NUM_STEPS = 6


@dataclass(frozen=True)
class Schedule:
    """One way to run; the seed decides every delay and every request's size."""

    max_lag: int
    documents_per_step: int
    num_workers: int
    seed: int
    weights: str = "newest"


@dataclass(frozen=True)
class Record:
    """What an observer notes about one ticket that was trained on."""

    ticket: Ticket
    published_when_admitted: int
    sampling_version: int
    trained_in_step: int

    @property
    def lag(self) -> int:
        return self.trained_in_step - self.sampling_version


class Run:
    """A schedule as it happens: the weights' version is the number of steps whose training has ended."""

    def __init__(self, schedule: Schedule, next_documents: Callable[[int], list[Document]]) -> None:
        self.schedule = schedule
        self.random = random.Random(schedule.seed)
        self.buffer: RolloutBuffer[int] = RolloutBuffer(
            next_documents,
            documents_per_step=schedule.documents_per_step,
            num_steps=NUM_STEPS,
            max_lag=schedule.max_lag,
            completions_per_context=3,
            seed=schedule.seed,
        )
        self.version = 0
        self.admitted_at: dict[int, int] = {}
        self.records: list[Record] = []
        self.most_alive = 0

    async def play(self) -> "Run":
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for _ in range(self.schedule.num_workers):
                group.create_task(self._work(patience=self.random.randrange(1, 12)))
            group.create_task(self._train())
        return self

    async def _work(self, patience: int) -> None:
        while tickets := await self.buffer.claim(self.random.randrange(1, 4)):
            self.most_alive = max(self.most_alive, self.buffer.num_alive)
            self.admitted_at |= {ticket.ticket_id: self.version for ticket in tickets}
            await self._pause(patience)
            version = self.version
            if self.schedule.weights == "oldest allowed":
                version = max(ticket.min_policy_version for ticket in tickets)
            await self._pause(patience)
            self.random.shuffle(tickets)
            for ticket in tickets:
                await self.buffer.finish(ticket, version)
                await self._pause(2)

    async def _train(self) -> None:
        patience = self.random.randrange(1, 12)
        for step in range(NUM_STEPS):
            for scored in await self.buffer.take():
                admitted_at = self.admitted_at[scored.ticket.ticket_id]
                self.records.append(Record(scored.ticket, admitted_at, scored.payload, step))
            await self._pause(patience)
            self.version += 1
            await self.buffer.advance(self.version)
            await self._pause(patience)

    async def _pause(self, patience: int) -> None:
        for _ in range(self.random.randrange(patience + 1)):
            await asyncio.sleep(0)


def play(schedule: Schedule, make_document: MakeDocument) -> Run:
    return asyncio.run(Run(schedule, counted_documents(make_document)).play())


def counted_documents(make_document: MakeDocument) -> Callable[[int], list[Document]]:
    numbers = itertools.count()
    return lambda count: [make_document(next(numbers)) for _ in range(count)]


def schedules(max_lag: int, weights: str) -> list[Schedule]:
    shapes = itertools.product((1, 2, 5), (1, 3), range(20))
    return [
        Schedule(max_lag, documents_per_step, num_workers, seed, weights)
        for documents_per_step, num_workers, seed in shapes
    ]


def make_buffer(make_document: MakeDocument, *, max_lag: int, num_steps: int = 3) -> RolloutBuffer[str]:
    return RolloutBuffer(
        counted_documents(make_document),
        documents_per_step=2,
        num_steps=num_steps,
        max_lag=max_lag,
        completions_per_context=3,
        seed=5,
    )


@pytest.mark.parametrize("weights", ["newest", "oldest allowed"])
@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
def test_lag_stays_within_its_bound_in_every_schedule(max_lag: int, weights: str, make_document: MakeDocument) -> None:
    for schedule in schedules(max_lag, weights):
        run = play(schedule, make_document)
        lags = [record.lag for record in run.records]
        assert min(lags) >= 0, schedule
        assert max(lags) <= max_lag, schedule
        assert run.most_alive <= (max_lag + 1) * schedule.documents_per_step, schedule


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
def test_lag_bound_is_tight(max_lag: int, make_document: MakeDocument) -> None:
    runs = [play(schedule, make_document) for schedule in schedules(max_lag, "newest")]
    assert max(record.lag for run in runs for record in run.records) == max_lag


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_every_ticket_is_trained_on_once_and_in_its_order(max_lag: int, make_document: MakeDocument) -> None:
    for schedule in schedules(max_lag, "newest"):
        run = play(schedule, make_document)
        numbers = list(range(NUM_STEPS * schedule.documents_per_step))
        assert [record.ticket.ticket_id for record in run.records] == numbers, schedule
        assert [r.trained_in_step for r in run.records] == [i // schedule.documents_per_step for i in numbers]
        assert len({record.ticket.seed for record in run.records}) == len(numbers)
        assert run.buffer.num_alive == run.buffer.num_scored == 0


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_tickets_demand_the_oldest_weights_within_the_bound(max_lag: int, make_document: MakeDocument) -> None:
    for schedule in schedules(max_lag, "newest"):
        for record in play(schedule, make_document).records:
            needed = record.ticket.min_policy_version
            assert needed == max(0, record.trained_in_step - max_lag)
            assert needed <= record.published_when_admitted, "no worker could have such weights yet"


def test_lag_0_admits_a_step_only_after_the_step_before_was_published(make_document: MakeDocument) -> None:
    for schedule in schedules(0, "newest"):
        for record in play(schedule, make_document).records:
            assert record.published_when_admitted == record.sampling_version == record.trained_in_step


def test_documents_are_trained_on_in_the_order_of_the_stream(make_document: MakeDocument) -> None:
    documents = [make_document(index) for index in range(7)]
    for schedule in schedules(2, "newest"):
        stream = DocumentStream(documents, seed=schedule.seed)
        run = asyncio.run(Run(schedule, stream.take).play())
        alone = DocumentStream(documents, seed=schedule.seed).take(NUM_STEPS * schedule.documents_per_step)
        assert [record.ticket.document.document_id for record in run.records] == [d.document_id for d in alone]


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
        claims.append(await buffer.claim(1000))
        return [[ticket.ticket_id for ticket in claim] for claim in claims]

    first = 2 * (max_lag + 1)
    expected = [list(range(first)), [first, first + 1], [first + 2, first + 3], []]
    assert asyncio.run(scenario()) == expected


def test_every_claimer_learns_that_the_run_is_exhausted(make_document: MakeDocument) -> None:
    async def scenario() -> tuple[list[Ticket], list[list[Ticket]]]:
        buffer = make_buffer(make_document, max_lag=0, num_steps=2)
        await buffer.claim(2)
        waiting = [asyncio.create_task(buffer.claim(2)) for _ in range(3)]
        await asyncio.sleep(0)
        await buffer.advance(1)
        async with asyncio.timeout(1):
            first, *others = await asyncio.gather(*waiting)
        return first, others

    first, others = asyncio.run(scenario())
    assert [ticket.ticket_id for ticket in first] == [2, 3]
    assert others == [[], []]


def test_a_cancelled_wait_loses_nothing(make_document: MakeDocument) -> None:
    async def scenario() -> list[int]:
        buffer = make_buffer(make_document, max_lag=0)
        tickets = await buffer.claim(2)
        for wait in (buffer.claim(2), buffer.take()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await wait
        for ticket in tickets:
            await buffer.finish(ticket, "payload")
        taken = [scored.ticket for scored in await buffer.take()]
        await buffer.advance(1)
        return [ticket.ticket_id for ticket in (*taken, *await buffer.claim(2))]

    assert asyncio.run(scenario()) == [0, 1, 2, 3]


def test_take_returns_each_payload_with_its_ticket(make_document: MakeDocument) -> None:
    async def scenario() -> list[tuple[int, str]]:
        buffer = make_buffer(make_document, max_lag=1)
        for ticket in reversed(await buffer.claim(4)):
            await buffer.finish(ticket, f"scored {ticket.ticket_id}")
        return [(scored.ticket.ticket_id, scored.payload) for scored in await buffer.take()]

    assert asyncio.run(scenario()) == [(0, "scored 0"), (1, "scored 1")]


@pytest.mark.parametrize("trained", [False, True])
def test_finishing_twice_is_refused(trained: bool, make_document: MakeDocument) -> None:
    async def scenario() -> None:
        buffer = make_buffer(make_document, max_lag=0)
        tickets = await buffer.claim(2)
        for ticket in tickets:
            await buffer.finish(ticket, "payload")
        if trained:
            await buffer.take()
        with pytest.raises(RuntimeError, match="ticket 1 was finished twice"):
            await buffer.finish(tickets[1], "payload")

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
            documents_per_step=50,
            num_steps=20,
            max_lag=19,
            completions_per_context=3,
            seed=run_seed,
        )
        return {ticket.seed for ticket in await buffer.claim(1000)}

    drawn = [asyncio.run(seeds(run_seed)) for run_seed in range(4)]
    assert len(set.union(*drawn)) == 4 * 1000
