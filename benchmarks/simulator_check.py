"""How far the simulator is off on finished runs: predicted against measured step time and mean lag.

    python benchmarks/simulator_check.py outputs/RUN [outputs/RUN ...] [--num-steps 100]

Each folder's config.toml says what is simulated, its metrics.jsonl how long the stages took, and the steps. Runs that
sampled nothing or are too short are left out, with the reason.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import tyro  # noqa: E402

from orchestration.command_line import load  # noqa: E402
from orchestration.config import RunConfig  # noqa: E402
from orchestration.simulator.measured_times import SKIPPED_STEPS  # noqa: E402
from orchestration.simulator.pipeline import Pipeline  # noqa: E402
from orchestration.simulator.simulate_config import parse_simulation  # noqa: E402
from orchestration.simulator.simulator import simulate  # noqa: E402
from orchestration.simulator.stage_times import StageTimes  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Check:
    """Compare predicted and measured steps and lags."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs."""
    num_steps: int = 100
    """Steps that are simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Averages over a run's steps, evaluations left out."""

    step_s: float
    """Mean time per step [s]."""
    mean_lag: float
    """Over all that was trained on [learner steps]."""
    idle: float
    """Share of the learner's time that it waited for a batch."""


def measured(folder: Path) -> Steps:
    """Of a run, after its first few steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step_s" in row and row["step"] > SKIPPED_STEPS]
    step_s = statistics.mean(row["time/step_s"] for row in steps)
    return Steps(
        step_s=step_s,
        mean_lag=statistics.mean(row["lag/mean"] for row in steps),
        idle=statistics.mean(row["time/wait_for_batch_s"] for row in steps) / step_s,
    )


def predicted(folder: Path, *, num_steps: int) -> Steps:
    """What the simulator says, from the stage times of the run itself."""
    pipeline, times = pipeline_of(folder)
    simulated = simulate(pipeline, times, num_steps=num_steps)
    return Steps(step_s=1 / simulated.steps_per_s, mean_lag=simulated.lag.mean, idle=simulated.idle["learner/batch"])


def pipeline_of(folder: Path) -> tuple[Pipeline, StageTimes]:
    """The processes and rules of a run, and how long its stages took.

    Raises: ValueError if it sampled nothing or is too short.
    """
    file = folder / "config.toml"
    config = parse_simulation([str(file), "--times-from", str(folder / "metrics.jsonl")])
    pipeline = config.pipeline(
        rollout_workers=load(RunConfig, file).placement.rollout.count,
        scorers=config.numbers_of_scorers[0],
        max_lag=config.asynchrony.max_lag,
    )
    return pipeline, config.stage_times()


def main(check: Check) -> None:
    """One row per run, and how far all of them are off."""
    print("| run | step measured [s] | predicted [s] | off by | mean lag measured | predicted |")
    print("| --- | --- | --- | --- | --- | --- |")
    errors, lag_errors = [], []
    for folder in check.runs:
        try:
            found = predicted(folder, num_steps=check.num_steps)
        except (ValueError, FileNotFoundError) as error:
            print(f"left out: {folder}: {error}", file=sys.stderr)
            continue
        real = measured(folder)
        errors.append(found.step_s / real.step_s - 1)
        lag_errors.append(abs(found.mean_lag - real.mean_lag))
        print(
            f"| {folder.name} | {real.step_s:.3f} | {found.step_s:.3f} | {errors[-1]:+.1%} | {real.mean_lag:.2f} "
            f"| {found.mean_lag:.2f} |"
        )
    if errors:
        print(
            f"\n{len(errors)} runs: off by {statistics.median(errors):+.1%} in the median, by "
            f"{statistics.mean(map(abs, errors)):.1%} on average, by {max(map(abs, errors)):.1%} at most; the mean lag "
            f"by {max(lag_errors):.2f} at most."
        )


if __name__ == "__main__":
    main(tyro.cli(Check))
