"""An event loop whose clock jumps: waiting costs nothing, so hours of a run pass in seconds, the same each time.

Everything that asks the loop for the time (`asyncio.sleep`, timeouts, the controller's own measurements) then lives in
virtual time. Nothing in it may wait for the outside world: no processes, no network, no threads.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

Result = TypeVar("Result")

_RESOLUTION_S = time.get_clock_info("monotonic").resolution


class StandstillError(RuntimeError):
    """Every task waits for another, and none for time to pass."""


class _Jump(selectors.BaseSelector):
    """Stands in for the wait on files: the clock moves on instead."""

    def __init__(self) -> None:
        self.now = 0.0
        self._files: dict[FileDescriptorLike, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError("deadlock: every task waits for another, and no time-out will end it")
        if timeout > 0:
            self.now += timeout
            # The loop wakes tasks due before now + its resolution; after years that sum rounds to now, and none is due.
            if self.now + _RESOLUTION_S == self.now:
                self.now = math.nextafter(self.now, math.inf)
        return []

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        self._files[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)  # the loop's own wake-up pipe
        return self._files[fileobj]

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._files.pop(fileobj)

    def get_map(self) -> dict[FileDescriptorLike, selectors.SelectorKey]:
        return self._files


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at time 0."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jump.now


def run_in_virtual_time(main: Coroutine[None, None, Result]) -> Result:
    """As `asyncio.run`, in virtual time.

    Raises: StandstillError if every task waits and nothing is scheduled.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
