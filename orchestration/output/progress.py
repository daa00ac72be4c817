"""Progress of a run: a live display in a terminal, plain lines anywhere else."""

import logging
import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SHOWN = {
    "reward/cfm_loss/mean": ("CFM", "{:.4f}"),
    "loss/cross_entropy": ("CE", "{:.3f}"),
    "reward/total/mean": ("reward", "{:+.4f}"),
    "lag/mean": ("lag", "{:.1f}"),
    "buffer/scored": ("queue", "{:.0f}"),
    "time/step_s": ("step s", "{:.1f}"),
    "time/wait_for_batch_s": ("wait s", "{:.1f}"),
    "off_policy/ess_frac": ("ESS", "{:.2f}"),
}
"""Metric -> short label and format of the display."""


def headline(row: Mapping[str, float]) -> str:
    """The row's most telling numbers in one line."""
    shown = [f"{label} {style.format(row[name])}" for name, (label, style) in SHOWN.items() if name in row]
    if "rollout/tokens" in row and row.get("time/step_s"):
        shown.append(f"{row['rollout/tokens'] / row['time/step_s']:.0f} tok/s")
    return "  ".join(shown)


class ProgressDisplay:
    """A metrics sink for people to watch; use it as a context manager around the run."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._live = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=20), TaskProgressColumn(),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True), disable=not self._live,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=num_steps, numbers="")

    def write(self, row: Mapping[str, float]) -> None:
        """Show a step's row; rows of evaluations alone are logged elsewhere."""
        if "time/step_s" not in row:
            return
        if self._live:
            self._progress.update(self._task, completed=row["step"], numbers=headline(row))
        else:
            logger.info("step %d/%d  %s", row["step"], self._num_steps, headline(row))

    def close(self) -> None:
        """Nothing to do: the display ends with its context."""

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        _log_to_current_stderr()  # which is now the display's: lines go above the bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        _log_to_current_stderr()


def _log_to_current_stderr() -> None:
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # not its subclasses, which write elsewhere
            handler.setStream(sys.stderr)
