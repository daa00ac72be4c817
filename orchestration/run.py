"""Run asynchronous EBFT: `python orchestration/run.py [config.toml] [--section.key value ...]`.

The same command is the entrypoint of `ray job submit`. Without a running Ray it starts one on this machine.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python orchestration/run.py` would put orchestration/ itself here and hide stdlib modules
# Ray decides about authentication by this variable and by a token file, differently in each of its commands, unless
# it is set: a driver with a token can join a head with or without authentication.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Under `uv run` Ray would build a new environment for its workers; they share this one.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import logging  # noqa: E402

from orchestration.command_line import parse_arguments  # noqa: E402


def main() -> int:
    """Exit status: 0 done, 1 failed while running, 2 refused before anything started."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # it would tell of the folder before its last name
    logging.captureWarnings(True)
    try:
        config = parse_arguments(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"configuration refused: {error}", file=sys.stderr)
        return 2
    from orchestration.session import run_session  # imports torch and Ray: not needed to refuse a bad configuration

    return run_session(config)


if __name__ == "__main__":
    sys.exit(main())
