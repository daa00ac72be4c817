"""Inside a process: builds its worker and calls the worker's methods by name. The only place that looks names up."""

import os
import pickle
import platform
import signal
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

from orchestration.cluster.remote import Identity


class Worker(Protocol):
    """What a process is for."""

    startup_s: dict[str, float]
    """Seconds of its own start-up, by stage."""


class Host:
    """Owns one worker; in a Ray actor of its own, it is the actor's body."""

    def __init__(self, pickled_build: bytes, launched_at: float) -> None:
        """`pickled_build`: `ProcessSpec.build`, unpickled here so that the imports it needs are timed."""
        started = time.time()
        build: Callable[[], Worker] = pickle.loads(pickled_build)
        self._startup_s = {"process": started - launched_at, "imports": time.time() - started}
        self._worker = build()
        self._harm = ""

    def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, the worker's own `startup_s` included; returns once it is built."""
        own = dict(self._worker.startup_s)
        return self._startup_s | {"imports": self._startup_s["imports"] + own.pop("imports", 0.0)} | own

    def pulse(self) -> None:
        """The process lives, if this returns."""

    def identity(self) -> Identity:
        """Where it is."""
        return Identity(platform.node(), os.getpid())

    def harm(self, how: str) -> None:
        """On purpose (supervision.chaos)."""
        if how in ("exception", "hang"):
            self._harm = how
        else:
            os.kill(os.getpid(), signal.Signals[how])

    def call(self, method: str, *args: object, **kwargs: object) -> object:
        """Call the method."""
        return self._method(method)(*args, **kwargs)

    def stream(self, method: str, *args: object, **kwargs: object) -> Generator[object, None, None]:
        """Yield what the method yields, then what it returns."""
        yield (yield from self._method(method)(*args, **kwargs))

    def call_each(self, method: str, summary: Callable[..., object], *items: object) -> list[object]:
        """A list of the results' summaries, then each result as an object of its own in the store.

        Items that were references have arrived by then.
        """
        results = self._method(method)(list(items))
        return [[summary(result) for result in results], *results]

    def _method(self, name: str) -> Callable[..., Any]:
        harm, self._harm = self._harm, ""
        if harm == "exception":
            raise RuntimeError(f"{name}() fails on purpose (chaos)")
        while harm == "hang":
            time.sleep(1.0)
        return getattr(self._worker, name)
