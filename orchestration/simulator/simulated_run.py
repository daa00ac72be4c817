"""One run in virtual time: the real loops, buffer and weight sync between simulated roles, through every fault.

What recovers from a fault is what does so in a real run. The controller gives what a lost worker or server had to
others, and here another one joins after Faults.restart_s. When the learner is lost, the run goes on from its last
checkpoint: with the buffer as it was then, and so with the rollouts that waited in it.
"""

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from actors.rollout import Document, RolloutSummary
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Lag
from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.loops.controller import Controller
from orchestration.output.metrics import MetricsLog
from orchestration.roles.protocols import Member
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.faults import Faults, lifetime_s
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulated_roles import (
    SimulatedLearner,
    SimulatedPublication,
    SimulatedScorer,
    SimulatedWorker,
)
from orchestration.simulator.stage_times import StageTimes

NEVER_S = 1e9
"""Time-out of a batch [virtual s]: reached only in a deadlock."""

DOCUMENT = Document(
    document_id="any", token_ids=np.arange(2), anchors=np.array([1]), horizon=1, ends_with_eos=False
)  # fmt: skip
"""Stands for every document: its content does not matter here."""

SimulatedController = Controller[SimulatedPublication, RolloutSummary, RolloutSummary]


class Rows(list[dict[str, float]]):
    """A sink that keeps the rows."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take one row."""
        self.append(dict(row))

    def close(self) -> None:
        """Nothing to release."""


class SimulatedRun:
    """What session.py does, with simulated roles. To be made inside of the event loop that it runs in."""

    def __init__(
        self,
        pipeline: Pipeline,
        times: StageTimes,
        faults: Faults,
        *,
        seed: int,
        record: Callable[[dict[str, object]], None] = lambda event: None,
    ) -> None:
        """`record` receives what a buffer logs."""
        self._pipeline, self._times, self._faults, self._seed = pipeline, times, faults, seed
        self.rows = Rows()
        """Of each step, in the order of time: steps that were done again have several."""
        self.num_faults: Counter[str] = Counter()
        """By role."""
        self._metrics = MetricsLog([self.rows], clock=asyncio.get_running_loop().time)
        self._names = {role: (f"{role} {number}" for number in itertools.count()) for role in ("worker", "server")}
        self._documents = (replace(DOCUMENT, document_id=str(number)) for number in itertools.count())
        self._record = record
        self._start()
        self._note_checkpoint(0)

    @property
    def lags(self) -> list[list[Lag]]:
        """Of each step, of each use."""
        return self.learner.lags

    async def play(self, num_steps: int) -> None:
        """All steps; after each fault of the learner those since its last checkpoint again."""
        steps_done = 0
        while True:
            try:
                await self._weight_sync.publish()
                await self._controller.run(num_steps, steps_done=steps_done)
                return
            except ProcessLost as loss:
                if loss.process != self.learner.name:
                    raise
            self.num_faults["learner"] += 1
            await asyncio.sleep(self._faults.learner_restart_s)
            state, payloads, lags = self._checkpoint
            self._start(lags)
            self.buffer.restore(state, payloads)
            steps_done = state.step

    def _start(self, lags: list[list[Lag]] | None = None) -> None:
        """All processes and parts, anew; `lags`: of the steps that are done."""
        lifetime = lifetime_s(self._faults.learner_per_minute, self._seed, "learner", self.num_faults["learner"])
        self.learner = SimulatedLearner(self._times, seed=self._seed, lags=lags, lifetime_s=lifetime)
        self._weight_sync = WeightSync(self.learner, self._metrics, push=self._pipeline.asynchrony.mode != "exact")
        self.buffer = self._new_buffer()
        self._controller: SimulatedController = Controller(
            buffer=self.buffer,
            rollout_workers=[self._worker(version=len(self.lags)) for _ in range(self._pipeline.rollout_workers)],
            scorers=[self._scorer() for _ in range(self._pipeline.scorers)],
            learner=self.learner,
            weight_sync=self._weight_sync,
            metrics=self._metrics,
            documents_per_request=self._pipeline.documents_per_request,
            batch_timeout_s=NEVER_S,
            after_step=self._after_step,
            on_failure=self._replace,
        )

    async def _after_step(self, step: int) -> None:
        if self._faults.learner_per_minute > 0 and step % self._faults.checkpoint_steps == 0:
            self._note_checkpoint(step)

    def _note_checkpoint(self, step: int) -> None:
        self._checkpoint = (*self.buffer.state(), self.lags[:step])

    async def _replace(self, member: Member, failure: ProcessFailure) -> None:
        self.num_faults["worker" if isinstance(member, SimulatedWorker) else "server"] += 1
        await asyncio.sleep(self._faults.restart_s)
        if isinstance(member, SimulatedWorker):
            self._controller.add_worker(self._worker(version=None), on_trained=lambda: None)
        else:
            self._controller.add_scorer(self._scorer())

    def _worker(self, *, version: int | None) -> SimulatedWorker:
        name = next(self._names["worker"])
        return SimulatedWorker(
            name,
            self._times,
            seed=self._seed,
            in_flight_updates=self._pipeline.in_flight_updates,
            policy_version=version,
            lifetime_s=lifetime_s(self._faults.workers_per_minute, self._seed, name),
        )

    def _scorer(self) -> SimulatedScorer:
        name = next(self._names["server"])
        lifetime = lifetime_s(self._faults.scorers_per_minute, self._seed, name)
        return SimulatedScorer(name, self._times, seed=self._seed, lifetime_s=lifetime)

    def _new_buffer(self) -> RolloutBuffer[RolloutSummary]:
        asynchrony = self._pipeline.asynchrony
        pool = ReusePool(
            documents_per_step=self._pipeline.documents_per_step,
            max_uses=asynchrony.max_uses,
            max_reuse_lag=asynchrony.max_reuse_lag,
            order=asynchrony.reuse_order,
            seed=self._seed,
        )
        return RolloutBuffer(
            lambda count: list(itertools.islice(self._documents, count)),
            pool=pool,
            num_steps=sys.maxsize,  # the controller stops before admission ends: the last steps are like all others
            lag_rule=asynchrony.rule,
            max_lag=asynchrony.max_lag,
            prefetch_steps=asynchrony.effective_prefetch_steps,
            completions_per_context=1,
            seed=self._seed,
            record=self._record,
        )
