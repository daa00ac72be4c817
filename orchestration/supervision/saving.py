"""Checkpoints beside training: the run waits for a copy of the learner's state, not for the disk.

Each one is of a moment between two steps: the learner's state is copied, the driver's state and the references of all
rollouts that wait are noted, and training goes on while both are written (checkpoint.store). One is written at a time;
one that is due meanwhile is left out. A disk that fills does not end the run: the checkpoints before stay.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from learner.batch import Example
from orchestration.checkpoint.store import CheckpointStore
from orchestration.cluster.remote import Reference
from orchestration.supervision.run_state import RunState, write_run_state
from orchestration.tasks import first_error

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MODEL = "model"
"""Folder of the weights in a checkpoint."""


class Learner(Protocol):
    """roles.LearnerRole."""

    async def copy_state(self) -> None:
        """Keep a copy of the present state."""

    async def write_state(self, folder: Path) -> None:
        """Write the copy, concurrently with training."""


WriteModel = Callable[[Path], Awaitable[None]]
"""Writes some weights into a folder."""
Snapshot = Callable[[], tuple[RunState, Sequence[Reference[Example]]]]
"""The driver's state of this moment, and references of what waits in the buffer."""


class Saver:
    """Writes checkpoints when they are due, and when it is told to."""

    def __init__(
        self,
        store: CheckpointStore,
        learner: Learner,
        *,
        every_steps: int,
        saved_step: int,
        settle: Callable[[], Awaitable[None]],
        snapshot: Snapshot,
        fetch: Callable[[Reference[Example]], Awaitable[Example]],
        score_of: Callable[[int], float | None],
        model_writer: Callable[[], WriteModel] | None,
    ) -> None:
        """`saved_step`: of the checkpoint that the run goes on from; 0: of none. `settle()` returns when the newest
        weights suffice to go on. `score_of(step)`: lower is better; None: unknown. `model_writer()`, if given, returns
        what writes the present weights."""
        self._store, self._learner = store, learner
        self._every_steps, self._saved_step = every_steps, saved_step
        self._settle, self._snapshot, self._fetch = settle, snapshot, fetch
        self._score_of, self._model_writer = score_of, model_writer
        self._writing: asyncio.Task[None] | None = None

    async def after_step(self, step: int) -> None:
        """Begin a checkpoint if one is due; returns when training may go on."""
        if step == self._saved_step or self._every_steps == 0 or step % self._every_steps:
            return
        if self._writing is not None and not self._writing.done():
            logger.warning("the checkpoint of step %d is left out: the one before is still being written", step)
            return
        try:
            folder = await asyncio.to_thread(self._store.begin, step)
        except OSError as error:
            logger.error("no checkpoint was written: %s", error)
            return
        await self._settle()
        await self._begin(step, folder)

    async def save(self, step: int) -> None:
        """Write one now, whatever is due; returns when it is on the disk. Raises: OSError."""
        await self.settle()
        await self._begin(step, await asyncio.to_thread(self._store.begin, step))
        assert self._writing is not None
        await self._writing

    async def settle(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def abandon(self) -> None:
        """The learner is lost: what it was writing will not be whole.

        Returns when nothing is written any more; a checkpoint that was whole by then is the newest.
        """
        if self._writing is not None:
            self._writing.cancel()
        await self.settle()

    async def _begin(self, step: int, folder: Path) -> None:
        await self._learner.copy_state()
        state, references = self._snapshot()
        write_model = self._model_writer() if self._model_writer is not None else None
        self._writing = asyncio.create_task(self._write(step, folder, state, references, write_model))
        self._writing.add_done_callback(_report)

    async def _write(
        self,
        step: int,
        folder: Path,
        state: RunState,
        references: Sequence[Reference[Example]],
        write_model: WriteModel | None,
    ) -> None:
        score = self._score_of(step)
        with self._store.writing(step), first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(self._learner.write_state(folder))
                group.create_task(self._write_driver(folder, state, references))
                if write_model is not None:
                    await write_model(folder / MODEL)
        await to_its_end(self._store.commit, step, score=score)

    async def _write_driver(self, folder: Path, state: RunState, references: Sequence[Reference[Example]]) -> None:
        payloads = [await self._fetch(reference) for reference in references]
        await to_its_end(write_run_state, folder, state, payloads)


async def to_its_end(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a thread, which cancelling does not end: it is waited for, so that nothing is left that still writes."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *args, **kwargs))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _report(writing: asyncio.Task[None]) -> None:
    if not writing.cancelled() and (error := writing.exception()) is not None:
        logger.error("no checkpoint was written: %s", error)
