"""A function of the user's in a process of its own, so that it can be ended when it hangs.

Guarantee: a call returns or raises within its deadline. A process that hung or died is gone by then, with all that it
started, and the next call starts another. It ends with the one that started it. What the function prints goes to
standard error.

Two processes: the keeper, to which orphans of the other fall (a subreaper), and the one that imports and calls. The
function may do all that the user may: it is trusted, and only kept from leaving processes behind.

Called by verifiers.py. Standard library only.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import json
import numbers
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TypeVar

IMPORT_TIMEOUT_S = 120.0
"""Longest time that importing the function may take [s]: some modules bring torch."""
SWEEP_TIMEOUT_S = 10.0
"""Longest time for ending what the function started [s]."""
REAP_EVERY_MS = 1000
MAX_TRACEBACK_CHARS = 2000
COMMAND = [sys.executable, "-P", "-c", "from feature_server.verifiers.function_process import keep; keep()"]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

Function = Callable[..., object]
Result = TypeVar("Result")


class FunctionProcess:
    """Calls one function in another process, with strings as arguments and a number as result. Thread-safe."""

    def __init__(self, path: str, *, timeout_s: float) -> None:
        """Start the process and import the function.

        path: `package.module:function` or `path/to/file.py:function`.
        timeout_s: longest time of one call [s].
        Raises: ValueError if it cannot be imported, naming what was tried; TimeoutError if that took too long.
        Test: test_verifiers.py
        """
        self._path = path
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._start()

    def __call__(self, *arguments: str) -> float:
        """What the function returned; it may be NaN or infinite.

        Raises: ValueError if it raised or returned no number; TimeoutError if it hung; ChildProcessError if its
        process died.
        """
        with self._lock:
            if self._keeper.poll() is not None:
                self._end()
                self._start()
            with contextlib.suppress(OSError):  # it died: no reply will come, which `_reply` reports
                self._connection.send_bytes(json.dumps(arguments).encode())
            return self._reply(self._timeout_s)

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        held, leash = os.pipe()
        search_path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        self._keeper = subprocess.Popen(
            [*COMMAND, self._path, str(theirs.fileno()), str(held)],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno(), held],
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,
        )
        theirs.close()
        os.close(held)
        self._end = weakref.finalize(self, _end, self._keeper, self._connection, leash)
        self._reply(IMPORT_TIMEOUT_S)

    def _reply(self, timeout_s: float) -> float:
        deadline = time.monotonic() + timeout_s
        try:
            if not self._connection.poll(timeout_s):
                raise self._late(timeout_s)
            value, error = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as reason:
            raise self._gone(timeout_s, deadline) from reason
        if error is not None:
            raise ValueError(f"{self._path} {error}")
        return value

    def _late(self, timeout_s: float) -> TimeoutError:
        self._end()
        return TimeoutError(f"{self._path} was not done after {timeout_s} s; its process was ended")

    def _gone(self, timeout_s: float, deadline: float) -> OSError:
        """It closed the connection, and ends by itself or when its time is up."""
        try:
            exit_code = self._keeper.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self._late(timeout_s)
        self._end()
        return ChildProcessError(f"{self._path} ended its process (exit code {exit_code})")


def _end(keeper: subprocess.Popen[bytes], connection: Connection, leash: int) -> None:
    """The keeper ends everything when the leash is let go."""
    connection.close()
    os.close(leash)
    try:
        keeper.wait(SWEEP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()


def keep() -> None:
    """The keeper: fork the process that calls, wait until it or the starter ends, end what it left, exit as it did.

    Arguments on the command line: the function's path, the connection's descriptor, and the one of the leash, a pipe
    that closes when the starter lets go or dies.
    """
    path, connection, leash = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    if (child := os.fork()) == 0:
        os.close(leash)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            serve(path, Connection(connection))
        return
    os.close(connection)
    status = _await_end(child, leash)
    os._exit(_sweep(child, status))


def _await_end(child: int, leash: int) -> int | None:
    """The child's wait status, or None if the leash was let go first; reaps orphans meanwhile."""
    poll = select.poll()
    poll.register(leash, select.POLLIN)
    poll.register(os.pidfd_open(child), select.POLLIN)
    while leash not in dict(poll.poll(REAP_EVERY_MS)):
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    return ended[1]
    return None


def _sweep(child: int, status: int | None) -> int:
    """Kill and reap until nothing is left; the child's exit code, of a signal as shells tell it.

    Whatever its parent was, an orphan becomes a child of this process; while there is none, there are no descendants.
    """
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            ended, its_status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        status = its_status if ended == child else status
    code = os.waitstatus_to_exitcode(status or 0)
    return code if code >= 0 else 128 - code


def _children() -> list[int]:
    """Process ids of this process's children that may still run or wait to be reaped."""
    mine = str(os.getpid())
    found: list[int] = []
    for folder in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            after_name = Path("/proc", folder, "stat").read_text(errors="replace").rpartition(")")[2]
            if after_name.split()[1] == mine:
                found.append(int(folder))
    return found


def serve(path: str, connection: Connection) -> None:
    """Import the function, then answer each list of arguments with [value, error]."""
    function, error = _attempt(load, path)
    connection.send_bytes(json.dumps([0.0, error]).encode())
    with contextlib.suppress(EOFError):  # the other side is gone
        while function is not None:
            arguments = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_number(*_attempt(function, *arguments))).encode())


def load(path: str) -> Function:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    Raises: whatever importing the module raises; AttributeError or TypeError if it has no such function.
    """
    module_name, _, name = path.rpartition(":")
    module = _file_module(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is {function!r}, which cannot be called")
    return function


def _file_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"file_{file.stem}", file.absolute())
    assert spec is not None and spec.loader is not None  # as for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _attempt(function: Callable[..., Result], *arguments: object) -> tuple[Result | None, str | None]:
    """Result and no error, or no result and the error's text. The errors of an unknown function are of any kind."""
    try:
        return function(*arguments), None
    except Exception:  # noqa: BLE001
        return None, f"raised\n{traceback.format_exc(limit=-2)[-MAX_TRACEBACK_CHARS:]}"


def _number(value: object, error: str | None) -> tuple[float | None, str | None]:
    if error is None and isinstance(value, numbers.Real):
        return float(value), None
    return None, error or f"returned {value!r}, which is not a number"
