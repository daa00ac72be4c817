"""Start-up that the four commands share: logging, `--version`, refusals, and what Ray reads before it starts.

Imports the standard library alone (ray_addresses.py too): a command that refuses its arguments answers at once.
"""

import logging
import os
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestration.ray_addresses import stays_on_this_machine

DISTRIBUTION = "async-ebft"
ROOT = Path(__file__).resolve().parents[1]
LOG_LEVEL = "ASYNC_EBFT_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error")
HELP_ON_LOGS = f"{LOG_LEVEL}=debug in the environment logs more, with the traceback of whatever ends the command."
LOOPBACK_ENVIRONMENT = {
    "ASYNC_EBFT_LOOPBACK_ONLY": "1",  # actors/weights/host_ip.py
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so named, and heeded on Linux: Ray's processes listen on the loopback
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Of a run whose processes are all on this machine, and of commands that join it: nobody else can connect."""
OWN_LOGGERS = ("actors", "feature_server", "learner", "orchestration", "__main__")

logger = logging.getLogger(__name__)


def start_command(arguments: Sequence[str], *, level: str = "info") -> None:
    """Set up logging, at `level` unless the environment's LOG_LEVEL is another; `debug` is for this project alone.

    `--version` among the arguments is answered and ends the process; a level that does not exist ends it with status 2.
    """
    if "--version" in arguments:
        print(f"{DISTRIBUTION} {project_version()}")
        sys.exit(0)
    wanted = (os.environ.get(LOG_LEVEL) or level).lower()
    if wanted not in LEVELS:
        print(f"{LOG_LEVEL}={wanted!r} must be one of {', '.join(LEVELS)}; correct or unset it", file=sys.stderr)
        sys.exit(2)
    own = wanted.upper()
    logging.basicConfig(
        level=max(logging.INFO, getattr(logging, own)), format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(own)


def project_version() -> str:
    """That of the installed distribution, or of pyproject.toml where the source is run without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def refuse(error: Exception, *, what: str = "configuration refused", status: int = 2) -> int:
    """Print why nothing was started; returns the exit status for that."""
    logger.debug("refused here:", exc_info=error)
    print(f"{what}: {error}", file=sys.stderr)
    return status


def set_ray_environment(address: str | None) -> None:
    """Set the variables that Ray reads, for the cluster at this address (None: one that is to be started); to be called
    before it is imported."""
    # Ray decides about authentication by this variable and by a token file, differently in each of its commands, unless
    # it is set: a driver with a token can join a head with or without authentication.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would build a new environment for its workers; they share this one.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if stays_on_this_machine(address):
        os.environ.update(LOOPBACK_ENVIRONMENT)
