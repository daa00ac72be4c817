"""The pipeline in virtual time: the loops, buffer, pool and weight sync of a run, between roles that only sleep.

`simulate` runs Controller, RolloutBuffer, ReusePool and WeightSync as a run does; what it predicts is therefore what
they decide, given how long each stage takes. No model, Ray or engine takes part.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.config import InFlightUpdates
from actors.rollout import Document, RolloutSummary
from orchestration.asynchrony_config import LagConfig
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.uses import Lag
from orchestration.controller import Controller
from orchestration.output.metrics import METRICS, MetricsLog
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.simulated_roles import SimulatedLearner, SimulatedScorer, SimulatedWorker
from orchestration.simulator.stage_times import StageTimes, ideal_speedup, longest_stage_s
from orchestration.simulator.virtual_time import run_in_virtual_time

NEVER_S = 1e9
"""Time-out of a batch [virtual s]: reached only in a deadlock."""

DOCUMENT = Document(
    document_id="any", token_ids=np.arange(2), anchors=np.array([1]), horizon=1, ends_with_eos=False
)  # fmt: skip
"""Stands for every document: its content does not matter here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How many processes there are, and the settings that decide what waits for what."""

    rollout_workers: int
    scorers: int
    documents_per_step: int
    documents_per_request: int
    asynchrony: LagConfig
    in_flight_updates: InFlightUpdates = "wait"
    """As rollout.in_flight_updates."""

    @property
    def warm_up_steps(self) -> int:
        """Steps until the initial filling of buffer and pool has no effect any more, and some more."""
        return 10 + self.asynchrony.effective_prefetch_steps + self.asynchrony.max_lag + self.asynchrony.max_uses

    def longest_stage_s(self, times: StageTimes) -> float:
        """Its stage_times.longest_stage_s."""
        return longest_stage_s(times, **self._cluster)

    def ideal_speedup(self, times: StageTimes) -> float:
        """Its stage_times.ideal_speedup."""
        return ideal_speedup(times, **self._cluster)

    @property
    def _cluster(self) -> dict[str, int]:
        return {
            "rollout_workers": self.rollout_workers,
            "scorers": self.scorers,
            "fresh_documents": self.documents_per_step // self.asynchrony.max_uses,
            "documents_per_request": self.documents_per_request,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LagSummary:
    """Lag of what was trained on [learner steps], each use counted."""

    counts: Mapping[int, int]
    """Lag -> uses that had it."""
    in_flight: float
    """Mean of this part of the lag, as in rollout_buffer.Lag."""
    in_queue: float
    reuse: float

    @property
    def mean(self) -> float:
        """Mean lag."""
        return self.in_flight + self.in_queue + self.reuse

    @property
    def largest(self) -> int:
        """Largest lag."""
        return max(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The result, after the warm-up."""

    steps_per_s: float
    documents_per_s: float
    """Documents trained on, each use counted."""
    share_of_ideal: float
    """Rate over that of the busiest role if it never waited: steps_per_s * longest_stage_s. Noise may lift it above 1
    where stage times vary."""
    idle: Mapping[str, float]
    """Share of a role's time that it waited, by `role/reason` as in the metrics `idle/*`."""
    lag: LagSummary
    dropped_per_step: float
    """Documents per step that were sampled and scored, and then stale."""
    expired_per_step: float
    """Rollouts per step that exceeded max_reuse_lag."""


