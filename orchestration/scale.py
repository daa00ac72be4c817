"""Scale a running job: `python orchestration/scale.py --rollout-workers 4 [--feature-servers 2] [--run NAME]`.

Run it where `ray job submit` works, or on the machine of a run that started its own Ray.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as in run.py

from dataclasses import dataclass  # noqa: E402

import tyro  # noqa: E402

from orchestration.start_up import HELP_ON_LOGS, refuse, set_ray_environment, start_command  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Add or remove processes of a running job."""

    rollout_workers: int | None = None
    """Wanted number of rollout workers; left out: unchanged."""
    feature_servers: int | None = None
    """Wanted number of feature servers; left out: unchanged."""
    run: str | None = None
    """Name of the run's folder; may be left out if only one run is active."""
    timeout_s: float = 600.0
    """Longest wait for the answer [s]."""


def main(settings: Scale) -> int:
    """Exit status: 0 done, 1 refused or failed."""
    set_ray_environment()
    from orchestration.cluster.control import ScaleRequest, submit_scale_request

    if settings.rollout_workers is None and settings.feature_servers is None:
        print("refused: nothing to change; give --rollout-workers N, --feature-servers N or both", file=sys.stderr)
        return 1
    request = ScaleRequest(rollout_workers=settings.rollout_workers, feature_servers=settings.feature_servers)
    try:
        answer = submit_scale_request(request, run=settings.run, timeout_s=settings.timeout_s)
    except (ValueError, ConnectionError, TimeoutError) as error:
        return refuse(error, what="refused", status=1)
    print(
        answer.text if answer.accepted else f"refused: {answer.text}",
        file=sys.stdout if answer.accepted else sys.stderr,
    )
    return 0 if answer.accepted else 1


if __name__ == "__main__":
    start_command(sys.argv[1:], level="warning")
    sys.exit(main(tyro.cli(Scale, description=f"{Scale.__doc__}\n\n{HELP_ON_LOGS}")))
