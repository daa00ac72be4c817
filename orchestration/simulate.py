"""Predict a cluster's speed: `python orchestration/simulate.py [config.toml] --times-from outputs/RUN/metrics.jsonl`.

Runs the real loops, buffer and lag rules in virtual time between roles that only sleep, once for every combination
of `--rollout-workers`, `--scorers` and `--max-lag`. Needs no cluster, no Ray, no model. docs/simulator.md says what the
columns mean and what the prediction leaves out. With `--faults.per-minute` or `--faults.learner-per-minute` it also
says what share of the time is useful when processes fail.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # as in run.py: orchestration/ itself must not hide the standard library

from orchestration.simulator.cluster_sizes import GOOD_ENOUGH, Size, as_table, compare, smallest_good  # noqa: E402
from orchestration.simulator.fault_costs import as_table as costs_table  # noqa: E402
from orchestration.simulator.fault_costs import fault_costs  # noqa: E402
from orchestration.simulator.simulate_config import SimulateConfig, parse_simulation  # noqa: E402
from orchestration.simulator.stage_times import StageTime, StageTimes  # noqa: E402
from orchestration.start_up import refuse, start_command  # noqa: E402


def main() -> int:
    """Exit status: 0 done, 2 refused before anything was simulated."""
    start_command(sys.argv[1:], level="warning")
    try:
        config = parse_simulation(sys.argv[1:])
        times = config.stage_times()
        sizes = compare(config.pipelines, times, num_steps=config.num_steps, seed=config.seed)
        costs = _fault_costs(config, times)
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    sys.stdout.write("\n\n".join([_head(config, times), as_table(sizes), _verdict(sizes), *costs]) + "\n")
    return 0


def _head(config: SimulateConfig, times: StageTimes) -> str:
    """What was simulated."""
    stages = (f"{name} {_seconds(getattr(times, name))}" for name in StageTimes.__dataclass_fields__)
    learner, asynchrony = config.learner, config.asynchrony
    reuse = f", each used {asynchrony.max_uses} times" if asynchrony.max_uses > 1 else ""
    return (
        f"Stage times: {', '.join(stages)}{f'; from {config.times_from}' if config.times_from else ''}.\n"
        f"{learner.documents_per_step} documents per step{reuse}, {config.rollout.documents_per_request} per request; "
        f"lag rule {asynchrony.rule}."
    )


def _verdict(sizes: list[Size]) -> str:
    """Which setting to take, and why not a smaller one."""
    best, chosen = max(sizes, key=lambda size: size.simulated.steps_per_s), smallest_good(sizes)
    return (
        f"Best: {_name(best)}, {best.simulated.steps_per_s:.3g} steps/s.\n"
        f"Smallest within {1 - GOOD_ENOUGH:.0%} of it: {_name(chosen)}, {chosen.simulated.steps_per_s:.3g} steps/s; "
        f"bottleneck: {chosen.bottleneck}."
    )


def _fault_costs(config: SimulateConfig, times: StageTimes) -> list[str]:
    """What faults cost, if there are any."""
    of_all = config.faults.faults
    if not of_all.kinds:
        return []
    costs = fault_costs(config.pipelines, times, of_all, num_steps=config.num_steps, seed=config.seed)
    faults = config.faults
    head = (
        f"Faults: {faults.per_minute:g} per minute of each worker and server ({_within_a_minute(faults.per_minute)}), "
        f"another is up after {faults.restart_s:g} s; {faults.learner_per_minute:g} per minute of the learner, which "
        f"goes on after {faults.learner_restart_s:g} s from a checkpoint of every {faults.checkpoint_steps} steps."
    )
    return [head, costs_table(costs)]


def _within_a_minute(per_minute: float) -> str:
    return f"{-math.expm1(-per_minute):.1%} fail within one"


def _name(size: Size) -> str:
    pipeline = size.pipeline
    return (
        f"rollout_workers {pipeline.rollout_workers}, scorers {pipeline.scorers}, max_lag {pipeline.asynchrony.max_lag}"
    )


def _seconds(stage: StageTime) -> str:
    return f"{stage.mean_s:.3g} s" + (f" +- {stage.cv:.0%}" if stage.cv else "")


if __name__ == "__main__":
    sys.exit(main())
