"""A function in a process of its own, so that it can be killed when it hangs.

Guarantee: a call returns or raises within its deadline. A process that hung or died is gone by then, and the next
call starts another. What the function prints goes to standard error. The process ends with the one that started it,
at the latest when the running call is over.

Life: start, import, (confine,) calls one after the other. Called by verifiers.py. Standard library only.
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import numbers
import os
import resource
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

from feature_server.verifiers.syscall_filter import confine

IMPORT_TIMEOUT_S = 120.0
"""Longest time that importing the function may take [s]: some modules bring torch."""
ORPHAN_GRACE_S = 1.0
"""Time past its deadline after which a call whose starter was killed ends its own process [s]."""
MAX_TRACEBACK_CHARS = 2000
COMMAND = [sys.executable, "-P", "-c", "from feature_server.verifiers.function_process import serve; serve()"]

Function = Callable[..., object]
Result = TypeVar("Result")


class FunctionProcess:
    """Calls one function in another process, with strings as arguments and a number as result. Thread-safe."""

    def __init__(self, path: str, *, timeout_s: float, confined_mib: int | None = None) -> None:
        """Start the process and import the function.

        path: `package.module:function` or `path/to/file.py:function`.
        timeout_s: longest time of one call [s].
        confined_mib: None leaves the function all that the user may do. Else `function` takes no argument and makes the
        function to be called, which runs under the system-call filter with this much more address space [MiB].
        Raises: ValueError if it cannot be imported, naming what was tried; TimeoutError if that took too long.
        Test: test_verifiers.py
        """
        self._path = path
        self._timeout_s = timeout_s
        self._confined_mib = confined_mib
        self._lock = threading.Lock()
        self._start()

    def __call__(self, *arguments: str) -> float:
        """What the function returned; it may be NaN or infinite.

        Raises: ValueError if it raised or returned no number; TimeoutError if it hung; ChildProcessError if its
        process died.
        """
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            with contextlib.suppress(OSError):  # it died: no reply will come, which `_reply` reports
                self._connection.send_bytes(json.dumps(arguments).encode())
            return self._reply(self._timeout_s)

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        search_path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        self._process = subprocess.Popen(
            [*COMMAND, self._path, str(self._timeout_s), str(self._confined_mib or 0), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        self._reply(IMPORT_TIMEOUT_S)

    def _reply(self, timeout_s: float) -> float:
        deadline = time.monotonic() + timeout_s
        killer = threading.Timer(timeout_s, _kill, [self._process])
        killer.start()
        try:
            value, error = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as reason:
            exit_code = self._process.wait()  # at the latest when the timer kills it
            self._end()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self._path} was not done after {timeout_s} s; its process was ended") from None
            raise ChildProcessError(f"{self._path} ended its process (exit code {exit_code})") from reason
        finally:
            killer.cancel()
        if error is not None:
            raise ValueError(f"{self._path} {error}")
        return value


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # not reaped yet, so its process group id cannot have been reused
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    _kill(process)
    process.wait()
    connection.close()


def serve() -> None:
    """The other side: import the function, then answer each list of arguments with [value, error]."""
    path, timeout_s, confined_mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    connection = Connection(int(sys.argv[4]))
    function, error = _attempt(load, path)
    if function is not None and confined_mib:
        function, error = _attempt(_made_and_confined, function, confined_mib)
    connection.send_bytes(json.dumps([0.0, error]).encode())
    with contextlib.suppress(EOFError):  # the other side is gone
        while function is not None:
            arguments = json.loads(connection.recv_bytes())
            faulthandler.dump_traceback_later(timeout_s + ORPHAN_GRACE_S, exit=True)
            reply = _number(*_attempt(function, *arguments))
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(json.dumps(reply).encode())


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


def _made_and_confined(make: Function, confined_mib: int) -> Function:
    function = make()
    if not callable(function):
        raise TypeError(f"it made {function!r}, which cannot be called")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + confined_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    confine()
    return function


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
