"""Concurrent loops, each with an owner: they end with the last one, fail together, and an owner's may end earlier."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager

Loop = Coroutine[None, None, None]


@contextmanager
def first_error() -> Iterator[None]:
    """Around a TaskGroup: its first error is raised by itself."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


class Loops:
    """The tasks of a run by their owner: a worker, a scorer, or the run itself."""

    def __init__(self) -> None:
        self._tasks: dict[object, list[asyncio.Task[None]]] = {}
        self._work: dict[object, asyncio.Task[None]] = {}
        self._all: dict[asyncio.Task[None], None] = {}
        self._holding_nothing: set[object] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, loops are started; left when all have ended. The first that fails ends the others, and its error is
        raised."""
        with first_error():
            async with asyncio.TaskGroup() as self._group:
                yield

    def start(self, owner: object, *loops: Loop) -> None:
        """Loops that end with the owner's work, or with the run if it has none."""
        self._tasks[owner] = self._tasks.get(owner, []) + [self._start(loop) for loop in loops]

    def start_work(self, owner: object, work: Loop, *others: Loop) -> None:
        """`work` takes work and hands it on; an owner has one such loop."""
        self._work[owner] = self._start(work)
        self.start(owner, *others)

    def start_last(self, loop: Loop) -> None:
        """One more loop, whose end is the end of all others."""
        self._group.create_task(loop).add_done_callback(lambda _: self._cancel_all())

    @contextmanager
    def holding_nothing(self, owner: object) -> Iterator[None]:
        """Inside, the work of the owner is to wait for more: it may be cancelled."""
        self._holding_nothing.add(owner)
        try:
            yield
        finally:
            self._holding_nothing.discard(owner)

    async def end(self, owner: object) -> None:
        """End the loops of an owner that takes no more work; returns when it has handed on what it has, or was cut."""
        work = self._work.get(owner)
        if work is not None:
            if owner in self._holding_nothing:
                work.cancel()
            await asyncio.wait([work])
            self._work.pop(owner, None)
        for task in self._tasks.pop(owner, []):
            task.cancel()

    def cut(self, owner: object) -> None:
        """End the loops of an owner at once, but for the one that calls this."""
        work = self._work.pop(owner, None)
        for task in ([work] if work is not None else []) + self._tasks.pop(owner, []):
            if task is not asyncio.current_task():
                task.cancel()

    def _start(self, loop: Loop) -> asyncio.Task[None]:
        task = self._group.create_task(loop)
        self._all[task] = None
        task.add_done_callback(self._all.pop)
        return task

    def _cancel_all(self) -> None:
        for task in list(self._all):
            task.cancel()
