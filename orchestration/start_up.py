"""Start-up that the four commands share: logging, `--version`, refusals, and what Ray reads before it starts.

Imports the standard library alone: a command that refuses its arguments answers at once.
"""

import logging
import os
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "async-ebft"
ROOT = Path(__file__).resolve().parents[1]
LOG_LEVEL = "ASYNC_EBFT_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error")
HELP_ON_LOGS = f"{LOG_LEVEL}=debug in the environment logs more, with the traceback of whatever ends the command."
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


def set_ray_environment() -> None:
    """Set the variables that Ray reads; to be called before it is imported."""
    # Ray decides about authentication by this variable and by a token file, differently in each of its commands, unless
    # it is set: a driver with a token can join a head with or without authentication.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would build a new environment for its workers; they share this one.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
