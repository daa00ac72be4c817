"""Compare arms of the default run over seeds, on files that no setting was chosen on.

    python benchmarks/compare.py [--arms-file benchmarks/arms/default.toml] [--seeds 0 1 2] [--report FILE.md]

Each run is `python orchestration/run.py` in a process of its own; arms are interleaved by seed. With `--folder` the
runs are kept there and a second call continues where the first one stopped. An arms file holds

    config = "FILE.toml"             # if there: the configuration of every run and evaluation
    common = "key=value ..."         # overrides of every arm
    evaluate = "key=value ..."       # if there: `python orchestration/evaluate.py` on every checkpoint, with these
    [arms]
    "NAME" = "key=value ..."         # {OTHER} in a value stands for the checkpoint of arm OTHER with the same seed

Written down for each arm: change of held-out CFM and cross-entropy against the base model with the standard error over
the texts of held-out documents, the range over seeds, wall time, start-up by stage, and the peak memory of all
processes together.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
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

    arms_file: Path = ROOT / "benchmarks/arms/default.toml"
    """Which arms, and what they share."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the documents' order and of every completion."""
    split: str = "test"
    """Held-out split; `validation` while settings are chosen."""
    folder: Path | None = None
    """Where the runs are kept, and found again; None: a temporary folder."""
    report: Path | None = None
    """File for the tables, in addition to the terminal."""


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The contents of an arms file."""

    arms: dict[str, str]
    config: str | None = None
    common: str = ""
    evaluate: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run."""

    summary: dict
    wall_s: float
    peak_gib: float
    evaluation: dict | None = None


def flags(overrides: str) -> list[str]:
    """`key=value key=value` as command-line flags; `key=a,b,c` as one flag with several values."""
    pairs = [pair.split("=", 1) for pair in overrides.split()]
    return [part for key, value in pairs for part in ("--" + key.replace("_", "-"), *value.split(","))]


