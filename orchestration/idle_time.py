"""Idle seconds of each role, by reason, between two steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class IdleTime:
    """Adds up waits; one still in progress counts for each interval with the part that lies in it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flushed_at = clock()
        self._open: dict[object, tuple[str, float]] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Everything inside counts as idle time for this reason."""
        key = object()
        self._open[key] = (reason, self._clock())
        try:
            yield
        finally:
            _, since = self._open.pop(key)
            self._add(reason, since, self._clock())

    @property
    def open(self) -> list[str]:
        """The waits in progress, each with its reason and since when."""
        now = self._clock()
        return [f"{reason} for {now - since:.0f} s" for reason, since in self._open.values()]

    def flush(self) -> tuple[dict[str, float], float]:
        """Seconds by reason since the last flush, summed over all waits, and the length of that interval [s]."""
        now = self._clock()
        for reason, since in self._open.values():
            self._add(reason, since, now)
        seconds, interval = self._seconds, now - self._flushed_at
        self._seconds = {}
        self._flushed_at = now
        return seconds, interval

    def _add(self, reason: str, since: float, until: float) -> None:
        seconds = until - max(since, self._flushed_at)
        self._seconds[reason] = self._seconds.get(reason, 0.0) + seconds
