"""The folder of one run."""

import fcntl
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestration.config import RunConfig

logger = logging.getLogger(__name__)

LOCK = ".lock"
NEEDED_BYTES = 64 * 2**20
"""Free space below which a run is refused: metrics, samples and a small checkpoint would not fit."""


def run_folder(config: RunConfig) -> Path:
    """Where the results of this run go.

    A job that Ray unpacked into a folder of its own would lose relative outputs with that folder, so they go to the
    home directory there.
    """
    parent = Path(config.logging.output_dir).expanduser()
    if not parent.is_absolute() and "working_dir_files" in Path.cwd().parts:
        parent = Path.home() / "async-ebft" / parent
    return (parent / (config.logging.run_name or time.strftime("%Y%m%d-%H%M%S"))).absolute()


def make_run_folder(config: RunConfig) -> Path:
    """Create the run's folder and check that it can be written.

    Raises: OSError naming the folder if it is read-only or its disk is nearly full; FileExistsError if it is taken.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
    except FileExistsError as error:
        raise FileExistsError(
            f"run folder {folder} exists; choose another logging.run_name, so that no earlier run is overwritten, or "
            "give --resume auto to continue it"
        ) from error
    except OSError as error:
        raise OSError(
            f"cannot write to {folder} ({error.strerror}); logging.output_dir must be a folder that can be written to"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        remove_without_results(folder)
        raise OSError(
            f"only {free / 2**20:.0f} MiB are free for {folder}, a run needs {NEEDED_BYTES / 2**20:.0f}; free space or "
            "choose another logging.output_dir"
        )
    return folder


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, no other process runs in this folder. A process that dies lets go.

    Raises: FileExistsError if one does.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is running in {folder}; wait for its end, or stop it") from error
        yield


def remove_without_results(folder: Path) -> None:
    """Remove the folder of a run that was refused or failed before its first result, so that its name is free again.

    Its configuration, folders without files, and logs in which nothing was written, are no results. Where a process is
    running, the folder stays.
    """
    if _has_results(folder):
        return
    with suppress(FileExistsError), owned(folder):
        if not _has_results(folder):
            shutil.rmtree(folder)


def _has_results(folder: Path) -> bool:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.toml")
    return any(path.stat().st_size for path in files)