def run_arm(overrides: str, *, config: str | None, seed: int, split: str, folder: Path) -> None:
    """Run `orchestration/run.py` into `folder` unless it has been, and note wall time and memory.

    Raises: RuntimeError with the end of its log if it fails or outlasts its time.
    """
    if (folder / "cost.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "orchestration/run.py"), *([config] if config else [])]
    command += [
        "--logging.output-dir",
        str(folder.parent),
        "--logging.run-name",
        folder.name,
        "--seed",
        str(seed),
        "--evaluation.split",
        split,
    ]
    cost = watched(command + flags(overrides), log=folder.parent / f"{folder.name}.log")
    (folder / "cost.json").write_text(json.dumps(cost))


def evaluate_checkpoint(checkpoint: str, overrides: str, *, config: str | None, output: Path, split: str) -> None:
    """Run `orchestration/evaluate.py` on a checkpoint unless `output` is there."""
    if output.exists():
        return
    command = [sys.executable, str(ROOT / "orchestration/evaluate.py"), checkpoint, *([config] if config else [])]
    command += ["--output", str(output), "--split", split, *flags(overrides)]
    watched(command, log=output.with_suffix(".log"))


def watched(command: list[str], *, log: Path) -> dict[str, float]:
    """Run a command to its end; its wall time and the peak memory of its process tree.

    Raises: RuntimeError with the end of its log if it fails or outlasts its time.
    """
    start, peak = time.perf_counter(), 0.0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        while process.poll() is None and time.perf_counter() - start < RUN_TIMEOUT_S:
            peak = max(peak, tree_gib(process.pid))
            time.sleep(MEMORY_SAMPLE_S)
        process.terminate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return {"wall_s": time.perf_counter() - start, "peak_gib": peak}


def tree_gib(pid: int) -> float:
    """Resident memory of a process and all its descendants [GiB]; shared pages count once for each process."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between the two calls
    return total / 2**30


def outcome(folder: Path) -> Outcome:
    """What a run's folder says."""
    evaluation = folder / "evaluation.json"
    return Outcome(
        summary=json.loads((folder / "summary.json").read_text()),
        evaluation=json.loads(evaluation.read_text()) if evaluation.exists() else None,
        **json.loads((folder / "cost.json").read_text()),
    )


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """One row for each arm: mean change over seeds, its range over seeds, and the error over their texts."""
    lines = [
        "| arm | runs | CFM change | each seed | +- over texts | CE change | each seed | +- over texts "
        "| wall [s] | peak [GiB] |",
        "| " + " --- |" * 10,
    ]
    for arm, runs in outcomes.items():
        if not runs:
            continue
        walls = [run.wall_s for run in runs]
        lines.append(
            f"| {arm} | {len(runs)} | {_changes(runs, 'cfm_loss')} | {_changes(runs, 'cross_entropy')} "
            f"| {statistics.median(walls):.0f} | {max(run.peak_gib for run in runs):.1f} |"
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


def evaluation_table(outcomes: dict[str, list[Outcome]], base: dict) -> str:
    """Every measure of every arm's checkpoints: mean over seeds, and in brackets the lowest and the highest."""
    names = list(base["measures"])
    lines = ["| arm | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    rows = {"base model": [base]} | {
        arm: [run.evaluation for run in runs if run.evaluation is not None] for arm, runs in outcomes.items()
    }
    for arm, evaluations in rows.items():
        if evaluations:
            cells = [_mean_and_range([found["measures"][name]["mean"] for found in evaluations]) for name in names]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_range(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def _changes(runs: list[Outcome], name: str) -> str:
    changes = [run.summary[name] for run in runs]
    deltas = [change["delta"] for change in changes]
    error = statistics.mean(change["standard_error"] for change in changes)
    return f"{statistics.mean(deltas):+.4f} | {', '.join(f'{d:+.4f}' for d in deltas)} | {error:.4f}"


def run_study(study: Study, arms: Arms, folder: Path) -> dict[str, list[Outcome]]:
    """Every arm with every seed, interleaved by seed; prints the table after each run."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arms.arms}
    if arms.evaluate is not None:
        place = folder / "base.json"
        evaluate_checkpoint("embedded", arms.evaluate, config=arms.config, output=place, split=study.split)
    for seed in study.seeds:
        checkpoints: dict[str, str] = {}
        for name, overrides in arms.arms.items():
            place = folder / f"{re.sub('[^a-zA-Z0-9.]+', '-', name).strip('-')}-seed{seed}"
            overrides = f"{arms.common} {overrides}"
            for other, checkpoint in checkpoints.items():
                overrides = overrides.replace("{" + other + "}", checkpoint)
            run_arm(overrides, config=arms.config, seed=seed, split=study.split, folder=place)
            checkpoints[name] = str(place / "checkpoint")
            if arms.evaluate is not None:
                evaluate_checkpoint(
                    checkpoints[name],
                    arms.evaluate,
                    config=arms.config,
                    output=place / "evaluation.json",
                    split=study.split,
                )
            outcomes[name].append(outcome(place))
            print(f"seed {seed}\n{tables(outcomes, folder)}", flush=True)
    return outcomes


def tables(outcomes: dict[str, list[Outcome]], folder: Path) -> str:
    """What training changed on held-out documents, and what the evaluation of the checkpoints says if there is one."""
    base = folder / "base.json"
    evaluated = f"\n\n{evaluation_table(outcomes, json.loads(base.read_text()))}" if base.exists() else ""
    return table(outcomes) + evaluated


def main(study: Study) -> None:
    """Run the study and write its tables."""
    arms = Arms(**tomllib.loads(study.arms_file.read_text()))
    with tempfile.TemporaryDirectory(prefix="async-ebft-") as scratch:
        folder = (study.folder or Path(scratch)).absolute()
        outcomes = run_study(study, arms, folder)
        if study.report is not None:
            study.report.write_text(f"{tables(outcomes, folder)}\n\n{startup_table(outcomes)}\n")


if __name__ == "__main__":
    main(tyro.cli(Study))
