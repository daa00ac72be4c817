"""What asynchrony gains in real runs: real engine, real features, real learner, at several max_lag.

    python benchmarks/real_asynchrony.py [--config FILE.toml] [--repeats 2] [--report FILE.md]

Runs of `orchestration/run.py` that differ in max_lag alone, interleaved over the repeats. Printed side by side:

1. the step, and how much faster it is than the synchronous one; the ideal, from the stage times of the synchronous
   runs, where no stage slows another down: all stages one after the other, over the longest of them;
2. what the cores of this machine allow at most, if each stage keeps `--stage-cores` of them busy: computing cannot hide
   behind other computing on the same core, so roles that share cores cannot reach the ideal;
3. what the simulator predicts from the stage times of each run itself.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import tyro  # noqa: E402

from benchmarks.compare import run_arm  # noqa: E402
from benchmarks.measured import median_and_range  # noqa: E402
from benchmarks.simulator_check import Steps, measured, pipeline_of, predicted  # noqa: E402

SIMULATED_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Run the same job at several max_lag."""

    config: str | None = None
    """Configuration file of every run; None: the default run."""
    max_lag: tuple[int, ...] = (0, 1, 2)
    """Bounds to compare; 0, the synchronous run, is always included."""
    steps: int = 30
    """Learner steps of each run."""
    repeats: int = 2
    """Runs per bound."""
    stage_cores: float = 1.0
    """Cores that one stage keeps busy."""
    folder: Path | None = None
    """Where the runs are kept, and found again; None: a temporary folder."""
    report: Path | None = None
    """File for the table, in addition to the terminal."""


def make_runs(settings: Benchmark, folder: Path) -> dict[int, list[Path]]:
    """Folders of all runs, by max_lag."""
    runs: dict[int, list[Path]] = {lag: [] for lag in sorted({0, *settings.max_lag})}
    for repeat in range(settings.repeats):
        for lag, folders in runs.items():
            folders.append(folder / f"lag{lag}-{repeat}")
            overrides = f"asynchrony.max-lag={lag} learner.num-steps={settings.steps} evaluation.documents=0"
            run_arm(overrides, config=settings.config, seed=repeat, split="validation", folder=folders[-1])
    return runs


def ideal(folders: list[Path], *, cores: float) -> tuple[float, float, float]:
    """From synchronous runs, medians: the ideal speed-up, the one that `cores` of this machine allow, and the share of
    time that the learner is idle in the ideal."""
    speedups, allowed, idles = [], [], []
    for folder in folders:
        pipeline, times = pipeline_of(folder)
        longest_s, step_s = pipeline.longest_stage_s(times), measured(folder).step_s
        speedups.append(pipeline.ideal_speedup(times))
        busy_s = speedups[-1] * longest_s
        allowed.append(min(speedups[-1], busy_s / max(longest_s, busy_s * cores / (os.cpu_count() or 1))))
        idles.append(1 - (times.train.mean_s + times.publish.mean_s) / longest_s)
        print(f"{folder.name}: stages one after the other {busy_s:.3f} s, a synchronous step {step_s:.3f} s: {times}")
    return statistics.median(speedups), statistics.median(allowed), statistics.median(idles)


def table(runs: dict[int, list[Path]], *, stage_cores: float) -> str:
    """One row for each max_lag."""
    speedup, allowed, idle = ideal(runs[0], cores=stage_cores)
    real = {lag: [measured(folder) for folder in folders] for lag, folders in runs.items()}
    synchronous_s = statistics.median(steps.step_s for steps in real[0])
    lines = [
        f"Ideal: {speedup:.2f} times the synchronous speed, learner idle {idle:.1%}; {os.cpu_count()} cores allow "
        f"{allowed:.2f} times.",
        "",
        "| max_lag | step [s] | simulated | over synchronous | share of the ideal | share of what cores allow "
        "| learner idle | simulated | mean lag | simulated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for lag, folders in runs.items():
        simulated = [predicted(folder, num_steps=SIMULATED_STEPS) for folder in folders]
        gain = synchronous_s / statistics.median(steps.step_s for steps in real[lag])
        shares = f"{gain / speedup:.1%} | {gain / allowed:.1%}" if lag else " | "
        lines.append(
            f"| {lag} | {_range(real[lag], 'step_s')} | {_range(simulated, 'step_s')} | {gain:.2f} | {shares} "
            f"| {_middle(real[lag], 'idle'):.1%} | {_middle(simulated, 'idle'):.1%} "
            f"| {_middle(real[lag], 'mean_lag'):.2f} | {_middle(simulated, 'mean_lag'):.2f} |"
        )
    return "\n".join(lines)


def _middle(steps: list[Steps], name: str) -> float:
    return statistics.median(getattr(one, name) for one in steps)


def _range(steps: list[Steps], name: str) -> str:
    return median_and_range([getattr(one, name) for one in steps])


def main(settings: Benchmark) -> None:
    """Make all runs, and compare them."""
    with tempfile.TemporaryDirectory(prefix="async-ebft-") as temporary:
        runs = make_runs(settings, settings.folder or Path(temporary))
        text = table(runs, stage_cores=settings.stage_cores)
    print(text)
    if settings.report is not None:
        settings.report.write_text(f"{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
