"""How far the simulator is off, on runs that have been made: predicted beside measured seconds of a step.

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

from orchestration.measured_times import SKIPPED_STEPS  # noqa: E402
from orchestration.simulate_config import parse_simulation  # noqa: E402
from orchestration.simulator import simulate  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Check:
    """Compare predicted and measured steps."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that runs have left."""
    num_steps: int = 100
    """Steps that are simulated."""


def measured_step_s(folder: Path) -> float:
    """Mean time of a step after the first few, evaluations left out [s]."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(r["time/step_s"] for r in rows if "time/step_s" in r and r["step"] > SKIPPED_STEPS)


def predicted_step_s(folder: Path, *, num_steps: int) -> float:
    """The simulator's mean time of a step [s]."""
    config = parse_simulation([str(folder / "config.toml"), "--times-from", str(folder / "metrics.jsonl")])
    pipeline = config.pipeline(
        rollout_workers=config.placement.rollout.count,
        scorers=config.numbers_of_scorers[0],
        max_lag=config.asynchrony.max_lag,
    )
    return 1 / simulate(pipeline, config.stage_times(), num_steps=num_steps).steps_per_s


def main(check: Check) -> None:
    """One row a run, and how far all of them are off."""
    print("| run | step measured [s] | predicted [s] | off by |\n| --- | --- | --- | --- |")
    errors = []
    for folder in check.runs:
        try:
            predicted = predicted_step_s(folder, num_steps=check.num_steps)
        except (ValueError, FileNotFoundError) as error:
            print(f"left out: {folder}: {error}", file=sys.stderr)
            continue
        measured = measured_step_s(folder)
        errors.append(predicted / measured - 1)
        print(f"| {folder.name} | {measured:.3f} | {predicted:.3f} | {errors[-1]:+.1%} |")
    if errors:
        print(
            f"\n{len(errors)} runs: off by {statistics.median(errors):+.1%} in the median, by "
            f"{statistics.mean(map(abs, errors)):.1%} on average, by {max(map(abs, errors)):.1%} at most."
        )


if __name__ == "__main__":
    main(tyro.cli(Check))
