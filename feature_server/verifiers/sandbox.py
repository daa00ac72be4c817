"""Runs one untrusted Python program in a process that can do little but compute.

Guarantee: after `run_program` the program's process is gone, whatever it did, within its deadline. It had the standard
library, an empty folder that it could not write to, an environment with none of our variables, and limits on
time, memory, open files and system calls (syscall_filter.py): no network, no process, no change to any file.
What it printed is discarded.

The verdict "passed" is a random token that the harness around the program sends once the program has run through.
Prints, exit codes, exit handlers and bytes written to any descriptor do not count. What this does not stop: code that
searches the interpreter's own frames or memory for the token; code that makes its own assertions true, as by patching
what they call; reading files that the user of the run may read, of which nothing but the verdict can leave.

Called by verifiers.py, from several threads at once.
"""

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from feature_server.verifiers.sandbox_child import TOKEN_BYTES

Status = Literal["passed", "failed", "timeout", "memory", "forbidden", "crashed"]
FAILURES: dict[str, Status] = {status: status for status in get_args(Status) if status != "passed"}

ROOT = str(Path(__file__).resolve().parents[2])
START = (
    f"import sys; sys.path.insert(0, {ROOT!r}); "
    "from feature_server.verifiers.sandbox_child import run; del sys.path[0]; run()"
)
COMMAND = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", START]
"""Without the site packages and the current folder on the path; nothing is compiled to disk."""
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
"""The same program has the same order of sets each time; a thread's arena would take 64 MiB of address space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult:
    """How a program ended."""

    status: Status
    """`passed`: ran to its end. `failed`: an exception. `timeout`: time was up. `memory`: a MemoryError. `forbidden`: a
    PermissionError, which refused calls raise. `crashed`: a signal or an exit ended it early."""
    detail: str
    """The exception or the reason, in a line; empty if it passed."""


def run_program(source: str, *, timeout_s: float, memory_mib: int) -> ProgramResult:
    """Run the program until it ends or its time is up.

    timeout_s: wall time from the start of its process, about 0.05 s of which the interpreter takes [s].
    memory_mib: address space of the process, about 30 of which the interpreter takes [MiB].
    Raises: RuntimeError if the process cannot be confined on this machine.
    Test: test_sandbox.py
    """
    token = secrets.token_hex(TOKEN_BYTES // 2).encode()
    deadline = time.monotonic() + timeout_s
    reading, writing = os.pipe()
    with (
        os.fdopen(reading, "rb", buffering=0) as verdicts,
        tempfile.TemporaryFile() as job,
        tempfile.TemporaryDirectory(prefix="async-ebft-program-") as folder,
    ):
        job.write(token + source.encode("utf-8", "surrogatepass"))
        job.seek(0)
        try:
            process = _start(job, writing, folder=folder, limits=[str(memory_mib), str(timeout_s)])
        finally:
            os.close(writing)
        try:
            return _result(process, verdicts, token=token, deadline=deadline)
        except subprocess.TimeoutExpired:
            return ProgramResult(status="timeout", detail=f"not finished after {timeout_s} s")
        finally:
            _end(process)


def _start(job: IO[bytes], verdict: int, *, folder: str, limits: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, str(verdict), str(os.getpid()), *limits],
        stdin=job,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[verdict],
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def _result(process: subprocess.Popen[bytes], verdicts: IO[bytes], *, token: bytes, deadline: float) -> ProgramResult:
    """The first thing written to the pipe decides, or its closing.

    Raises: TimeoutExpired at the deadline; RuntimeError if the process could not be confined.
    """
    poll = select.poll()
    poll.register(verdicts, select.POLLIN)
    if not poll.poll(1000 * _left(deadline)):
        raise subprocess.TimeoutExpired(process.args, timeout=0)
    verdict = verdicts.read(2**16)
    if verdict == token:
        return ProgramResult(status="passed", detail="")
    if not verdict:
        return _ending(process.wait(timeout=_left(deadline)))
    if verdict.startswith(token):
        raise RuntimeError(verdict.removeprefix(token).decode())
    word, _, detail = verdict.decode("utf-8", "replace").partition("\n")
    status = FAILURES.get(word)
    if status is None:
        return ProgramResult(status="crashed", detail="wrote to the descriptor that is kept for its verdict")
    return ProgramResult(status=status, detail=detail)


def _ending(exit_code: int) -> ProgramResult:
    if exit_code >= 0:
        return ProgramResult(status="crashed", detail=f"exited early with exit code {exit_code}")
    name = signal.Signals(-exit_code).name
    return ProgramResult(status="timeout" if name == "SIGXCPU" else "crashed", detail=f"ended by {name}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # not reaped yet, so its process group id cannot have been reused
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
