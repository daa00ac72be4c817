"""Whether a run that is killed again and again, and resumed each time, ends with the bits of one that was not.

    python benchmarks/resume_matrix.py [--driver-kills 30] [--rank-kills 10] [--steps 60]

Three runs of the embedded model in mode `exact` with a lag of 2, on a small file of texts, each with a Ray of its own:
one to its end; one whose driver gets SIGKILL at moments that a seed draws, some during the start, most during training,
evaluations and checkpoints, and that goes on by `--resume auto`; one whose learner rank gets SIGKILL, and that goes on
by itself. Printed: what each kill interrupted, the digests of the final weights, the account of all tickets, and how
many processes of killed runs were left after 30 s. Exit status 1 if anything differs or is left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(ROOT := Path(__file__).resolve().parents[1])

import psutil  # noqa: E402
import tyro  # noqa: E402

from orchestration.buffer.accounting import audit  # noqa: E402
from orchestration.buffer.event_log import read_rows  # noqa: E402

START_S = 25.0
"""Most of a start-up; a fifth of the kills fall into it."""
WORK_S = 8.0
"""The others fall into this time after a new step is done."""
GONE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Kill and resume."""

    driver_kills: int = 30
    rank_kills: int = 10
    steps: int = 60
    seed: int = 0


@dataclass
class Job:
    """One run, in as many processes as it takes."""

    folder: Path
    data: Path
    steps: int
    left_over: int = 0

    def start(self) -> psutil.Popen:
        """Begin it, or go on with it."""
        options = {
            "learner.num-steps": self.steps,
            "learner.documents-per-step": 4,
            "asynchrony.mode": "exact",
            "asynchrony.max-lag": 2,
            "checkpoint.every-steps": 3,
            "evaluation.documents": 8,
            "evaluation.every-steps": 5,
            "recovery.max-learner-restarts": 1000,
            "data.source": self.data,
            "logging.output-dir": self.folder.parent,
            "logging.run-name": self.folder.name,
            "resume": "auto",
        }
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        log = self.folder.with_suffix(".log").open("a")
        command = [sys.executable, str(ROOT / "orchestration/run.py"), *arguments]
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self) -> None:
        """Run it to its end."""
        status = self.start().wait()
        if status:
            raise RuntimeError(f"the run ended with {status}; see {self.folder.with_suffix('.log')}")

    def kill(self, driver: psutil.Popen) -> None:
        """The driver alone; what is below it must end by itself."""
        below = driver.children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        _, alive = psutil.wait_procs(below, timeout=GONE_S)
        self.left_over += len(alive)
        for process in alive:
            process.kill()

    @property
    def num_steps(self) -> int:
        """Rows of steps in its metrics."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count('"time/step_s"') if path.exists() else 0

    @property
    def last_line(self) -> str:
        """Of its log: what it has just done."""
        lines = self.folder.with_suffix(".log").read_text().splitlines()
        return lines[-1][9:].split("  ")[0][:60] if lines else ""

    @property
    def digest(self) -> str:
        """Of the final weights."""
        rows = read_rows(self.folder / "events.jsonl")
        return next(r["weights"] for r in reversed(rows) if r["event"] == "published" and r["version"] == self.steps)


def main(settings: Settings) -> int:
    """Exit status."""
    draw = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as temporary:
        data = _texts(Path(temporary))
        whole, killed, bereft = (Job(Path(temporary, n), data, settings.steps) for n in ("whole", "killed", "bereft"))
        whole.finish()
        interrupted = Counter(_kill_driver(killed, draw) for _ in range(settings.driver_kills))
        killed.finish()
        lost = _kill_ranks(bereft, settings.rank_kills, draw)
        print("what the kills of the driver interrupted:")
        for what, count in interrupted.most_common():
            print(f"  {count:3}  after: {what}")
        print(f"kills of the learner's rank: {lost}")
        good = True
        for job in (whole, killed, bereft):
            account = audit(read_rows(job.folder / "events.jsonl"))
            good &= job.digest == whole.digest and account.is_balanced and job.left_over == 0
            print(f"{job.folder.name:7} {job.digest}  {account}; {job.left_over} processes left over")
        print("equal bits, nothing lost, nothing left" if good else "NOT EQUAL, or something is left")
        return 0 if good else 1


def _kill_driver(job: Job, draw: random.Random) -> str:
    """Returns what it had just done."""
    driver, before = job.start(), job.num_steps
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, START_S))
    else:
        while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE and job.num_steps <= before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, WORK_S))
    last = job.last_line
    job.kill(driver)
    return last


def _kill_ranks(job: Job, count: int, draw: random.Random) -> int:
    """Run to the end; returns how many were killed."""
    driver, killed = job.start(), 0
    while driver.poll() is None:
        time.sleep(0.05)
        if killed < count and job.num_steps > 0:
            time.sleep(draw.uniform(0, WORK_S))
            ranks = [p for p in driver.children(recursive=True) if "LearnerWorker" in " ".join(p.cmdline())]
            for rank in ranks[:1]:
                os.kill(rank.pid, signal.SIGKILL)
                killed += 1
                time.sleep(START_S)
    return killed


def _texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    texts = [f"def function_{index}(x):\n    return x + {index}\n" * 8 for index in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
