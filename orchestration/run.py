"""Run asynchronous EBFT: `python orchestration/run.py [config.toml] [--section.key value ...]`.

The same command is the entrypoint of `ray job submit`. Without a running Ray it starts one on this machine.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python orchestration/run.py` would put orchestration/ itself here and hide stdlib modules

import logging  # noqa: E402

from orchestration.command_line import parse_arguments  # noqa: E402
from orchestration.ray_addresses import address_to_join  # noqa: E402
from orchestration.start_up import refuse, set_ray_environment, start_command  # noqa: E402


def main() -> int:
    """Exit status: 0 done, 1 failed while running, 2 refused before anything started."""
    start_command(sys.argv[1:])
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # it would log the temporary folder
    try:
        config = parse_arguments(sys.argv[1:])
        set_ray_environment(address_to_join())
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    from orchestration.session import run_session  # imports torch and Ray: not needed to refuse a bad configuration

    return run_session(config)


if __name__ == "__main__":
    sys.exit(main())
