"""Checkpoints beside training: when, of which moment, and what is left when something fails meanwhile."""

import asyncio
import errno
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from arrivals import finish
from run_states import make_buffer, run_state

from actors.rollout import Document
from orchestration.buffer.buffer_state import BufferState
from orchestration.checkpoint.store import CheckpointStore
from orchestration.cluster.remote import ProcessLost
from orchestration.supervision.run_state import RunState, read_run_state
from orchestration.supervision.saving import MODEL, Saver

MakeDocument = Callable[[int], Document]
DEADLINE_S = 60.0
EVERY = 10


class GatedStore(CheckpointStore):
    """A store whose commits wait, in their thread, until they may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep_last=9)
        self.may_commit, self.is_committing = threading.Event(), threading.Event()

    def commit(self, step: int, *, score: float | None) -> Path:
        """As it is, later."""
        self.is_committing.set()
        assert self.may_commit.wait(DEADLINE_S)
        return super().commit(step, score=score)


class FakeLearner:
    """Notes what it is asked for; writes what it copied as soon as it may."""

    def __init__(self) -> None:
        self.weights = 0
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.error: Exception | None = None
        self.copied: list[int] = []

    async def copy_state(self) -> None:
        """Of the weights as they are."""
        self.copied.append(self.weights)

    async def write_state(self, folder: Path) -> None:
        """The copy."""
        copy = self.copied[-1]
        (folder / "learner.txt").write_text("the beginning")
        await self.may_write.wait()
        if self.error is not None:
            raise self.error
        (folder / "learner.txt").write_text(f"weights {copy}")


class Job:
    """A saver between fakes, in a folder."""

    def __init__(
        self,
        folder: Path,
        make_document: MakeDocument,
        *,
        every_steps: int = EVERY,
        saved_step: int = 0,
        model: bool = False,
        make_store: Callable[[Path], CheckpointStore] | None = None,
    ) -> None:
        self.folder = folder
        self.store = make_store(folder) if make_store is not None else CheckpointStore(folder, keep_last=9)
        self.learner = FakeLearner()
        self.buffer = make_buffer([make_document(index) for index in range(40)])
        self.order: list[str] = []
        self.kept: list[int] = []
        self.score: float | None = None
        self.saver = Saver(
            self.store,
            self.learner,
            every_steps=every_steps,
            saved_step=saved_step,
            settle=self._settle,
            snapshot=self._snapshot,
            fetch=self._fetch,
            score_of=lambda step: self.score,
            model_writer=self._model_writer if model else None,
        )

    async def fill(self, count: int) -> None:
        """So many documents arrive."""
        for ticket in await self.buffer.claim(count):
            await finish(self.buffer, ticket, ticket.document)

    async def _settle(self) -> None:
        self.order.append("settled")

    def _snapshot(self) -> tuple[RunState, list[Document]]:
        self.order.append("noted")
        state, payloads = self.buffer.state()
        return run_state(state), payloads

    async def _fetch(self, payload: Document) -> Document:
        await asyncio.sleep(0)
        return payload

    def _model_writer(self) -> Callable[[Path], Awaitable[None]]:
        weights = self.learner.weights
        self.kept.append(weights)

        async def write(folder: Path) -> None:
            try:
                await self.learner.may_write.wait()
                folder.mkdir()
                (folder / "model.txt").write_text(f"weights {weights}")
            finally:
                self.kept.remove(weights)

        return write

    @property
    def names(self) -> list[str]:
        """What is in the folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def read(self, step: int) -> tuple[BufferState, list[Document], str]:
        """A checkpoint that is whole."""
        path = self.folder / f"step-{step:06}"
        self.store.require_whole(path)
        state, payloads = read_run_state(path, samples=False)
        assert torch.equal(state.whitening_moment, run_state(state.buffer).whitening_moment)
        return state.buffer, list(payloads), (path / "learner.txt").read_text()


