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
the controller sees summaries and metrics only.

When the process of a worker or server fails, its loops end and what it held is done by others (crew.py); the learner's
failure, and any other error, ends all loops and is the run's. A step that the learner cannot apply is taken again with
other documents. `stop` ends the run between two steps, or while the learner waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.rollout import Document, RolloutSummary, Ticket
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Arrival, Use
from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.idle_time import IdleTime
from orchestration.loops.crew import Crew
from orchestration.loops.step_report import FirstRollouts, observe_buffer, observe_idle_time, observe_rollouts
from orchestration.output.metrics import MetricsLog
from orchestration.roles.protocols import Learner, Member, Sampled, Scored, Scorer, ScoreSummary, Worker
from orchestration.roles.weight_sync import Weights, WeightSync
from orchestration.tasks import Loop, Loops

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_REJECTED_IN_A_ROW = 3
"""Steps in a row that the learner may fail to apply; one more ends the run."""


@dataclass(slots=True)
class _Request(Generic[Sampled]):
    """Rollouts that were sampled together, and are scored together: a score depends on the request alone."""

    tickets: list[Ticket]
    sampled: Sequence[tuple[RolloutSummary, Sampled]]
    was_lost: bool = False
    """A server was lost while it scored them."""


class _Stopped(Exception):
    """`stop` was set."""


async def _nothing(*_: object) -> None:
    pass


async def _end_run(member: Member, failure: ProcessFailure) -> None:
    raise failure


