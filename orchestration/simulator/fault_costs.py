"""What faults cost: the rate of each pipeline with them over its rate without, of all roles and of each alone."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestration.simulator.faults import NO_FAULTS, Faults
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulator import Simulated, simulate
from orchestration.simulator.stage_times import StageTimes
from orchestration.simulator.table import padded_table


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCost:
    """One pipeline, with the same draws of every stage time in each of its simulations."""

    pipeline: Pipeline
    without: Simulated
    with_all: Simulated
    alone: Mapping[str, Simulated]
    """By role, if only that one fails."""

    @property
    def useful(self) -> float:
        """Share of useful time: of the steps that the run would have done without faults, those that it did."""
        return self.with_all.steps_per_s / self.without.steps_per_s

    @property
    def useful_alone(self) -> dict[str, float]:
        """The same by role, if only that one fails: the smallest says what dominates."""
        return {role: simulated.steps_per_s / self.without.steps_per_s for role, simulated in self.alone.items()}


def fault_costs(
    pipelines: Sequence[Pipeline], times: StageTimes, faults: Faults, *, num_steps: int, seed: int
) -> list[FaultCost]:
    """Simulate each without faults, with those of each role alone, and with all of them."""

    @functools.cache
    def simulated(pipeline: Pipeline, faults: Faults) -> Simulated:
        return simulate(pipeline, times, num_steps=num_steps, faults=faults, seed=seed)

    return [
        FaultCost(
            pipeline=pipeline,
            without=simulated(pipeline, NO_FAULTS),
            with_all=simulated(pipeline, faults),
            alone={role: simulated(pipeline, of_role) for role, of_role in faults.kinds.items()},
        )
        for pipeline in pipelines
    ]


def as_table(costs: Sequence[FaultCost]) -> str:
    """Markdown, one row per pipeline."""
    return padded_table([_cells(cost) for cost in costs])


def _cells(cost: FaultCost) -> dict[str, str]:
    pipeline = cost.pipeline
    return {
        "workers": str(pipeline.rollout_workers),
        "scorers": str(pipeline.scorers),
        "max_lag": str(pipeline.asynchrony.max_lag),
        "steps/s without faults": f"{cost.without.steps_per_s:.3g}",
        "with": f"{cost.with_all.steps_per_s:.3g}",
        "faults": str(cost.with_all.num_faults),
        "useful time": f"{cost.useful:.1%}",
    } | {f"if only {role} fail": f"{share:.1%}" for role, share in cost.useful_alone.items()}