@pytest.fixture
def make_job(tmp_path: Path, make_document: MakeDocument) -> Callable[..., Job]:
    def make(**options: object) -> Job:
        return Job(tmp_path / "checkpoints", make_document, **options)

    return make


def play(scenario: Coroutine[None, None, None]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario

    asyncio.run(in_time())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Nothing can be made in this folder."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_checkpoints_are_written_when_they_are_due(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job(saved_step=20)
        for step in range(10, 41):
            job.learner.weights = step
            await job.saver.after_step(step)
            await job.saver.settle()
        assert job.names == ["step-000010", "step-000030", "step-000040"], "not again the one that it goes on from"
        assert [job.read(step)[2] for step in (10, 30, 40)] == ["weights 10", "weights 30", "weights 40"]
        assert job.order == ["settled", "noted"] * 3

    play(scenario())


def test_with_no_interval_none_is_due_and_one_can_be_saved(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job(every_steps=0)
        for step in range(25):
            await job.saver.after_step(step)
        await job.saver.settle()
        assert job.names == []
        await job.saver.save(25)
        assert job.names == ["step-000025"]

    play(scenario())


def test_one_that_is_due_while_another_is_written_is_left_out(
    make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        job = make_job()
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        await job.saver.after_step(20)
        assert job.learner.copied == [0], "the copy of the one that is being written stays as it is"
        job.learner.may_write.set()
        await job.saver.settle()
        await job.saver.after_step(30)
        await job.saver.settle()
        assert job.names == ["step-000010", "step-000030"]

    play(scenario())
    assert "the checkpoint of step 20 is left out" in caplog.text


def test_it_holds_the_moment_of_the_snapshot_whatever_happens_while_it_is_written(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job()
        await job.fill(4)
        await job.fill(3)
        out = await job.buffer.claim(2)
        await job.buffer.take()
        await job.buffer.advance(1)
        state, payloads = job.buffer.state()
        expected = repr(state), repr(payloads)
        job.learner.weights = 1
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        job.learner.weights = 2
        for ticket in out:
            await finish(job.buffer, ticket, ticket.document)
        await job.buffer.take()
        await job.buffer.advance(2)
        assert repr(job.buffer.state()) != repr((state, payloads)), "it has gone on"
        job.learner.may_write.set()
        await job.saver.settle()
        buffer, documents, weights = job.read(10)
        assert (repr(buffer), repr(documents)) == expected and len(documents) == 3
        assert weights == "weights 1"

    play(scenario())


def test_save_waits_for_the_one_before_and_until_its_own_is_on_the_disk(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job()
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        saving = asyncio.create_task(job.saver.save(13))
        await asyncio.sleep(0.02)
        assert job.learner.copied == [0] and not saving.done()
        job.learner.may_write.set()
        await saving
        assert job.names == ["step-000010", "step-000013"]

    play(scenario())


def test_of_the_same_step_the_one_that_is_saved_last_stays(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job()
        await job.saver.after_step(10)
        await job.saver.settle()
        await job.fill(3)
        await job.saver.save(10)
        assert job.names == ["step-000010"] and len(job.read(10)[1]) == 3

    play(scenario())


def test_the_score_decides_which_old_one_is_kept(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job(make_store=lambda folder: CheckpointStore(folder, keep_last=1))
        for step, job.score in ((10, 2.0), (20, 1.0), (30, None), (40, 3.0)):
            await job.saver.after_step(step)
            await job.saver.settle()
        assert job.names == ["step-000020", "step-000040"]

    play(scenario())


def test_a_learner_that_is_lost_while_it_writes_costs_this_one_alone(
    make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        job = make_job()
        await job.saver.after_step(10)
        await job.saver.settle()
        before = content(job.folder)
        job.learner.error = ProcessLost("learner rank 0", "learner rank 0 died")
        await job.saver.after_step(20)
        await job.saver.settle()
        await job.saver.abandon()
        assert job.store.newest() == job.folder / "step-000010"
        assert {name: data for name, data in content(job.folder).items() if ".partial" not in name} == before
        job.learner.error = None
        await job.saver.save(20)
        assert job.names == ["step-000010", "step-000020"], "nothing of the first attempt is left"

    play(scenario())
    assert "no checkpoint was written: learner rank 0 died" in caplog.text


@pytest.mark.parametrize("of", ["learner", "driver", "folder"])
def test_a_disk_that_fills_costs_this_one_alone(
    of: str, make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: object) -> None:
        raise full

    async def scenario() -> None:
        job = make_job(model=True)
        await job.saver.after_step(10)
        await job.saver.settle()
        before = content(job.folder)
        with monkeypatch.context() as patch:
            if of == "learner":
                job.learner.error = full
            elif of == "driver":
                patch.setattr("orchestration.supervision.saving.write_run_state", refuse)
            else:
                patch.setattr(Path, "mkdir", refuse)
            await job.saver.after_step(20)
            await job.saver.settle()
            with pytest.raises(OSError, match=r"cannot write the checkpoint of step 21: No space.*000010 is as it was"):
                await job.saver.save(21)
        assert job.names == ["step-000010"] and content(job.folder) == before
        assert job.kept == [], "weights that no one will write are kept for no one"
        job.learner.error = None
        await job.saver.after_step(30)
        await job.saver.settle()
        assert job.names == ["step-000010", "step-000030"]

    play(scenario())
    assert "no checkpoint was written: [Errno 28] cannot write the checkpoint of step 20" in caplog.text


def test_a_learner_is_asked_for_no_copy_where_nothing_can_be_written(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job()
        with full_disk(job.folder):
            await job.saver.after_step(10)
            await job.saver.settle()
        assert job.learner.copied == []

    play(scenario())


def test_what_is_abandoned_is_not_there(make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        job = make_job()
        await job.saver.abandon()
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        await until(lambda: (job.folder / "step-000010.partial" / "learner.txt").exists())
        await job.saver.abandon()
        assert job.store.newest() is None
        job.learner.may_write.set()
        await job.saver.save(20)
        assert job.names == ["step-000020"]

    with caplog.at_level(logging.ERROR):
        play(scenario())
    assert caplog.text == ""


def test_when_abandoning_is_over_nothing_is_written_any_more(make_job: Callable[..., Job]) -> None:
    """The learner was lost when all was written: the checkpoint is the one to go on from, and not one too late."""

    async def scenario() -> None:
        job = make_job(make_store=GatedStore)
        store = job.store
        await job.saver.after_step(10)
        await until(store.is_committing.is_set)
        abandoning = asyncio.create_task(job.saver.abandon())
        await asyncio.sleep(0.05)
        assert not abandoning.done() and store.newest() is None
        store.may_commit.set()
        await abandoning
        assert store.newest() == job.folder / "step-000010"
        assert job.read(10)[2] == "weights 0"

    play(scenario())


def test_the_weights_of_the_moment_are_kept_until_they_are_written(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job(model=True)
        job.learner.weights = 1
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        job.learner.weights = 2
        await until(lambda: (job.folder / "step-000010.partial" / "run.safetensors").exists())
        assert job.kept == [1]
        job.learner.may_write.set()
        await job.saver.settle()
        assert job.kept == [] and (job.folder / "step-000010" / MODEL / "model.txt").read_text() == "weights 1"

    play(scenario())


def test_weights_are_kept_no_longer_when_the_learner_is_lost(make_job: Callable[..., Job]) -> None:
    async def scenario() -> None:
        job = make_job(model=True)
        job.learner.may_write.clear()
        await job.saver.after_step(10)
        await asyncio.sleep(0)
        assert job.kept == [0]
        await job.saver.abandon()
        assert job.kept == []

    play(scenario())
