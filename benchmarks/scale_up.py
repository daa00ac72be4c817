"""How long a running job takes to gain a rollout worker, and where the time goes.

    python benchmarks/scale_up.py [--config FILE.toml] [--repeats 3]

A real run, which keeps training, and `orchestration/scale.py --rollout-workers 2`, then 1, repeatedly.
Printed: medians, with the lowest and highest, from the command to the first training on a rollout of the new worker.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.measured import median_and_range  # noqa: E402

UP = re.compile(r"rollout worker \d+ is up after [\d.]+ s \((.*)\)")
TRAINED = re.compile(r"rollout worker \d+: first rollout trained on ([\d.]+) s after it was requested")
STAGE = re.compile(r"([a-z ]+) ([\d.]+) s")
TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Scale a running job up and down."""

    config: str | None = None
    """Configuration file of the job; None: the default run."""
    repeats: int = 3
    """Workers that join, one after the other has left."""
    worker_cpus: float = 0.5
    """Cores that a rollout worker reserves: two must fit next to the other processes."""


@dataclass(frozen=True)
class Job:
    """A run in a process of its own."""

    process: subprocess.Popen
    log: Path

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Raises: RuntimeError with the end of its log if it ends, or the condition does not hold in time."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"not there within {TIMEOUT_S:g} s, or ended:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def found(self, line: re.Pattern[str]) -> list[str]:
        """What this log line says for each worker that joined."""
        return line.findall(self.log.read_text())


@contextmanager
def running_job(settings: Measurement, folder: Path) -> Iterator[Job]:
    """A job that trains until the context is left."""
    command = [sys.executable, "orchestration/run.py", *([settings.config] if settings.config else [])]
    command += ["--learner.num-steps", "1000000", "--evaluation.documents", "0"]
    command += ["--placement.rollout.num-cpus", str(settings.worker_cpus)]
    command += ["--logging.output-dir", str(folder), "--logging.run-name", "job"]
    log = folder / "log"
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            job, metrics = Job(process, log), folder / "job" / "metrics.jsonl"
            job.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
            yield job
        finally:
            process.terminate()


def scale(num_workers: int) -> None:
    """Run the command, as a user would."""
    subprocess.run(
        [sys.executable, "orchestration/scale.py", "--rollout-workers", str(num_workers)],
        cwd=ROOT,
        check=True,
        timeout=TIMEOUT_S,
        stdout=subprocess.DEVNULL,
    )


def measure(settings: Measurement) -> dict[str, list[float]]:
    """Seconds of every stage, and from the command on, one value per worker."""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="async-ebft-") as folder, running_job(settings, Path(folder)) as job:
        for repeat in range(settings.repeats):
            start = time.perf_counter()
            scale(2)
            job.wait_until(lambda known=repeat: len(job.found(TRAINED)) > known)
            seen.setdefault("from the command to the first trained rollout", []).append(time.perf_counter() - start)
            total_s = float(job.found(TRAINED)[-1])
            stages = {stage.strip(): float(seconds) for stage, seconds in STAGE.findall(job.found(UP)[-1])}
            stages["weights, sampling, scoring, queue"] = total_s - sum(stages.values())
            seen.setdefault("of it: since the run took the request", []).append(total_s)
            for stage, seconds in stages.items():
                seen.setdefault(f"of it: {stage}", []).append(seconds)
            scale(1)
    return seen


def main(settings: Measurement) -> None:
    """Measure and print."""
    print("| stage | seconds |\n| --- | --- |")
    for stage, values in measure(settings).items():
        print(f"| {stage} | {median_and_range(values, decimals=1)} |")


if __name__ == "__main__":
    main(tyro.cli(Measurement))
