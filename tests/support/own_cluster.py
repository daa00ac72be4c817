"""Runs as users start them, and a Ray cluster of the tests' own: loopback, free ports, gone afterwards."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMOKE = "orchestration/configs/smoke.toml"
PARTS_OF_A_RUN = ("RolloutWorker", "FeatureServer", "LearnerWorker", "orchestration/run.py")
"""In the command lines of a run's processes; the cluster's own have none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that ended by itself."""

    returncode: int
    output: str
    """Standard output and error as they were written."""
    started: list[psutil.Process]
    """Every process seen below it while it ran."""


def run(
    command: Sequence[str],
    *,
    environment: dict[str, str],
    timeout_s: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> Finished:
    """Run to the end in the repository's root, calling `meanwhile` twice a second.

    Raises: TimeoutError with the output; everything below the process is killed then.
    """
    started: dict[int, psutil.Process] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline:
            started |= {child.pid: child for child in descendants(process)}
            meanwhile()
            time.sleep(0.5)
        timed_out = process.poll() is None
        if timed_out:
            kill([*started.values(), process])
        output.seek(0)
        text = output.read()
    if timed_out:
        raise TimeoutError(f"{list(command)} took more than {timeout_s:g} s:\n{text}")
    return Finished(returncode=process.returncode, output=text, started=list(started.values()))


def run_command(*arguments: str) -> list[str]:
    """`python orchestration/run.py` with these arguments."""
    return [sys.executable, "orchestration/run.py", *arguments]


NODE_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")


class OwnCluster:
    """One node of two CPUs, with token authentication, started in the repository's root."""

    def __init__(self) -> None:
        """Returns when the cluster takes jobs."""
        gcs, dashboard, *others = _free_ports(6)
        options = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = own_environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_ADDRESS=f"127.0.0.1:{gcs}"
        )
        # Not pytest's tmp_path: the names of Ray's sockets below it would become too long.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        self._log = Path(self._folder, "start.log")
        self._others: list[psutil.Popen] = []
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", "--include-dashboard=true"]
        command += [f"--dashboard-port={dashboard}", f"--temp-dir={self._folder}/ray"]
        command += [f"--object-store-memory={200 * 2**20}"]
        command += [f"--{option}={port}" for option, port in zip(options, others, strict=False)]
        command += [f"--metrics-export-port={others[-1]}"]
        self._node = psutil.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self._log.open("w"), stderr=subprocess.STDOUT
        )
        try:
            wait_for(self._answers, timeout_s=120, what="the cluster")
        except TimeoutError as error:
            self.stop()
            raise error

    def add_node(self, *, num_cpus: int) -> None:
        """One more node on this machine."""
        command = [str(BIN / "ray"), "start", f"--address={self.environment['RAY_ADDRESS']}", "--block"]
        command += [f"--num-cpus={num_cpus}", "--disable-usage-stats", f"--object-store-memory={200 * 2**20}"]
        command += [f"--{option}={port}" for option, port in zip(NODE_PORTS, _free_ports(len(NODE_PORTS)), strict=True)]
        log = Path(self._folder, f"node-{len(self._others) + 1}.log")
        node = psutil.Popen(command, cwd=ROOT, env=self.environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        self._others.append(node)
        wait_for(lambda: "Ray runtime started" in log.read_text(), timeout_s=120, what="another node")

    def remove_node(self) -> None:
        """End the node that was added last."""
        self._end([self._others.pop()])

    def submit(
        self, name: str, *arguments: str, upload: bool, meanwhile: Callable[[], None] = lambda: None
    ) -> Finished:
        """`ray job submit` of this checkout, uploaded or as the cluster's head finds it, followed to the job's end."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--submission-id", name]
        command += ["--working-dir", "."] if upload else []
        command += ["--", "python", "orchestration/run.py", *arguments]
        return run(command, environment=self.environment, timeout_s=400, meanwhile=meanwhile)

    def parts_running(self) -> set[str]:
        """Those of PARTS_OF_A_RUN that a process on the cluster is now."""
        lines = self.command_lines()
        return {part for part in PARTS_OF_A_RUN if any(part in line for line in lines)}

    def command_lines(self) -> list[str]:
        """Of every process on the cluster."""
        return alive(self.processes())

    def processes(self) -> list[psutil.Process]:
        """Every process on the cluster."""
        return [child for node in (self._node, *self._others) for child in descendants(node)]

    def wait_until_empty(self) -> None:
        """Raises: TimeoutError naming what a run left behind."""
        wait_for(lambda: not self.parts_running(), timeout_s=60, what=self.parts_running)

    def stop(self) -> None:
        """End this cluster alone: `ray stop` would end every one on the machine."""
        self._end([*self._others, self._node])
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, nodes: Sequence[psutil.Popen]) -> None:
        everything = [*[child for node in nodes for child in descendants(node)], *nodes]
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        psutil.wait_procs(everything, timeout=15)
        kill(everything)

    def _answers(self) -> bool:
        if self._node.poll() is not None:
            raise RuntimeError(f"`ray start` ended with {self._node.returncode}:\n{self._log.read_text()}")
        return "Ray runtime started" in self._log.read_text()


@contextmanager
def own_cluster() -> Iterator[OwnCluster]:
    """An OwnCluster that is stopped at the end."""
    cluster = OwnCluster()
    try:
        yield cluster
    finally:
        cluster.stop()


def own_environment(**variables: str) -> dict[str, str]:
    """This process's environment without its settings of Ray, with this interpreter's `python` first on PATH."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return inherited | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | variables


def wait_for(condition: Callable[[], bool], *, timeout_s: float, what: object) -> None:
    """Raises: TimeoutError with `what` (or its result)."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what() if callable(what) else what}")
        time.sleep(0.2)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Everything below a process; nothing if it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: Sequence[psutil.Process]) -> list[str]:
    """Command lines of those that still run."""
    return [line for process in processes if (line := _command_line(process))]


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill those that still run, and wait for their end."""
    for process in processes:
        if process.is_running():
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _command_line(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
