"""Runs what a model wrote in processes that can do little but compute.

Guarantee: after a job its processes are gone, whatever they did, within its time. They had Python's own library, an
empty folder that they could not write to, an environment with none of our variables, and limits on time, memory, open
files and system calls (confinement.py): no network, no process, no change to any file; and where the kernel can hide
files (file_rules.py), no reading of any other. What they print is discarded.

A job is one text for each of the sandbox's roles (fork_server.py), and a process for each. What a job says or does is a
verdict, never an error here.

Called by verifiers.py and problem_solving.py, from several threads at once.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from feature_server.verifiers.file_rules import rules_exist

logger = logging.getLogger(__name__)

Status = Literal["passed", "failed", "timeout", "memory", "forbidden", "crashed"]

START = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); "
    "from feature_server.verifiers.fork_server import serve; serve()"
)
OPTIONS = ["-P", "-s", "-B", "-X", "utf8"]
"""Without the current folder on the path; nothing is compiled to disk."""
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
}
"""The same program has the same order of sets each time; a thread's arena would take 64 MiB of address space; and only
a process of one thread can be forked safely."""
START_TIMEOUT_S = 120.0
"""Longest time until a warm process has imported its roles [s]."""
GRACE_S = 10.0
"""Time past a job's deadline after which its warm process is given up [s]."""
MAX_MESSAGE_BYTES = 2**16
REFUSED = "refused: "
"""Begins the detail of a verdict that blames who asked, not what was asked about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a job ended."""

    status: Status
    """`passed`: ran to its end. `failed`: an exception. `timeout`: time was up. `memory`: a MemoryError. `forbidden`: a
    PermissionError, which refused calls raise. `crashed`: a signal or an exit ended it early."""
    detail: str
    """The exception or the reason, in a line; empty if it passed and the roles add nothing."""


class Sandbox:
    """Runs jobs of one kind, each in fresh processes, as many side by side as it is called."""

    def __init__(self, roles: str, *, with_packages: bool = False) -> None:
        """Start a first warm process.

        roles: `module:name` of a tuple of roles, see fork_server.Role. with_packages: installed packages can be
        imported, not Python's own library alone.
        Raises: RuntimeError if processes cannot be confined on this machine, or the roles cannot be imported.
        """
        self._options = [*OPTIONS, *([] if with_packages else ["-S"])]
        self._roles = roles
        self._idle = [_WarmProcess(roles, self._options)]
        self._lock = threading.Lock()
        if not rules_exist():
            logger.warning(
                "this kernel has no Landlock (Linux 5.13): generated code can read what this user can read. It has no "
                "network and cannot write; see docs/security.md"
            )

    def run(self, *texts: str, timeout_s: float, memory_mib: int) -> Result:
        """Run one job, a text for each role, until it ends or its time is up.

        timeout_s: wall time [s]. memory_mib: address space beyond that of an empty job, of each process [MiB].
        Raises: RuntimeError if no warm process can be started any more.
        """
        with self._warm() as warm:
            answer = warm.run(texts, timeout_s=timeout_s, memory_mib=memory_mib)
        if answer is None:
            return Result(status="crashed", detail="its warm process was ended from outside")
        outcome, verdict, exit_codes = answer
        if outcome:
            return Result(status="timeout", detail=f"not finished after {timeout_s:g} s")
        return _told(verdict) if verdict else _ending(exit_codes)

    @contextmanager
    def _warm(self) -> Iterator["_WarmProcess"]:
        with self._lock:
            warm = self._idle.pop() if self._idle else None
        warm = warm or _WarmProcess(self._roles, self._options)
        yield warm
        if warm.is_alive:
            with self._lock:
                self._idle.append(warm)


def program_sandbox() -> Sandbox:
    """One whose jobs are a program and its tests; why the one cannot speak for the other, program_roles.py says."""
    return Sandbox("feature_server.verifiers.program_roles:ROLES")


class _WarmProcess:
    """A fork server, for one job at a time; it ends when this object does."""

    def __init__(self, roles: str, options: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = tempfile.mkdtemp(prefix="async-ebft-sandbox-")
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *options, "-c", START, roles, str(theirs.fileno()), folder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                start_new_session=True,
            )
        self.end = weakref.finalize(self, _end, process, self._control, folder)
        reason = self._receive(START_TIMEOUT_S)
        if reason is None:
            self.end()
            raise RuntimeError(f"no warm process for {roles}: it ended before it was ready; see its error above")
        if reason:
            self.end()
            raise RuntimeError(reason)

    @property
    def is_alive(self) -> bool:
        """Whether it can take another job."""
        return self.end.alive

    def run(self, texts: Sequence[str], *, timeout_s: float, memory_mib: int) -> list[Any] | None:
        """What the fork server answers; None if it was lost."""
        with ExitStack() as files:
            places = [files.enter_context(_memory_file(text)) for text in texts]
            with suppress(OSError):  # it is gone: no answer will come
                socket.send_fds(self._control, [json.dumps([timeout_s, memory_mib]).encode()], places)
        answer = self._receive(timeout_s + GRACE_S)
        if answer is None:
            self.end()
        return cast(list[Any] | None, answer)

    def _receive(self, timeout_s: float) -> object | None:
        """The next message; None if there is none."""
        self._control.settimeout(timeout_s)
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            return None
        return json.loads(message) if message else None


@contextmanager
def _memory_file(text: str) -> Iterator[int]:
    """The text behind a descriptor: the fork server passes it on without reading it."""
    descriptor = os.memfd_create("text", os.MFD_CLOEXEC)
    with open(descriptor, "r+b") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.seek(0)
        yield descriptor


def _end(process: subprocess.Popen[bytes], control: socket.socket, folder: str) -> None:
    control.close()
    try:
        process.wait(GRACE_S)  # it ends by itself when the other end closes, and its children with it
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(FileNotFoundError):  # it removes its folder, unless it was killed
        os.rmdir(folder)


def _told(verdict: str) -> Result:
    """What the judging process wrote; it is judged as text, as code in that process may have written it."""
    try:
        status, detail = json.loads(verdict)
        if status in get_args(Status) and isinstance(detail, str):
            return Result(status=status, detail=detail)
    except (ValueError, TypeError):  # no JSON, or JSON of another form
        pass
    return Result(status="crashed", detail="wrote to the descriptor that is kept for its verdict")


def _ending(exit_codes: Sequence[int]) -> Result:
    code = next((code for code in exit_codes if code), 0)
    if code >= 0:
        return Result(status="crashed", detail=f"exited early with exit code {code}")
    name = signal.Signals(-code).name
    return Result(status="timeout" if name == "SIGXCPU" else "crashed", detail=f"ended by {name}")
