"""failures.jsonl: what failed in a run, when, and when another was in its place. It is kept when a run goes back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Sink(Protocol):
    """Where the rows go: metrics.JsonLines."""

    def write(self, row: Mapping[str, object]) -> None:
        """Take one row."""


class FailureLog:
    """One row for each event, with the time of the run [s] as in the metrics."""

    def __init__(self, sink: Sink, clock: Callable[[], float]) -> None:
        self._sink, self._clock = sink, clock

    def fault(self, process: str, *, harm: str, moment: str | None, in_flight: Sequence[str]) -> None:
        """On purpose. `moment`: None if the drawn one did not come; `in_flight`: what was being called."""
        self._write("fault", process=process, harm=harm, moment=moment, in_flight=in_flight)

    def failed(self, process: str, *, error: str) -> None:
        """A process failed, or the learner did."""
        self._write("failed", process=process, error=error)

    def replaced(self, process: str) -> None:
        """Another one works in its place."""
        self._write("replaced", process=process)

    def restarted(self, *, step: int) -> None:
        """The learner goes on from this step."""
        self._write("restarted", process="learner", step=step)

    def _write(self, event: str, **fields: object) -> None:
        self._sink.write({"event": event, "elapsed_s": self._clock(), **fields})
