"""The default run against supervised fine-tuning on the same documents, over seeds, on files no setting was chosen on.

    python benchmarks/default_run.py --report docs/default_run.md [--seeds 0 1 2] [--arms "NAME: key=value" ...]

Each run is `python orchestration/run.py` in a process of its own, with `--evaluation.split test`; arms are interleaved.
Written down for each: change of held-out CFM and cross-entropy against the base model with the standard error over
held-out documents, the spread over seeds, wall time, start-up by stage, and the peak memory of all processes together.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

ROOT = Path(__file__).resolve().parents[1]
MEMORY_SAMPLE_S = 0.5
RUN_TIMEOUT_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """Compare arms of the default run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the documents' order and of every completion."""
    split: str = "test"
    """Held-out split; `validation` while settings are chosen."""
    arms: tuple[str, ...] = (
        "EBFT (default, gamma 0):",
        "SFT: learner.policy-gradient-coef=0 learner.cross-entropy-coef=1",
    )
    """`NAME: key=value key=value` each: an arm and its overrides of the default run."""
    report: Path | None = None
    """Where the table goes, besides the terminal."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run."""

    summary: dict
    wall_s: float
    peak_gib: float


def run_once(overrides: list[str], *, folder: Path) -> Outcome:
    """Run `orchestration/run.py` and watch the memory of its process tree.

    Raises: RuntimeError with the end of its log if it fails or outlasts its time.
    """
    command = [sys.executable, str(ROOT / "orchestration/run.py"), "--logging.output-dir", str(folder.parent)]
    command += ["--logging.run-name", folder.name, *overrides]
    log = folder.parent / f"{folder.name}.log"
    start, peak = time.perf_counter(), 0.0
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        while process.poll() is None and time.perf_counter() - start < RUN_TIMEOUT_S:
            peak = max(peak, tree_gib(process.pid))
            time.sleep(MEMORY_SAMPLE_S)
        process.terminate()
    wall_s = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return Outcome(summary=json.loads((folder / "summary.json").read_text()), wall_s=wall_s, peak_gib=peak)


def flags(overrides: str) -> list[str]:
    """`key=value key=value` as command-line flags."""
    return [part for pair in overrides.split() for part in ("--" + pair.split("=")[0], pair.split("=")[1])]


def tree_gib(pid: int) -> float:
    """Resident memory of a process and all its descendants [GiB]; shared pages count once for each process."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between two looks
    return total / 2**30


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """One row for each arm and seed, then the arm's mean over seeds with its spread."""
    lines = [
        "| arm | seed | CFM before | CFM change +- SE | CE before | CE change +- SE | wall [s] | peak RSS [GiB] |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in outcomes.items():
        for seed, run in enumerate(runs):
            cfm, ce = run.summary["cfm_loss"], run.summary["cross_entropy"]
            lines.append(
                f"| {arm} | {seed} | {cfm['before']:.4f} | {cfm['delta']:+.4f} +- {cfm['standard_error']:.4f} "
                f"| {ce['before']:.4f} | {ce['delta']:+.4f} +- {ce['standard_error']:.4f} "
                f"| {run.wall_s:.0f} | {run.peak_gib:.1f} |"
            )
        if len(runs) > 1:
            lines.append(
                f"| {arm} | mean (std) | | {_spread(runs, 'cfm_loss')} | | {_spread(runs, 'cross_entropy')} | | |"
            )
    return "\n".join(lines)


def startup_table(outcomes: dict[str, list[Outcome]]) -> str:
    """Median start-up seconds of every stage over all runs."""
    seen: dict[tuple[str, str], list[float]] = {}
    for run in (run for runs in outcomes.values() for run in runs):
        for who, stages in run.summary["startup_s"].items():
            for stage, seconds in stages.items():
                seen.setdefault((who, stage), []).append(seconds)
    rows = [f"| {who} | {stage} | {statistics.median(values):.1f} |" for (who, stage), values in seen.items()]
    return "\n".join(["| who | stage | median [s] |", "| --- | --- | --- |", *rows])


def _spread(runs: list[Outcome], name: str) -> str:
    deltas = [run.summary[name]["delta"] for run in runs]
    return f"{statistics.mean(deltas):+.4f} ({statistics.stdev(deltas):.4f})"


def main(study: Study) -> None:
    """Run every arm with every seed, interleaved by seed, and print the table."""
    arms = {name: flags(overrides) for name, _, overrides in (arm.partition(":") for arm in study.arms)}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="async-ebft-") as scratch:
        for seed in study.seeds:
            for index, (name, overrides) in enumerate(arms.items()):
                common = ["--seed", str(seed), "--evaluation.split", study.split]
                folder = Path(scratch) / f"arm{index}-seed{seed}"
                outcomes[name].append(run_once([*common, *overrides], folder=folder))
                print(table(outcomes), flush=True)
    if study.report is not None:
        study.report.write_text(f"{table(outcomes)}\n\n{startup_table(outcomes)}\n")


if __name__ == "__main__":
    main(tyro.cli(Study))
