"""Commands as users start them, but forked from a process that has imported everything already.

What a command does is the same; the 15 seconds of imports that each would begin with are spent once in a test session.
Where a new process is the point (a submitted job, a run without a cluster), `own_cluster.run` starts one.
"""

import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from own_cluster import ROOT, Finished, descendants, kill

from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT

_server = get_context("forkserver")


def run_warm(
    *command: str,
    environment: dict[str, str],
    timeout_s: float = 400.0,
    meanwhile: Callable[[psutil.Process], None] = lambda process: None,
) -> Finished:
    """`python SCRIPT ARGUMENTS` in the repository's root, to its end; `meanwhile(process)` is called again and again.

    Raises: TimeoutError with the output; everything below the process is killed then.
    """
    started: dict[int, psutil.Process] = {}
    with tempfile.NamedTemporaryFile("r") as output:
        _server.set_forkserver_preload(["pytest", "warm_imports"])  # not before: other tests' processes need less
        process = _server.Process(target=_execute, args=(command, environment, output.name))
        with pytest.MonkeyPatch.context() as patch:
            # Of the server, which the first call starts: what engines and Ray read when they are imported.
            for name, value in (CPU_ENGINE_ENVIRONMENT | ENGINE_ENVIRONMENT | {"RAY_AUTH_MODE": "token"}).items():
                patch.setenv(name, value)
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
            process.start()
        itself = psutil.Process(process.pid)
        deadline = time.monotonic() + timeout_s
        while process.is_alive() and time.monotonic() < deadline:
            started |= {child.pid: child for child in descendants(itself)}
            meanwhile(itself)
            process.join(0.1)
        timed_out = process.is_alive()
        if timed_out:
            kill([*started.values(), itself])
        text = output.read()
    if timed_out:
        raise TimeoutError(f"{command} took more than {timeout_s:g} s:\n{text}")
    return Finished(returncode=process.exitcode, output=text, started=list(started.values()))


def _execute(command: Sequence[str], environment: dict[str, str], output: str) -> None:
    """Body of the forked process."""
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what an import may have asked for was the folder of another environment
    os.chdir(ROOT)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))  # as Python does for a script
    runpy.run_path(command[0], run_name="__main__")
