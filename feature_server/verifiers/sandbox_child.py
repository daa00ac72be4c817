"""The inner half of the sandbox: the process that limits itself and then runs one program.

Started by sandbox.py alone, which sends token and program over standard input. Standard library only: it starts fast.
"""

import ctypes
import math
import os
import resource
import signal
import sys
import types

from feature_server.verifiers.syscall_filter import confine

TOKEN_BYTES = 32
PR_SET_PDEATHSIG = 1
MAX_OPEN_FILES = 64
MAX_VERDICT_CHARS = 1000


def run() -> None:
    """Run the program on standard input under limits; write the verdict to a descriptor; end.

    Arguments on the command line: the descriptor, the waiting process's id, MiB, seconds. Input: the token, then the
    program's source. The verdict is the token if the program ran through; the token and a reason if the process could
    not be confined, so that nothing ran; or else "<status>\\n<detail>".
    """
    descriptor, starter, memory_mib = map(int, sys.argv[1:4])
    timeout_s = float(sys.argv[4])
    with open(0, "rb", buffering=0) as job:  # not sys.stdin, whose buffer would keep the token for the program
        token, source = job.read(TOKEN_BYTES), job.read().decode("utf-8", "surrogatepass")
    os.open(os.devnull, os.O_RDONLY)  # takes the free descriptor 0
    del sys.argv[1:]
    write, leave = os.write, os._exit  # bound before the program can replace them
    _end_with(starter)
    unconfined = _limit(timeout_s, memory_mib)
    verdict = token + unconfined if unconfined else _outcome(source) or token
    write(descriptor, verdict)
    leave(0)  # no exit handler of the program runs, no thread of it is waited for


def _end_with(starter: int) -> None:
    """A killed run leaves no program behind. The thread whose death counts is the one that waits in run_program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != starter:  # it died before
        os._exit(1)


def _limit(timeout_s: float, memory_mib: int) -> bytes | None:
    """Set all limits; None if they hold, or else why not."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mib * 2**20,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (soft, hard))  # the soft one binds; no call that could raise it is let through
    try:
        confine()
    except RuntimeError as error:
        return str(error).encode()
    return None


def _outcome(source: str) -> bytes | None:
    """Run the program as a fresh `__main__`; None if its last line was reached and ended."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except MemoryError:
        return b"memory\nMemoryError"
    except BaseException as error:  # noqa: BLE001  whatever the program raises is its verdict
        text = f"{_status(error)}\n{type(error).__name__}: {error}"
        return text[:MAX_VERDICT_CHARS].encode("utf-8", "replace")
    return None


def _status(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "crashed"
    return "forbidden" if isinstance(error, PermissionError) else "failed"
