"""Where every process of a run stands, when none of them gets on: their stacks, by py-spy where there is one."""

import asyncio
import logging
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestration.cluster.remote import ProcessFailure, Remote

logger = logging.getLogger(__name__)

DUMP_S = 10.0
"""Longest time that one dump may take [s]."""


async def write_stacks(path: Path, processes: Sequence[Remote[object]]) -> None:
    """The stacks of this process and of all those on this machine, one after the other."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        logger.info("no stacks of the processes: py-spy is not installed")
        return
    pids = {"driver": os.getpid()}
    for remote in processes:
        try:
            identity = await remote.identity()
        except ProcessFailure as failure:
            logger.info("no stack: %s", failure)
            continue
        if identity.node == platform.node():
            pids[remote.name] = identity.pid
    dumps = [f"# {name} (pid {pid})\n{await _dump(program, pid)}" for name, pid in pids.items()]
    path.write_text("\n".join(dumps), encoding="utf-8")
    logger.info("stacks of %d processes: %s", len(pids), path)


async def _dump(program: str, pid: int) -> str:
    """What py-spy says, be it why it says nothing: not every system lets it look."""
    command = [program, "dump", "--pid", str(pid)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(DUMP_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        return f"py-spy did not answer within {DUMP_S:g} s\n"
    return output.decode("utf-8", "replace")