def simulate(
    pipeline: Pipeline, times: StageTimes, *, num_steps: int, warm_up_steps: int | None = None, seed: int = 0
) -> Simulated:
    """Run the pipeline in virtual time and sum up the `num_steps` that follow its warm-up (None: its own; at least 1).

    Equal arguments give equal results: every duration is a function of the seed and of what it is the duration of.

    Raises: ValueError if no role has anything to do.
    """
    longest_s = pipeline.longest_stage_s(times)
    if longest_s == 0:
        raise ValueError("all stage times are 0 s, so there is nothing to simulate; give those of a run")
    warm_up_steps = pipeline.warm_up_steps if warm_up_steps is None else warm_up_steps
    rows, lags = run_in_virtual_time(run_pipeline(pipeline, times, num_steps=warm_up_steps + num_steps, seed=seed))
    before, measured = rows[warm_up_steps - 1], rows[warm_up_steps:]
    steps_per_s = num_steps / (measured[-1]["time/elapsed_s"] - before["time/elapsed_s"])
    return Simulated(
        steps_per_s=steps_per_s,
        documents_per_s=steps_per_s * pipeline.documents_per_step,
        share_of_ideal=steps_per_s * longest_s,
        idle=_idle(before, measured),
        lag=_summary([lag for of_step in lags[warm_up_steps:] for lag in of_step]),
        dropped_per_step=(measured[-1]["tickets/dropped"] - before["tickets/dropped"]) / num_steps,
        expired_per_step=(measured[-1]["reuse/expired"] - before["reuse/expired"]) / num_steps,
    )


class _Rows(list[dict[str, float]]):
    """A sink that keeps the rows."""

    def write(self, row: Mapping[str, float]) -> None:
        self.append(dict(row))

    def close(self) -> None:
        pass


async def run_pipeline(
    pipeline: Pipeline, times: StageTimes, *, num_steps: int, seed: int
) -> tuple[list[dict[str, float]], list[list[Lag]]]:
    """What session.py does, with simulated roles: the row of each step, and the lags that were trained on in it."""
    rows = _Rows()
    metrics = MetricsLog([rows], clock=asyncio.get_running_loop().time)
    learner = SimulatedLearner(times, seed=seed)
    weight_sync = WeightSync(learner, metrics, push=pipeline.asynchrony.mode != "exact")
    controller = Controller(
        buffer=_buffer(pipeline, seed=seed),
        rollout_workers=[
            SimulatedWorker(f"worker {i}", times, seed=seed, in_flight_updates=pipeline.in_flight_updates)
            for i in range(pipeline.rollout_workers)
        ],
        scorers=[SimulatedScorer(f"server {i}", times, seed=seed) for i in range(pipeline.scorers)],
        learner=learner,
        weight_sync=weight_sync,
        metrics=metrics,
        documents_per_request=pipeline.documents_per_request,
        batch_timeout_s=NEVER_S,
        after_step=_nothing,
    )
    await weight_sync.publish()
    await controller.run(num_steps)
    return rows, learner.lags


def _buffer(pipeline: Pipeline, *, seed: int) -> RolloutBuffer[RolloutSummary]:
    asynchrony = pipeline.asynchrony
    pool = ReusePool(
        documents_per_step=pipeline.documents_per_step,
        max_uses=asynchrony.max_uses,
        max_reuse_lag=asynchrony.max_reuse_lag,
        order=asynchrony.reuse_order,
        seed=seed,
    )
    return RolloutBuffer(
        lambda count: [DOCUMENT] * count,
        pool=pool,
        num_steps=sys.maxsize,  # the controller stops before admission ends: the last steps are like all others
        lag_rule=asynchrony.rule,
        max_lag=asynchrony.max_lag,
        prefetch_steps=asynchrony.effective_prefetch_steps,
        completions_per_context=1,
        seed=seed,
    )


async def _nothing(step: int) -> None:
    pass


def _idle(before: dict[str, float], measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Idle share of all measured time by reason, from the share of each interval."""
    lengths = np.diff([row["time/elapsed_s"] for row in (before, *measured)])
    return {
        name.removeprefix("idle/").removesuffix("_frac"): float(
            np.average([row.get(name, 0.0) for row in measured], weights=lengths)
        )
        for name in METRICS
        if name.startswith("idle/")
    }


def _summary(lags: Sequence[Lag]) -> LagSummary:
    return LagSummary(
        counts=Counter(lag.total for lag in lags),
        **{part: sum(getattr(lag, part) for lag in lags) / len(lags) for part in ("in_flight", "in_queue", "reuse")},
    )
