"""Runs whose processes, or whose driver, are killed or stopped with real signals: they end as if nothing had happened.

A short form of benchmarks/kill_matrix.py and benchmarks/resume_matrix.py.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from own_cluster import SMOKE, OwnCluster
from whole_runs import LARGE_STEPS, WholeRun, few_texts, rows_of, run_on, succeeded

from orchestration.buffer.accounting import audit

pytestmark = pytest.mark.engine

STEPS = 5
SHORT = (SMOKE, *LARGE_STEPS, "--learner.num-steps", str(STEPS), "--evaluation.documents", "0")


@dataclass
class Fault:
    """Strikes once, as soon as so many steps are logged."""

    folder: Path
    after_step: int
    role: str
    """Class of the worker in the process, or `driver`."""
    number: signal.Signals
    struck: bool = field(default=False, init=False)

    def __call__(self, cluster: OwnCluster, driver: psutil.Process) -> None:
        if self.struck or num_steps(self.folder) < self.after_step:
            return
        victims = [driver] if self.role == "driver" else [p for p in cluster.processes() if named(p, self.role)]
        if victims:
            os.kill(victims[0].pid, self.number)
            self.struck = True


def named(process: psutil.Process, role: str) -> bool:
    try:
        return role in " ".join(process.cmdline())
    except psutil.Error:
        return False


def num_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"time/step_s"' in line for line in lines)


def run_with(cluster: OwnCluster, folder: Path, faults: list[Fault], *arguments: str) -> WholeRun:
    def meanwhile(driver: psutil.Process) -> None:
        for fault in faults:
            fault(cluster, driver)

    return run_on(cluster, folder, *arguments, meanwhile=meanwhile)


def newest_digest(run: WholeRun) -> tuple[int, str]:
    return run.published[-1]


def test_a_run_survives_the_loss_of_each_of_its_processes(cluster: OwnCluster, tmp_path: Path) -> None:
    folder = tmp_path / "struck"
    faults = [
        Fault(folder, 1, "RolloutWorker", signal.SIGKILL),
        Fault(folder, 2, "FeatureServer", signal.SIGSTOP),
        Fault(folder, 3, "LearnerWorker", signal.SIGKILL),
    ]
    arguments = (*SHORT, *few_texts(tmp_path), "--checkpoint.every-steps", "1")
    run = succeeded(run_with(cluster, folder, faults, *arguments))
    assert all(fault.struck for fault in faults)
    output = run.finished.output
    assert "rollout worker 0 died" in output
    assert "feature server 0 gave no sign of life" in output
    assert "learner rank 0 died" in output and "starting the learner again from step-00000" in output
    assert "Traceback" not in output
    account = audit(rows_of(folder / "events.jsonl"))
    assert account.is_balanced and account.failed == 0
    assert [row["step"] for row in run.rows if "time/step_s" in row] == list(range(1, STEPS + 1))
    assert newest_digest(run)[0] == STEPS


@pytest.fixture
def uninterrupted(cluster: OwnCluster, tmp_path: Path) -> WholeRun:
    return succeeded(run_with(cluster, tmp_path / "whole", [], *exact(tmp_path)))


def exact(folder: Path) -> tuple[str, ...]:
    lag = ("--asynchrony.mode", "exact", "--asynchrony.max-lag", "2", "--checkpoint.every-steps", "1")
    return (*SHORT, *few_texts(folder), *lag)


def test_a_run_that_is_killed_stopped_and_resumed_ends_with_the_same_bits(
    cluster: OwnCluster, tmp_path: Path, uninterrupted: WholeRun
) -> None:
    folder, arguments = tmp_path / "resumed", (*exact(tmp_path), "--resume", "auto")
    killed = run_with(cluster, folder, [Fault(folder, 2, "driver", signal.SIGKILL)], *arguments)
    assert killed.finished.returncode == -signal.SIGKILL
    stopped = run_with(cluster, folder, [Fault(folder, 3, "driver", signal.SIGTERM)], *arguments)
    assert stopped.finished.returncode == 128 + signal.SIGTERM, stopped.finished.output
    assert "SIGTERM: saving, then ending" in stopped.finished.output
    resumed = succeeded(run_with(cluster, folder, [], *arguments))
    assert "going on from" in resumed.finished.output
    assert newest_digest(resumed) == newest_digest(uninterrupted)
    assert sorted(set(resumed.published)) == sorted(set(uninterrupted.published)), "another version on the way"
    account = audit(rows_of(folder / "events.jsonl"))
    assert account.is_balanced and account == audit(rows_of(uninterrupted.folder / "events.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(number: signal.Signals, cluster: OwnCluster, tmp_path: Path) -> None:
    folder = tmp_path / "early"

    def meanwhile(driver: psutil.Process) -> None:
        if cluster.parts_running():
            os.kill(driver.pid, number)

    run = run_on(cluster, folder, *SHORT, *few_texts(tmp_path), meanwhile=once(meanwhile, cluster))
    assert run.finished.returncode == 128 + number, run.finished.output
    assert f"{number.name}: ending" in run.finished.output
    assert "Traceback" not in run.finished.output
    assert not folder.exists(), "an empty folder takes the run's name"


def once(action: Callable[[psutil.Process], None], cluster: OwnCluster) -> Callable[[psutil.Process], None]:
    done = []

    def act(driver: psutil.Process) -> None:
        if not done and cluster.parts_running():
            done.append(True)
            action(driver)

    return act