class Controller(Generic[Weights, Sampled, Scored]):
    """Runs the roles concurrently until the last step is done; workers may join, leave and fail meanwhile."""

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
        after_step: Callable[[int], Awaitable[None]] = _nothing,
        on_failure: Callable[[Member, ProcessFailure], Loop] = _end_run,
        on_rejected: Callable[[int, Sequence[Use[Scored]]], Awaitable[None]] = _nothing,
        lag_bound: int | None = None,
        without_rollouts: Callable[[Document], Scored] | None = None,
    ) -> None:
        """`after_step(step)` is awaited before the first step, and after each publication, before the next step.
        `on_failure` runs when a worker or server has failed, and others have its work; `on_rejected` of a batch that
        could not be trained on. `batch_timeout_s`: longest wait for a batch in which nothing is sampled or scored.
        `without_rollouts`, if given, replaces sampling and scoring: it turns a document into what the learner takes.
        `lag_bound` is logged."""
        self._buffer = buffer
        self._first_workers, self._first_scorers = list(rollout_workers), list(scorers)
        self._learner = learner
        self._weight_sync = weight_sync
        self._metrics = metrics
        self._documents_per_request = documents_per_request
        self._batch_timeout_s = batch_timeout_s
        self._after_step, self._on_failure, self._on_rejected = after_step, on_failure, on_rejected
        self._lag_bound = lag_bound
        self._without_rollouts = without_rollouts
        self._sampled: asyncio.Queue[_Request[Sampled]] = asyncio.Queue()
        self._loops = Loops()
        self._workers: Crew[Worker[Weights, Sampled], list[Ticket]] = Crew(
            self._loops, give_back=self._sample_again, on_failure=self._after_worker_failed
        )
        self._scorers: Crew[Scorer[Sampled, Scored], _Request[Sampled]] = Crew(
            self._loops, give_back=self._score_again, on_failure=on_failure
        )
        self._first_rollouts = FirstRollouts()
        self._num_rejected = self._rejected_in_a_row = 0
        self._is_feeding = False
        self._patience: asyncio.Timeout | None = None
        """Of the learner, while it waits for a batch."""
        self._stop = asyncio.Event()

    async def run(self, num_steps: int, *, steps_done: int = 0, beside: Sequence[Loop] = ()) -> int:
        """Train until `num_steps` are done or `stop` is called; returns the steps done. The loops `beside` run too.

        Raises: what the first failing loop raised, after stopping the others.
        """
        clock = asyncio.get_running_loop().time
        self._idle, self._steps_done = IdleTime(clock), steps_done
        async with self._loops.running():
            for worker in self._first_workers:
                self._workers.join(worker)
            for scorer in self._first_scorers:
                self._scorers.join(scorer)
            self._loops.start(self, self._learner.lost(), *beside)
            self._loops.start_last(self._train(num_steps, clock))
        return self._steps_done

    def stop(self) -> None:
        """End the run between two steps, or while the learner waits; what was sampled stays in the buffer."""
        self._stop.set()

    @property
    def samples(self) -> bool:
        """Documents are sampled and scored before they are trained on."""
        return self._without_rollouts is None

    def add_worker(self, worker: Worker[Weights, Sampled], *, on_trained: Callable[[], None]) -> None:
        """Let one more worker sample, from published weights on. `on_trained` is called when the learner is about to
        train on the first rollout of its own."""
        self._first_rollouts.expect(worker, on_trained)
        self._workers.join(worker)
        self._start_worker(worker)

    async def remove_worker(self, worker: Worker[Weights, Sampled]) -> None:
        """Give the worker no further tickets; returns when those it has are sampled and handed on."""
        await self._workers.leave(worker)
        self._dismiss(worker)

    def add_scorer(self, scorer: Scorer[Sampled, Scored], *, scores: bool = True) -> None:
        """Let one more server score; or only watch over it, if evaluations alone need it."""
        self._scorers.join(scorer)
        if scores:
            self._start_scorer(scorer)

    async def remove_scorer(self, scorer: Scorer[Sampled, Scored]) -> None:
        """Give the server no further rollouts; returns when those it has are scored."""
        await self._scorers.leave(scorer)

    async def lose(self, member: Member, failure: ProcessFailure) -> None:
        """A worker or server failed at something that it was asked for elsewhere; returns when others have its work."""
        for crew in (self._workers, self._scorers):
            if member in crew:
                return await crew.lose(member, failure)
        self._loops.start(self, self._on_failure(member, failure))

    async def _sample(self, worker: Worker[Weights, Sampled]) -> None:
        while worker in self._workers:
            with self._loops.holding_nothing(worker), self._idle.waiting("rollout/admission"):
                tickets = await self._buffer.claim(self._documents_per_request)
            if not tickets:
                return
            self._workers.hold(worker, tickets)
            self._first_rollouts.sampling(worker, tickets)
            async with self._weight_sync.prepare(worker, tickets, self._idle):
                sampled = await worker.sample(tickets)
            for summary, _ in sampled:
                self._metrics.observe("rollout/sample_s", summary.sample_s)
                self._metrics.observe("rollout/tokens", summary.num_completion_tokens)
            self._sampled.put_nowait(_Request(tickets, sampled))
            self._workers.hand_on(worker)
            self._note_progress()

    async def _score(self, scorer: Scorer[Sampled, Scored]) -> None:
        while scorer in self._scorers:
            with self._loops.holding_nothing(scorer), self._idle.waiting("score/rollouts"):
                request = await self._sampled.get()
            self._scorers.hold(scorer, request)
            scored = await scorer.score([reference for _, reference in request.sampled])
            await self._buffer.finish(
                [_arrival(*one) for one in zip(request.tickets, request.sampled, scored, strict=True)]
            )
            self._scorers.hand_on(scorer)
            self._note_progress()
            for summary, _ in scored:
                self._metrics.observe("score/score_s", summary.score_s)

    async def _after_worker_failed(self, worker: Member, failure: ProcessFailure) -> None:
        self._dismiss(worker)
        await self._on_failure(worker, failure)

    def _dismiss(self, worker: Member) -> None:
        """Nothing more will be heard from it, nor sent to it."""
        self._first_rollouts.forget(worker)
        self._learner.close_channel(worker.name)

    async def _sample_again(self, tickets: list[Ticket], failure: ProcessFailure) -> None:
        await self._buffer.give_back(tickets, error=str(failure))

    async def _score_again(self, request: _Request[Sampled], failure: ProcessFailure) -> None:
        """By another server; but sampled again if that may be the cause: one may have been lost with its node."""
        if isinstance(failure, ProcessLost) and not request.was_lost:
            request.was_lost = True
            self._sampled.put_nowait(request)
        else:
            await self._sample_again(request.tickets, failure)

    async def _pass_documents(self, as_scored: Callable[[Document], Scored]) -> None:
        while tickets := await self._buffer.claim(self._documents_per_request):
            arrivals = []
            for ticket in tickets:
                payload, version = as_scored(ticket.document), ticket.min_policy_version
                arrivals.append(Arrival(ticket=ticket, payload=payload, version=version, weight_steps=((0, version),)))
            await self._buffer.finish(arrivals)

    async def _train(self, num_steps: int, clock: Callable[[], float]) -> None:
        try:
            await self._unless_stopped(self._after_step(self._steps_done))
            self._start_feeding()
            while self._steps_done < num_steps:
                if self._stop.is_set():  # no wait may have been long enough to notice
                    raise _Stopped
                await self._step(self._steps_done + 1, clock)
                await self._unless_stopped(self._after_step(self._steps_done))
        except _Stopped:
            await self._buffer.settle()
            logger.info("stopped after step %d", self._steps_done)

    async def _step(self, step: int, clock: Callable[[], float]) -> None:
        """Train on batches until one can be applied, and publish what came of it."""
        start, waited = clock(), 0.0
        while True:
            begun = clock()
            with self._idle.waiting("learner/batch"):
                batch = await self._unless_stopped(self._next_batch(step))
            waited += clock() - begun
            self._first_rollouts.training(batch)
            if (step_metrics := await self._applied(step, batch)) is not None:
                break
        with self._idle.waiting("learner/publish"):
            await self._publish()
        self._steps_done = step
        self._metrics.observe("time/wait_for_batch_s", waited)
        self._metrics.observe("time/step_s", clock() - start)
        self._observe(batch)
        self._metrics.log_step(step, step_metrics)

    async def _applied(self, step: int, batch: Sequence[Use[Scored]]) -> dict[str, float] | None:
        """The step's metrics; None if it could not be applied.

        Raises: FloatingPointError if that happens too often in a row.
        """
        try:
            metrics = await self._learner.train_step(batch)
        except FloatingPointError as error:
            self._num_rejected += 1
            self._rejected_in_a_row += 1
            await self._buffer.reject(error=str(error))
            await self._on_rejected(step, batch)
            if self._rejected_in_a_row > MAX_REJECTED_IN_A_ROW:
                raise FloatingPointError(f"{self._rejected_in_a_row} batches in a row, the last: {error}") from error
            logger.warning("%s; another batch takes its place", error)
            return None
        self._rejected_in_a_row = 0
        return metrics

    async def _publish(self) -> None:
        await self._buffer.advance(await self._weight_sync.publish())
        self._weight_sync.forget(below=self._buffer.oldest_wanted_version)

    async def _next_batch(self, step: int) -> list[Use[Scored]]:
        """Waits as long as something is sampled or scored. Raises: TimeoutError saying who waits for what."""
        try:
            async with asyncio.timeout(self._batch_timeout_s) as self._patience:
                return await self._buffer.take()
        except TimeoutError as error:
            raise TimeoutError(self._who_waits(step)) from error
        finally:
            self._patience = None

    def _note_progress(self) -> None:
        """Something was sampled or scored: the learner waits on."""
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + self._batch_timeout_s)

    def _who_waits(self, step: int) -> str:
        held = [f"{name} samples {_ids(tickets)}" for name, tickets in self._workers.held.items()]
        held += [f"{name} scores {_ids(request.tickets)}" for name, request in self._scorers.held.items()]
        return (
            f"step {step} waited {self._batch_timeout_s:g} s for its documents, in which none was sampled or scored: "
            f"{self._buffer.num_scored} of {self._buffer.num_alive} admitted ones are scored, {self._sampled.qsize()} "
            f"requests wait for scoring; {'; '.join([*held, *self._idle.open])}. Raise asynchrony.request_timeout_s or "
            "add workers"
        )

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """Raises: _Stopped as soon as the run is to stop; the work is cancelled then."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            if task.cancelled():
                raise _Stopped
            return task.result()
        finally:
            task.cancel()
            stop.cancel()

    def _observe(self, batch: Sequence[Use[Scored]]) -> None:
        if self.samples:
            observe_rollouts(self._metrics, batch, lag_bound=self._lag_bound)
            self._metrics.observe("rollout/workers", len(self._workers))
        observe_buffer(self._metrics, self._buffer)
        self._metrics.observe("learner/rejected", self._num_rejected)
        sizes = {"rollout": len(self._workers), "score": len(self._scorers), "learner": 1}
        observe_idle_time(self._metrics, self._idle, sizes=sizes)

    def _start_feeding(self) -> None:
        self._is_feeding = True
        if self._without_rollouts is not None:
            self._loops.start(self, self._pass_documents(self._without_rollouts))
            return
        for worker in self._workers:
            self._start_worker(worker)
        for scorer in self._scorers:
            self._start_scorer(scorer)

    def _start_worker(self, worker: Worker[Weights, Sampled]) -> None:
        if self._is_feeding:
            self._workers.start(worker, self._sample(worker), self._weight_sync.push_updates(worker))

    def _start_scorer(self, scorer: Scorer[Sampled, Scored]) -> None:
        if self._is_feeding:
            self._scorers.start(scorer, self._score(scorer))


def _ids(tickets: Sequence[Ticket]) -> list[int]:
    return [ticket.ticket_id for ticket in tickets]


def _arrival(
    ticket: Ticket, sampled: tuple[RolloutSummary, Sampled], scored: tuple[ScoreSummary, Scored]
) -> Arrival[Scored]:
    (summary, _), (_, payload) = sampled, scored
    return Arrival(
        ticket=ticket, payload=payload, version=summary.min_policy_version, weight_steps=summary.weight_steps
    )
