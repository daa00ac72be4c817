"""All that a process gives up before it runs what a model wrote: descriptors, time, memory, files, system calls.

Guarantee: a process that returned from `confine_process` keeps no descriptor but those named, ends with its parent, and
stays within its limits, or it raised and nothing ran.

Called in forked children of fork_server.py. Standard library only: it starts fast.
"""

import ctypes
import math
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from feature_server.verifiers.file_rules import hide_files, rules_exist
from feature_server.verifiers.syscall_filter import confine

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
MAX_OPEN_FILES = 64
LAST_STANDARD_DESCRIPTOR = 2
SHARED_FILES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/local/lib", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"),
)
"""What Python's own modules open: shared libraries, time zones, no input, random bytes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one process."""

    timeout_s: float
    """Its processor time is bounded a little above this; the wall time is the parent's to watch [s]."""
    memory_mib: int
    """Address space beyond what the process has already [MiB]."""


def confine_process(limits: Limits, *, parent: int, keep: Sequence[int], visible: Sequence[str]) -> None:
    """Give up everything else, irrevocably.

    parent: process id; its death ends this process. keep: descriptors that stay open beside the standard ones.
    visible: files and folders that stay readable where the kernel can hide the others.
    Raises: RuntimeError or OSError if the machine cannot confine.
    """
    _end_with(parent)
    _close_all_but(keep)
    _set_limits(limits)
    if rules_exist():
        hide_files(visible)
    confine()


def readable_files(folder: str) -> list[str]:
    """What Python needs to import and run, and the given folder."""
    library = [str(Path(place).resolve()) for place in (sys.base_prefix, sys.prefix)]
    return [folder, *(f"{place}/lib" for place in library), *(p for p in sys.path if p), *SHARED_FILES]


def _end_with(parent: int) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # /proc shows nothing of it to others of the user, where files show
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _close_all_but(keep: Sequence[int]) -> None:
    start = LAST_STANDARD_DESCRIPTOR + 1
    for descriptor in sorted(keep):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 2**31 - 1)


def _set_limits(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    values = {
        resource.RLIMIT_CPU: math.ceil(limits.timeout_s) + 1,
        resource.RLIMIT_AS: pages * resource.getpagesize() + limits.memory_mib * 2**20,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in values.items():
        _, hard = resource.getrlimit(limit)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (soft, hard))  # the soft one binds; no call that could raise it is let through
