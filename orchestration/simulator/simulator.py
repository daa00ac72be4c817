"""The pipeline in virtual time: the loops, buffer, pool and weight sync of a run, between roles that only sleep.

`simulate` runs Controller, RolloutBuffer, ReusePool and WeightSync as a run does; what it predicts is therefore what
they decide, given how long each stage takes. No model, Ray or engine takes part.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestration.buffer.uses import Lag
from orchestration.output.metrics import METRICS
from orchestration.simulator.faults import NO_FAULTS, Faults
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulated_run import SimulatedRun
from orchestration.simulator.stage_times import StageTimes
from orchestration.simulator.virtual_time import run_in_virtual_time


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
    num_faults: int
    """Of all processes, in the warm-up too."""


def simulate(
    pipeline: Pipeline,
    times: StageTimes,
    *,
    num_steps: int,
    warm_up_steps: int | None = None,
    faults: Faults = NO_FAULTS,
    seed: int = 0,
) -> Simulated:
    """Run the pipeline in virtual time and sum up the `num_steps` that follow its warm-up (None: its own; at least 1).

    Equal arguments give equal results: every duration is a function of the seed and of what it is the duration of.

    Raises: ValueError if no role has anything to do, or if a learner that fails would need weights that are gone.
    """
    longest_s = pipeline.longest_stage_s(times)
    if longest_s == 0:
        raise ValueError("all stage times are 0 s, so there is nothing to simulate; give those of a run")
    if faults.learner_per_minute > 0 and pipeline.asynchrony.mode == "exact":
        raise ValueError(
            "asynchrony.mode='exact' samples with older weights than a checkpoint holds, so faults of the learner are "
            "not simulated; set faults.learner_per_minute=0, or another mode"
        )
    warm_up_steps = pipeline.warm_up_steps if warm_up_steps is None else warm_up_steps
    run = run_in_virtual_time(run_pipeline(pipeline, times, faults, num_steps=warm_up_steps + num_steps, seed=seed))
    start = next(index for index, row in enumerate(run.rows) if row["step"] == warm_up_steps)
    before, measured = run.rows[start], run.rows[start + 1 :]
    steps_per_s = num_steps / (measured[-1]["time/elapsed_s"] - before["time/elapsed_s"])
    return Simulated(
        steps_per_s=steps_per_s,
        documents_per_s=steps_per_s * pipeline.documents_per_step,
        share_of_ideal=steps_per_s * longest_s,
        idle=_idle(before, measured),
        lag=_summary([lag for of_step in run.lags[warm_up_steps:] for lag in of_step]),
        dropped_per_step=(measured[-1]["tickets/dropped"] - before["tickets/dropped"]) / num_steps,
        expired_per_step=(measured[-1]["reuse/expired"] - before["reuse/expired"]) / num_steps,
        num_faults=run.num_faults.total(),
    )


async def run_pipeline(
    pipeline: Pipeline, times: StageTimes, faults: Faults = NO_FAULTS, *, num_steps: int, seed: int
) -> SimulatedRun:
    """One run of so many steps, when it has ended."""
    run = SimulatedRun(pipeline, times, faults, seed=seed)
    await run.play(num_steps)
    return run


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
