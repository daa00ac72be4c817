"""The loops of a run.

    documents --tickets--> sample (one loop per rollout worker) <--- update (one loop per rollout worker)
        ^                     | rollout references                        ^
        | admission           v                                           |
        |                  score (one loop per feature or verifier server)|
        |                     | scored references                         |
        |                     v                                           |
        +---- advance <--- train (one loop): take -> train_step -> publish+

`update` hands new weights to a worker as soon as they are published; the worker checks them while it samples, and
decides when they go live (rollout.in_flight_updates). A worker that still lacks the weights its tickets require gets
them before it samples. The learner waits for no worker. Rollouts and weights travel between processes by reference;
the controller sees summaries and metrics only. The first loop that fails ends all others, and its error is the run's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from actors.rollout import Document, RolloutSummary, Ticket
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Arrival, Use
from orchestration.idle_time import IdleTime
from orchestration.loops import Loop, Loops
from orchestration.output.metrics import MetricsLog
from orchestration.roles.weight_sync import Receiver, Weights, Weights_contra, WeightSync

Sampled = TypeVar("Sampled")
"""A rollout, or a reference to one: never opened here."""
Scored = TypeVar("Scored")
"""Likewise, of what the learner takes."""
Sampled_co = TypeVar("Sampled_co", covariant=True)
Sampled_contra = TypeVar("Sampled_contra", contravariant=True)
Scored_co = TypeVar("Scored_co", covariant=True)


class Worker(Receiver[Weights_contra], Protocol[Weights_contra, Sampled_co]):
    """A rollout worker: roles.RolloutRole."""

    async def sample(self, tickets: Sequence[Ticket]) -> Sequence[tuple[RolloutSummary, Sampled_co]]:
        """One rollout for each ticket."""
        ...


class ScoreSummary(Protocol):
    """What the controller sees of a scored rollout."""

    @property
    def score_s(self) -> float:
        """Time it took [s]."""
        ...


class Scorer(Protocol[Sampled_contra, Scored_co]):
    """Turns rollouts into what the learner takes: roles.ScorerRole."""

    async def score(self, rollouts: Sequence[Sampled_contra]) -> Sequence[tuple[ScoreSummary, Scored_co]]:
        """One result for each rollout."""
        ...


class Learner(Protocol[Scored]):
    """The learner: roles.LearnerRole."""

    async def train_step(self, batch: Sequence[Use[Scored]]) -> dict[str, float]:
        """One optimizer step; its metrics."""
        ...

    def close_channel(self, worker: str) -> None:
        """This worker has left."""


class Controller(Generic[Weights, Sampled, Scored]):
    """Runs the roles concurrently until the last step is done; workers may join and leave meanwhile."""

    def __init__(
        self,
        *,
        buffer: RolloutBuffer[Scored] | ReplayBuffer[Scored],
        rollout_workers: Sequence[Worker[Weights, Sampled]],
        scorers: Sequence[Scorer[Sampled, Scored]],
        learner: Learner[Scored],
        weight_sync: WeightSync[Weights],
        metrics: MetricsLog,
        documents_per_request: int,
        batch_timeout_s: float,
        after_step: Callable[[int], Awaitable[None]],
        lag_bound: int | None = None,
        without_rollouts: Callable[[Document], Scored] | None = None,
    ) -> None:
        """`after_step(step)` is awaited after each publication, before the next step. `without_rollouts`, if given,
        replaces sampling and scoring: it turns a document into what the learner takes. `lag_bound` is logged."""
        self._buffer = buffer
        self._workers = list(rollout_workers)
        self._scorers = list(scorers)
        self._learner = learner
        self._weight_sync = weight_sync
        self._metrics = metrics
        self._documents_per_request = documents_per_request
        self._batch_timeout_s = batch_timeout_s
        self._after_step = after_step
        self._lag_bound = lag_bound
        self._without_rollouts = without_rollouts
        self._sampled: asyncio.Queue[list[tuple[Ticket, RolloutSummary, Sampled]]] = asyncio.Queue()
        """Requests: each is scored together too, so that a rollout and its score depend on the request alone."""
        self._loops = Loops()
        self._joining: dict[Worker[Weights, Sampled], tuple[set[int], Callable[[], None]]] = {}
        """Workers that joined and of which nothing was trained on yet: their tickets, and the callback for it."""

    async def run(self, num_steps: int, *, extra_loop: Loop | None = None) -> None:
        """Train for `num_steps`; `extra_loop` runs concurrently. Raises what the first failing loop raised, after
        stopping the others."""
        clock = asyncio.get_running_loop().time
        self._idle = IdleTime(clock)
        async with self._loops.running():
            self._start_feeding()
            if extra_loop is not None:
                self._loops.start(self, extra_loop)
            self._loops.start_last(self._train(num_steps, clock))

    @property
    def samples(self) -> bool:
        """Documents are sampled and scored before they are trained on."""
        return self._without_rollouts is None

    def add_worker(self, worker: Worker[Weights, Sampled], *, on_trained: Callable[[], None]) -> None:
        """Let one more worker sample, from published weights on. `on_trained` is called when the learner is about to
        train on the first rollout of its own."""
        self._workers.append(worker)
        self._joining[worker] = (set(), on_trained)
        self._start_worker(worker)

    async def remove_worker(self, worker: Worker[Weights, Sampled]) -> None:
        """Give the worker no further tickets; returns when those it has are sampled and handed on."""
        self._workers.remove(worker)
        await self._loops.end(worker)
        self._learner.close_channel(worker.name)

    def add_scorer(self, scorer: Scorer[Sampled, Scored]) -> None:
        """Let one more server score."""
        self._scorers.append(scorer)
        self._loops.start(scorer, self._score(scorer))

    async def remove_scorer(self, scorer: Scorer[Sampled, Scored]) -> None:
        """Give the server no further rollouts; returns when those it has are scored."""
        self._scorers.remove(scorer)
        await self._loops.end(scorer)

    async def _sample(self, worker: Worker[Weights, Sampled]) -> None:
        while worker in self._workers:
            with self._loops.holding_nothing(worker), self._idle.waiting("rollout/admission"):
                tickets = await self._buffer.claim(self._documents_per_request)
            if not tickets:
                return
            if worker in self._joining:
                self._joining[worker][0].update(ticket.ticket_id for ticket in tickets)
            async with self._weight_sync.prepare(worker, tickets, self._idle):
                sampled = await worker.sample(tickets)
            for summary, _ in sampled:
                self._metrics.observe("rollout/sample_s", summary.sample_s)
                self._metrics.observe("rollout/tokens", summary.num_completion_tokens)
            self._sampled.put_nowait([(ticket, *result) for ticket, result in zip(tickets, sampled, strict=True)])

    async def _score(self, scorer: Scorer[Sampled, Scored]) -> None:
        while scorer in self._scorers:
            with self._loops.holding_nothing(scorer), self._idle.waiting("score/rollouts"):
                request = await self._sampled.get()
            scored = await scorer.score([reference for _, _, reference in request])
            for summary, _ in scored:
                self._metrics.observe("score/score_s", summary.score_s)
            await self._buffer.finish(
                [
                    Arrival(ticket=t, payload=payload, version=s.min_policy_version, weight_steps=s.weight_steps)
                    for (t, s, _), (_, payload) in zip(request, scored, strict=True)
                ]
            )

    async def _pass_documents(self, as_scored: Callable[[Document], Scored]) -> None:
        while tickets := await self._buffer.claim(self._documents_per_request):
            versions = [ticket.min_policy_version for ticket in tickets]
            await self._buffer.finish(
                [
                    Arrival(ticket=t, payload=as_scored(t.document), version=version, weight_steps=((0, version),))
                    for t, version in zip(tickets, versions, strict=True)
                ]
            )

    async def _train(self, num_steps: int, clock: Callable[[], float]) -> None:
        for step in range(1, num_steps + 1):
            start = clock()
            with self._idle.waiting("learner/batch"):
                batch = await self._next_batch(step)
            waited = clock() - start
            self._report_first_rollouts(batch)
            step_metrics = await self._learner.train_step(batch)
            with self._idle.waiting("learner/publish"):
                await self._publish()
            self._metrics.observe("time/wait_for_batch_s", waited)
            self._metrics.observe("time/step_s", clock() - start)
            self._observe(batch)
            self._metrics.log_step(step, step_metrics)
            await self._after_step(step)

    async def _publish(self) -> None:
        await self._buffer.advance(await self._weight_sync.publish())
        self._weight_sync.forget(below=self._buffer.oldest_wanted_version)

    async def _next_batch(self, step: int) -> list[Use[Scored]]:
        try:
            async with asyncio.timeout(self._batch_timeout_s):
                return await self._buffer.take()
        except TimeoutError as error:
            raise TimeoutError(
                f"step {step} waited {self._batch_timeout_s:g} s for its documents: {self._buffer.num_scored} of "
                f"{self._buffer.num_alive} admitted ones are scored, {self._sampled.qsize()} requests wait for "
                "scoring; raise asynchrony.request_timeout_s or add workers"
            ) from error

    def _observe(self, batch: Sequence[Use[Scored]]) -> None:
        if self.samples:
            self._observe_rollouts(batch)
        self._metrics.observe("buffer/scored", self._buffer.num_scored)
        self._metrics.observe("buffer/alive", self._buffer.num_alive)
        sizes = {"rollout": len(self._workers), "score": len(self._scorers), "learner": 1}
        seconds, interval = self._idle.flush()
        for reason, idle_s in seconds.items():
            self._metrics.observe(f"idle/{reason}_frac", idle_s / (interval * sizes[reason.split("/")[0]] or 1.0))

    def _observe_rollouts(self, batch: Sequence[Use[Scored]]) -> None:
        for use in batch:
            for part in ("in_flight", "in_queue", "reuse"):
                self._metrics.observe(f"lag/{part}/mean", getattr(use.lag, part))
            self._metrics.observe("reuse/index/mean", use.reuse_index)
        if self._lag_bound is not None:
            self._metrics.observe("lag/bound", self._lag_bound)
        self._metrics.observe("buffer/dropped", self._buffer.num_dropped)
        self._metrics.observe("reuse/expired", self._buffer.num_expired)
        self._metrics.observe("rollout/workers", len(self._workers))

    def _report_first_rollouts(self, batch: Sequence[Use[Scored]]) -> None:
        batch_ids = {use.ticket.ticket_id for use in batch}
        for worker in [worker for worker, (ticket_ids, _) in self._joining.items() if ticket_ids & batch_ids]:
            _, on_trained = self._joining.pop(worker)
            on_trained()

    def _start_feeding(self) -> None:
        if self._without_rollouts is not None:
            self._loops.start(self, self._pass_documents(self._without_rollouts))
            return
        for worker in self._workers:
            self._start_worker(worker)
        for scorer in self._scorers:
            self._loops.start(scorer, self._score(scorer))

    def _start_worker(self, worker: Worker[Weights, Sampled]) -> None:
        self._loops.start(worker, self._sample(worker), self._weight_sync.push_updates(worker))
