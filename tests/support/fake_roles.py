"""Fakes for every role of the loops, and a controller between them.

They have the methods of orchestration/roles/roles.py and record what they did in one list of events. A reference to a
rollout is here (its ticket's number, the version that sampled it), one to a scored rollout the same. `die` ends one as
the end of its process would: it is lost, and so is every call that is under way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

from fake_publication import FakePublication, fake_manifest

from actors.rollout import Document, RolloutSummary, Ticket
from actors.worker import WeightReceipt
from feature_server.scored_rollout import ScoredSummary
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Use
from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.loops.controller import Controller
from orchestration.output.metrics import MetricsLog
from orchestration.roles.protocols import Member
from orchestration.roles.weight_sync import WeightSync

Event = tuple[object, ...]
Interrupt = Callable[[str], Awaitable[None]]
MakeDocument = Callable[[int], Document]
OnFailure = Callable[[Member, ProcessFailure], Awaitable[None]]
DOCUMENTS_PER_STEP = 2


async def let_others_run(times: int = 1) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def undisturbed(verb: str) -> None:
    await let_others_run()


class FakeMember:
    """`interrupt(verb)` may wait or raise in the middle of a verb."""

    def __init__(self, events: list[Event], name: str, interrupt: Interrupt = undisturbed) -> None:
        self.name, self.num_done = name, 0
        self._events, self._interrupt = events, interrupt
        self._dead = asyncio.Event()

    def die(self) -> None:
        self._dead.set()

    @property
    def loss(self) -> ProcessLost:
        return ProcessLost(self.name, f"{self.name} died")

    async def lost(self) -> NoReturn:
        await self._dead.wait()
        raise self.loss

    async def _during(self, verb: str) -> None:
        await self._interrupt(verb)
        if self._dead.is_set():
            raise self.loss


class FakeWorker(FakeMember):
    """Samples at the version it received last."""

    def __init__(self, events: list[Event], name: str = "worker 0", interrupt: Interrupt = undisturbed) -> None:
        super().__init__(events, name, interrupt)
        self.policy_version: int | None = 0
        self.lock = asyncio.Lock()
        self.weights_lock = asyncio.Lock()
        self._engine = asyncio.Lock()
        self.asked: list[Ticket] = []

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, Event]]:
        async with self._engine:
            version = self.policy_version
            assert version is not None, "it samples before it has verified weights"
            self._events.append(("sample", self.name, version, *(t.ticket_id for t in tickets)))
            self.asked += tickets
            await self._during("sample")
            assert self.policy_version == version, "weights changed under a request"
        assert all(t.min_policy_version <= version for t in tickets)
        assert all(t.max_policy_version in (None, version) for t in tickets)
        self.num_done += 1
        return [(summary(t.ticket_id, version), (t.ticket_id, version)) for t in tickets]

    async def receive_weights(self, publication: FakePublication) -> WeightReceipt:
        await self._during("receive_weights")
        async with self._engine:
            self.policy_version = publication.manifest.policy_version
            self._events.append(("receive", self.name, self.policy_version))
        return WeightReceipt(
            policy_version=self.policy_version, verify_s=0.0, pause_s=0.0, probe_s=0.0, probe_error=0.0
        )


def summary(ticket_id: int, version: int) -> RolloutSummary:
    return RolloutSummary(
        ticket_id=ticket_id,
        min_policy_version=version,
        max_policy_version=version,
        num_completion_tokens=5,
        sample_s=0.5,
    )


class FakeServer(FakeMember):
    """Scores by handing on."""

    def __init__(self, events: list[Event], name: str = "server 0", interrupt: Interrupt = undisturbed) -> None:
        super().__init__(events, name, interrupt)

    async def score(self, rollouts: Sequence[Event]) -> list[tuple[ScoredSummary, Event]]:
        self._events.append(("score", *(ticket_id for ticket_id, _ in rollouts)))
        await self._during("score")
        self.num_done += 1
        return [(ScoredSummary(ticket_id=rollout[0], score_s=0.25), rollout) for rollout in rollouts]


class FakeLearner(FakeMember):
    """Compares the lag of every rollout with the one that it was promised."""

    def __init__(self, events: list[Event], interrupt: Interrupt = undisturbed) -> None:
        super().__init__(events, "learner", interrupt)
        self.version = 0
        self.lags: list[int] = []

    async def train_step(self, batch: Sequence[Use[Event]]) -> dict[str, float]:
        scored = [use.payload for use in batch]
        self._events.append(("train", *(ticket_id for ticket_id, _ in scored)))
        await self._during("train_step")
        lags = [(self.version - use.payload[1], use.lag.total) for use in batch if use.payload[1] is not None]
        assert all(own == promised for own, promised in lags)
        self.lags += [own for own, _ in lags]
        self.version += 1
        self._events.append(("trained", self.version))
        return {"lag/max": max(self.lags, default=0)}

    def close_channel(self, worker: str) -> None:
        self._events.append(("part from", worker))

    async def publish(self) -> FakePublication:
        await self._during("publish")
        self._events.append(("publish", self.version))
        return FakePublication(fake_manifest(self.version), publish_s=0.125)


class ObservedBuffer(RolloutBuffer[Event]):
    """Notes which publication a worker would pull at the moment when admission opens."""

    weight_sync: WeightSync
    pullable: list[tuple[int, int]]

    async def advance(self, published_version: int) -> None:
        self.pullable.append((published_version, self.weight_sync.newest.manifest.policy_version))
        await super().advance(published_version)


def make_buffer(
    make_document: MakeDocument,
    *,
    num_steps: int,
    max_lag: int,
    lag_rule: str = "in_order",
    first_document: int = 0,
    record: Callable[[dict[str, object]], None] = lambda row: None,
) -> ObservedBuffer:
    numbers = iter(range(first_document, 10_000))
    return ObservedBuffer(
        lambda count: [make_document(next(numbers)) for _ in range(count)],
        pool=ReusePool(documents_per_step=DOCUMENTS_PER_STEP, max_uses=1, max_reuse_lag=None, order="fifo", seed=0),
        num_steps=num_steps,
        lag_rule=lag_rule,
        max_lag=max_lag,
        prefetch_steps=max_lag,
        completions_per_context=3,
        seed=0,
        record=record,
    )


def make_controller(
    buffer: ObservedBuffer,
    *,
    workers: Sequence[FakeWorker],
    servers: Sequence[FakeServer],
    learner: FakeLearner,
    metrics: MetricsLog | None = None,
    batch_timeout_s: float = 5.0,
    documents_per_request: int = DOCUMENTS_PER_STEP,
    push: bool = True,
    **others: object,
) -> Controller:
    """`others`: as Controller."""
    metrics = metrics or MetricsLog([])
    buffer.weight_sync, buffer.pullable = WeightSync(learner, metrics, push=push), []
    return Controller(
        buffer=buffer,
        rollout_workers=workers,
        scorers=servers,
        learner=learner,
        weight_sync=buffer.weight_sync,
        metrics=metrics,
        documents_per_request=documents_per_request,
        batch_timeout_s=batch_timeout_s,
        **others,
    )


def run_alone(scenario: Awaitable[None], *, run: Callable[[Awaitable[None]], None] = asyncio.run) -> None:
    """Run to the end and check that no task is left behind."""

    async def checked() -> None:
        try:
            async with asyncio.timeout(60):
                await scenario
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(checked())
