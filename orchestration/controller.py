"""The loops of a run.

    documents --tickets--> sample (one loop per rollout worker)
        ^                     | rollout references
        | admission           v
        |                  score (one loop per feature or verifier server)
        |                     | scored references, back in ticket order
        |                     v
        +---- publish <--- train (one loop): take -> train_step -> publish -> advance

Each worker pulls the newest published weights just before it samples, so weights never interrupt a request and never
stop the learner. Rollouts and weights pass by reference; only summaries and metrics come here. The first loop that
fails ends all others, and its error is the run's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from actors.rollout import Document, Ticket
from orchestration.metrics import MetricsLog
from orchestration.roles import LearnerRole, RolloutRole, ScorerRole
from orchestration.rollout_buffer import RolloutBuffer
from orchestration.weight_sync import WeightSync


class Controller:
    """Runs the roles against each other until the last step is done."""

    def __init__(
        self,
        *,
        buffer: RolloutBuffer,
        rollout_workers: Sequence[RolloutRole],
        scorers: Sequence[ScorerRole],
        learner: LearnerRole,
        weight_sync: WeightSync,
        metrics: MetricsLog,
        documents_per_request: int,
        batch_timeout_s: float,
        after_step: Callable[[int], Awaitable[None]],
        without_rollouts: Callable[[Document], object] | None = None,
    ) -> None:
        """`after_step(step)` is awaited after each publication, before the next step. `without_rollouts`, if given,
        replaces sampling and scoring: it turns a document into what the learner takes."""
        self._buffer = buffer
        self._workers = rollout_workers
        self._scorers = scorers
        self._learner = learner
        self._weight_sync = weight_sync
        self._metrics = metrics
        self._documents_per_request = documents_per_request
        self._batch_timeout_s = batch_timeout_s
        self._after_step = after_step
        self._without_rollouts = without_rollouts
        self._sampled: asyncio.Queue[tuple[Ticket, object]] = asyncio.Queue()

    async def run(self, num_steps: int) -> None:
        """Train for `num_steps`. Raises what the first failing loop raised, after stopping the others."""
        try:
            async with asyncio.TaskGroup() as loops:
                feeding = [loops.create_task(loop) for loop in self._feeding_loops()]
                training = loops.create_task(self._train(num_steps))
                training.add_done_callback(lambda _: [task.cancel() for task in feeding])
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    def _feeding_loops(self) -> list[Awaitable[None]]:
        if self._without_rollouts is not None:
            return [self._pass_documents()]
        return [*map(self._sample, self._workers), *map(self._score, self._scorers)]

    async def _sample(self, worker: RolloutRole) -> None:
        while True:
            start = time.perf_counter()
            tickets = await self._buffer.claim(self._documents_per_request)
            if not tickets:
                return
            self._metrics.observe("rollout/wait_for_admission_s", time.perf_counter() - start)
            sampled = await self._weight_sync.sample(worker, tickets)
            for ticket, (summary, reference) in zip(tickets, sampled, strict=True):
                self._metrics.observe("rollout/sample_s", summary.sample_s)
                self._metrics.observe("rollout/tokens", summary.num_completion_tokens)
                self._sampled.put_nowait((ticket, reference))

    async def _score(self, scorer: ScorerRole) -> None:
        while True:
            batch = [await self._sampled.get()]
            while not self._sampled.empty() and len(batch) < self._documents_per_request:
                batch.append(self._sampled.get_nowait())
            scored = await scorer.score([reference for _, reference in batch])
            for (ticket, _), (summary, reference) in zip(batch, scored, strict=True):
                self._metrics.observe("score/score_s", summary.score_s)
                await self._buffer.finish(ticket, reference)

    async def _pass_documents(self) -> None:
        while tickets := await self._buffer.claim(self._documents_per_request):
            for ticket in tickets:
                await self._buffer.finish(ticket, self._without_rollouts(ticket.document))

    async def _train(self, num_steps: int) -> None:
        for step in range(1, num_steps + 1):
            start = time.perf_counter()
            batch = await self._next_batch(step)
            waited = time.perf_counter() - start
            step_metrics = await self._learner.train_step([scored.payload for scored in batch])
            await self._buffer.advance(await self._weight_sync.publish())
            self._metrics.observe("time/wait_for_batch_s", waited)
            self._metrics.observe("time/step_s", time.perf_counter() - start)
            self._metrics.observe("buffer/scored", self._buffer.num_scored)
            self._metrics.observe("buffer/alive", self._buffer.num_alive)
            self._metrics.log_step(step, step_metrics)
            await self._after_step(step)

    async def _next_batch(self, step: int) -> list:
        try:
            async with asyncio.timeout(self._batch_timeout_s):
                return await self._buffer.take()
        except TimeoutError as error:
            raise TimeoutError(
                f"step {step} waited {self._batch_timeout_s:g} s for its documents: {self._buffer.num_scored} of "
                f"{self._buffer.num_alive} admitted ones are scored, {self._sampled.qsize()} wait for scoring; "
                "raise asynchrony.request_timeout_s or add workers"
            ) from error
