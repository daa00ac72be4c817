"""Every process of a real run, at every moment of its work, killed, stopped, made to raise and made to hang.

    python benchmarks/kill_matrix.py [--harms SIGKILL SIGSTOP exception hang] [--folder DIR]

One run of the embedded model with one process of each role, the least that there can be, so that nobody stands in. One
fault after the other strikes it; a fault that ends the run, as what the learner raises does, must say why, and the run
is resumed for the next. Printed for each role, moment and harm: seconds until the failure was noticed, until another
process worked in its place (or the learner went on), until a step took no longer than 1 / 0.9 of the median before; or
the error that ended the run. Exit status 1 if a cell did neither.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from orchestration.ray_addresses import address_to_join  # noqa: E402
from orchestration.start_up import set_ray_environment, start_command  # noqa: E402

set_ray_environment(address_to_join())

import tyro  # noqa: E402

from orchestration.config import RunConfig  # noqa: E402
from orchestration.session import run_session  # noqa: E402
from orchestration.supervision.chaos import MOMENTS, Fault  # noqa: E402

SETTLE_S = 15.0
"""Between two faults [s]: time to come back."""
PATIENCE_S = 90.0
"""Longest wait for a moment [s]."""
ROLES = ("rollout worker", "feature server", "learner rank")
NEVER = 100_000
"""Steps: the run ends when the last fault has struck."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Strike one process at each moment in each way."""

    harms: tuple[str, ...] = ("SIGKILL", "SIGSTOP", "exception", "hang")
    """What happens to it."""
    folder: Path | None = None
    """Of the run; None: a temporary one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of one fault."""

    fault: Fault
    noticed_s: float | None = None
    replaced_s: float | None = None
    back_s: float | None = None
    error: str = ""

    def __str__(self) -> str:
        seconds = (self.noticed_s, self.replaced_s, self.back_s)
        times = "  ".join("     -" if s is None else f"{s:6.1f}" for s in seconds)
        return f"{self.fault.role:15} {self.fault.moment:11} {self.fault.harm:10} {times}  {self.error}"

    @property
    def is_good(self) -> bool:
        """It came back, or it said why not."""
        return self.back_s is not None or bool(self.error)


def main(settings: Settings) -> int:
    """Exit status."""
    cells = [Fault(SETTLE_S, r, m, h, 0.0) for h in settings.harms for r in ROLES for m in MOMENTS[r]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (settings.folder or Path(temporary)) / "kill_matrix"
        remaining, results = cells, []
        while remaining:
            struck = run_with(remaining, folder)
            results += list(outcomes(remaining[:struck], folder))
            remaining = remaining[struck:]
    print(f"{'role':15} {'moment':11} {'harm':10} noticed replaced  back  [s]")
    for cell in results:
        print(cell)
    noticed = [cell.noticed_s for cell in results if cell.noticed_s is not None]
    print(f"{len(results)} cells, {sum(cell.is_good for cell in results)} good; noticed after {_spread(noticed)} s")
    return 0 if all(cell.is_good for cell in results) else 1


def run_with(faults: Sequence[Fault], folder: Path) -> int:
    """Run, or resume, until the last fault has struck or one has ended the run; returns how many have struck."""

    def schedule(index: int, roles: Sequence[str]) -> Fault | None:
        if index < len(faults):
            return faults[index]
        os.kill(os.getpid(), signal.SIGTERM)  # save and end
        return None

    before = len(rows_of(folder / "failures.jsonl", "fault"))
    with (
        patch("orchestration.session.seeded_schedule", lambda chaos: schedule),
        patch("orchestration.supervision.chaos.PATIENCE_S", PATIENCE_S),
    ):
        status = run_session(config(folder))
    struck = len(rows_of(folder / "failures.jsonl", "fault")) - before
    assert status in (1, 128 + signal.SIGTERM) and struck > 0, f"the run ended with {status} after {struck} faults"
    return struck


def rows_of(path: Path, event: str) -> list[dict]:
    """Of failures.jsonl, those of one event."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["event"] == event]


def config(folder: Path) -> RunConfig:
    """One process of each role; a checkpoint every 3 steps and an evaluation every 10."""
    tree = {
        "resume": "auto",
        "chaos": "0",
        "learner": {"num_steps": NEVER, "warmup_frac": 0.0, "documents_per_step": 4},
        "evaluation": {"every_steps": 10, "documents": 16},
        "checkpoint": {"every_steps": 3},
        "recovery": {"max_replacements": 10_000, "max_learner_restarts": 100},
        "logging": {"output_dir": str(folder.parent), "run_name": folder.name},
    }
    return RunConfig.model_validate(tree)


def outcomes(faults: Sequence[Fault], folder: Path) -> Iterator[Cell]:
    """By the run's failures.jsonl, from its newest rows back, and its metrics."""
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["time/elapsed_s"], row["time/step_s"]) for row in rows if "time/step_s" in row]
    usual_s = statistics.median(seconds for _, seconds in steps)
    places = [index for index, row in enumerate(failures) if row["event"] == "fault"][-len(faults) :]
    for fault, place, end in zip(faults, places, [*places[1:], len(failures)], strict=True):
        yield _outcome(fault, failures[place:end], steps, usual_s)


def _outcome(fault: Fault, rows: Sequence[dict], steps: Sequence[tuple[float, float]], usual_s: float) -> Cell:
    start_s = rows[0]["elapsed_s"]
    noticed = next((row for row in rows if row["event"] == "failed"), None)
    replaced = next((row for row in rows if row["event"] in ("replaced", "restarted")), None)
    if noticed is None:
        return Cell(fault, error="" if fault.harm.startswith("SIG") else "ended the run; see the log")
    if replaced is None:
        return Cell(fault, noticed["elapsed_s"] - start_s, error=noticed["error"])
    back = [end for end, seconds in steps if end > replaced["elapsed_s"] and seconds <= usual_s / 0.9]
    return Cell(
        fault,
        noticed["elapsed_s"] - start_s,
        replaced["elapsed_s"] - start_s,
        back[0] - start_s if back else None,
    )


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f} (median {statistics.median(values):.1f})" if values else "-"


if __name__ == "__main__":
    start_command(sys.argv[1:])
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
