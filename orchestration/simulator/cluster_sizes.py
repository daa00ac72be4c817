"""Simulated pipelines side by side: gain over the synchronous one, the bottleneck, the smallest that is fast enough."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestration.asynchrony_config import LagConfig
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulator import Simulated, simulate
from orchestration.simulator.stage_times import StageTimes
from orchestration.simulator.table import padded_table

GOOD_ENOUGH = 0.95
"""Share of the best rate that a smaller setting has to reach."""

BUSY = 0.9
"""Share of its time that a role must be at work to be what limits the rate."""

WAITS = {"rollout workers": "rollout/admission", "scorers": "score/rollouts", "learner": "learner/batch"}
"""Role -> what it waits for if another role is slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One row: a pipeline and its result."""

    pipeline: Pipeline
    simulated: Simulated
    speedup: float
    """Rate over that of the same processes with max_lag 0."""
    ideal_speedup: float
    """Its stage_times.ideal_speedup."""

    @property
    def bottleneck(self) -> str:
        """The role that hardly ever waits for another; `max_lag` if all of them do, because the bound holds them."""
        role = min(WAITS, key=lambda role: self.simulated.idle[WAITS[role]])
        return role if self.simulated.idle[WAITS[role]] <= 1 - BUSY else "max_lag"

    @property
    def cost(self) -> tuple[int, int, int]:
        """What makes one setting smaller than another: processes besides the learner, then lag, then workers."""
        workers, scorers = self.pipeline.rollout_workers, self.pipeline.scorers
        return workers + scorers, self.pipeline.asynchrony.max_lag, workers


def compare(pipelines: Sequence[Pipeline], times: StageTimes, *, num_steps: int, seed: int) -> list[Size]:
    """Simulate each of them, and the synchronous algorithm on the same processes.

    All are measured in the same steps, so that the learner's random durations are the same in all of them.
    """
    warm_up_steps = max(pipeline.warm_up_steps for pipeline in pipelines)

    @functools.cache
    def simulated(pipeline: Pipeline) -> Simulated:
        return simulate(pipeline, times, num_steps=num_steps, warm_up_steps=warm_up_steps, seed=seed)

    return [
        Size(
            pipeline=pipeline,
            simulated=simulated(pipeline),
            speedup=simulated(pipeline).steps_per_s / simulated(synchronous(pipeline)).steps_per_s,
            ideal_speedup=pipeline.ideal_speedup(times),
        )
        for pipeline in pipelines
    ]


def synchronous(pipeline: Pipeline) -> Pipeline:
    """The same processes and reuse, with max_lag 0."""
    lag_0 = {"mode": "bounded", "lag_rule": "in_order", "max_lag": 0, "prefetch_steps": None}
    asynchrony = LagConfig.model_validate(pipeline.asynchrony.model_dump() | lag_0)
    return replace(pipeline, asynchrony=asynchrony)


def smallest_good(sizes: Sequence[Size]) -> Size:
    """The smallest one whose rate is nearly the best."""
    best = max(size.simulated.steps_per_s for size in sizes)
    return min((s for s in sizes if s.simulated.steps_per_s >= GOOD_ENOUGH * best), key=lambda size: size.cost)


def as_table(sizes: Sequence[Size]) -> str:
    """Markdown, one row per pipeline."""
    return padded_table([_cells(size) for size in sizes])


def _cells(size: Size) -> dict[str, str]:
    """Column -> text."""
    pipeline, simulated, lag = size.pipeline, size.simulated, size.simulated.lag
    return {
        "workers": str(pipeline.rollout_workers),
        "scorers": str(pipeline.scorers),
        "max_lag": str(pipeline.asynchrony.max_lag),
        "steps/s": f"{simulated.steps_per_s:.3g}",
        "documents/s": f"{simulated.documents_per_s:.3g}",
        "speed-up": f"{size.speedup:.2f}",
        "ideal": f"{size.ideal_speedup:.2f}",
        "of ideal": f"{simulated.share_of_ideal:.0%}",
        "lag mean": f"{lag.mean:.2f}",
        "in flight + queue + reuse": f"{lag.in_flight:.2f} + {lag.in_queue:.2f} + {lag.reuse:.2f}",
        "lag max": str(lag.largest),
        "dropped/step": f"{simulated.dropped_per_step:.2g}",
        "idle: admission": f"{simulated.idle['rollout/admission']:.0%}",
        "weights": f"{simulated.idle['rollout/weights']:.0%}",
        "rollouts": f"{simulated.idle['score/rollouts']:.0%}",
        "batch": f"{simulated.idle['learner/batch']:.0%}",
        "bottleneck": size.bottleneck,
    }
