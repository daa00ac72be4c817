"""Concurrent loops, each with an owner: they end with the last one, fail together, and an owner's may end earlier."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager

Loop = Coroutine[None, None, None]


class Loops:
    """The tasks of a run by their owner: a worker, a scorer, or the run itself."""

    def __init__(self) -> None:
        self._tasks: dict[object, list[asyncio.Task[None]]] = {}
        self._holding_nothing: set[object] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, loops are started; left when all have ended. The first that fails ends the others, and its error is
        raised."""
        try:
            async with asyncio.TaskGroup() as self._group:
                yield
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    def start(self, owner: object, *loops: Loop) -> None:
        """The first loop of an owner is the one that takes work and hands it on; the others end with it."""
        self._tasks[owner] = self._tasks.get(owner, []) + [self._group.create_task(loop) for loop in loops]

    def start_last(self, loop: Loop) -> None:
        """One more loop, whose end is the end of all others."""
        self._group.create_task(loop).add_done_callback(lambda _: self._cancel_all())

    @contextmanager
    def holding_nothing(self, owner: object) -> Iterator[None]:
        """Inside, the first loop of the owner waits for work: it may be cancelled."""
        self._holding_nothing.add(owner)
        try:
            yield
        finally:
            self._holding_nothing.discard(owner)

    async def end(self, owner: object) -> None:
        """End the loops of an owner that takes no more work; returns when it has handed on what it has."""
        first, *others = self._tasks.pop(owner)
        if owner in self._holding_nothing:
            first.cancel()
        await asyncio.wait([first])
        for task in others:
            task.cancel()

    def _cancel_all(self) -> None:
        for task in (task for tasks in self._tasks.values() for task in tasks):
            task.cancel()
