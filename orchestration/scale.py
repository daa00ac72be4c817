"""Scale a running job: `python orchestration/scale.py --rollout-workers 4 [--feature-servers 2] [--run NAME]`.

Run it on a machine of the run's Ray. Where several Rays run, RAY_ADDRESS names the one that is meant.
"""

import os
import sys
import threading
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as in run.py

from dataclasses import dataclass  # noqa: E402

import tyro  # noqa: E402

from orchestration.ray_addresses import address_of_a_run, require_answer  # noqa: E402
from orchestration.start_up import HELP_ON_LOGS, refuse, set_ray_environment, start_command  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Add or remove processes of a running job."""

    rollout_workers: int | None = None
    """Wanted number of rollout workers; left out: unchanged."""
    feature_servers: int | None = None
    """Wanted number of feature servers; left out: unchanged."""
    run: str | None = None
    """The run's folder, or its last name; may be left out if only one run is active."""
    timeout_s: float = 600.0
    """Longest wait for the answer [s]."""


def main(settings: Scale) -> int:
    """Exit status: 0 done, 1 refused or failed."""
    if settings.rollout_workers is None and settings.feature_servers is None:
        print("refused: nothing to change; give --rollout-workers N, --feature-servers N or both", file=sys.stderr)
        return 1
    _end_after(settings.timeout_s)
    try:
        address = address_of_a_run()
        require_answer(address)
        set_ray_environment(address)
        from orchestration.cluster.control import ScaleRequest, submit_scale_request

        request = ScaleRequest(rollout_workers=settings.rollout_workers, feature_servers=settings.feature_servers)
        answer = submit_scale_request(request, address=address, run=settings.run)
    except (ValueError, ConnectionError) as error:
        return refuse(error, what="refused", status=1)
    print(
        answer.text if answer.accepted else f"refused: {answer.text}",
        file=sys.stdout if answer.accepted else sys.stderr,
    )
    return 0 if answer.accepted else 1


def _end_after(timeout_s: float) -> None:
    """End this process then, whatever it is doing: Ray's own waits for a cluster have no limit that could be set."""

    def give_up() -> None:
        print(
            f"refused: no answer within {timeout_s:g} s (--timeout-s); the run's log says what it is doing",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    watchdog = threading.Timer(timeout_s, give_up)
    watchdog.daemon = True
    watchdog.start()


if __name__ == "__main__":
    start_command(sys.argv[1:], level="warning")
    sys.exit(main(tyro.cli(Scale, description=f"{Scale.__doc__}\n\n{HELP_ON_LOGS}")))
