"""Which weights each worker gets, and how long they are kept, with fakes in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_publication import FakePublication, fake_manifest

from actors.rollout import Document, Ticket
from actors.worker import WeightReceipt
from orchestration.output.metrics import MetricsLog
from orchestration.roles.roles import RolloutRole
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.virtual_time import run_in_virtual_time

MakeDocument = Callable[[int], Document]


@dataclass(frozen=True)
class PublicationInFiles(FakePublication):
    """A version that is a folder."""

    folder: Path

    def discard(self) -> None:
        """The folder is not read any more."""
        self.folder.rmdir()


class Learner:
    """Publishes versions 0, 1, 2, ..., each with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._version = folder, -1

    async def publish(self) -> PublicationInFiles:
        self._version += 1
        folder = self._folder / str(self._version)
        folder.mkdir()
        return PublicationInFiles(fake_manifest(self._version), publish_s=0.25, folder=folder)


class Worker:
    """Takes `receive_s` for new weights, and reads their folder at the end of that time."""

    name = "rollout worker 0"

    def __init__(self, receive_s: float = 1.0) -> None:
        self.policy_version: int | None = None
        self.lock, self.weights_lock = asyncio.Lock(), asyncio.Lock()
        self.received: list[int] = []
        self.sampled_with: list[int] = []
        self.held: list[int] = []
        self._receive_s = receive_s

    async def receive_weights(self, publication: PublicationInFiles) -> WeightReceipt:
        await asyncio.sleep(self._receive_s)
        assert publication.folder.is_dir(), "the files were removed while they were read"
        self.policy_version = publication.manifest.policy_version
        self.received.append(self.policy_version)
        times = {"verify_s": 0.0, "pause_s": 0.5, "probe_s": 0.125}
        return WeightReceipt(policy_version=self.policy_version, probe_error=0.0625, **times)

    async def hold_weights(self, publication: PublicationInFiles) -> None:
        await asyncio.sleep(self._receive_s)
        self.held.append(publication.manifest.policy_version)

    async def sample(self, tickets: Sequence[Ticket]) -> list:
        self.sampled_with.append(self.policy_version)
        await asyncio.sleep(1.0)
        return []


def ticket(document: Document, version: int | None = None) -> Ticket:
    return Ticket(
        ticket_id=0,
        document=document,
        seed=0,
        completions_per_context=2,
        min_policy_version=version or 0,
        max_policy_version=version,
    )


def play(scenario: Callable[[WeightSync], Coroutine], folder: Path, *, push: bool = True) -> MetricsLog:
    metrics = MetricsLog([])
    run_in_virtual_time(scenario(WeightSync(Learner(folder), metrics, push=push)))
    return metrics


async def sample(sync: WeightSync, worker: Worker, tickets: Sequence[Ticket]) -> None:
    """As the controller does."""
    async with sync.prepare(worker, tickets):
        await worker.sample(tickets)


def test_new_weights_are_handed_on_at_once_and_superseded_ones_skipped(tmp_path: Path) -> None:
    worker = Worker(receive_s=2.6)

    async def scenario(sync: WeightSync) -> None:
        updating = asyncio.create_task(sync.push_updates(worker))
        for _ in range(6):
            await sync.publish()
            await asyncio.sleep(1.0)
        await asyncio.sleep(10.0)
        updating.cancel()

    metrics = play(scenario, tmp_path)
    assert worker.received == [0, 2, 5]
    # Only versions that were still the newest when they went live: 5, whose publication began at 4.75 and ended at 5.0,
    # and which was received from 5.2 to 7.8.
    assert metrics._observed["weights/publish_to_live_s"] == [pytest.approx(7.8 - 4.75)]
    assert metrics._observed["weights/publish_s"] == [0.25] * 6
    assert metrics._observed["weights/pull_s"] == [pytest.approx(2.6)] * 3
    told = {"weights/pause_s": 0.5, "weights/probe_s": 0.125, "weights/probe_error": 0.0625}
    assert {name: metrics._observed[name] for name in told} == {name: [value] * 3 for name, value in told.items()}


def test_version_0_is_verified_like_any_other_before_anything_is_sampled(
    tmp_path: Path, make_document: MakeDocument
) -> None:
    """What an engine read from the model's files by itself is no published version."""
    workers = [Worker(), Worker()]
    assert RolloutRole(SimpleNamespace(name="rollout worker 0")).policy_version is None

    async def scenario(sync: WeightSync) -> None:
        await sync.publish()
        await sync.bring_newest(workers)
        assert [worker.received for worker in workers] == [[0], [0]]
        await sample(sync, workers[0], [ticket(make_document(0))])

    play(scenario, tmp_path)
    assert workers[0].sampled_with == [0]
    assert workers[0].received == [0], "received twice"


def test_nothing_is_sampled_before_anything_was_published(tmp_path: Path, make_document: MakeDocument) -> None:
    worker = Worker()
    with pytest.raises(AssertionError, match="nothing was published yet"):
        play(lambda sync: sample(sync, worker, [ticket(make_document(0))]), tmp_path)
    assert worker.sampled_with == []


def test_a_request_waits_for_weights_that_are_on_their_way(tmp_path: Path, make_document: MakeDocument) -> None:
    worker = Worker()

    async def scenario(sync: WeightSync) -> None:
        updating = asyncio.create_task(sync.push_updates(worker))
        await sync.publish()
        await asyncio.sleep(0.5)
        await sample(sync, worker, [ticket(make_document(0))])
        updating.cancel()

    play(scenario, tmp_path)
    assert worker.received == [0], "received twice"
    assert worker.sampled_with == [0]


def test_a_request_does_not_wait_for_weights_it_does_not_need(tmp_path: Path, make_document: MakeDocument) -> None:
    worker = Worker(receive_s=5.0)

    async def scenario(sync: WeightSync) -> None:
        await sync.publish()
        await sample(sync, worker, [ticket(make_document(0))])
        updating = asyncio.create_task(sync.push_updates(worker))
        await sync.publish()
        await asyncio.sleep(0.5)
        start = asyncio.get_running_loop().time()
        await sample(sync, worker, [ticket(make_document(0))])
        assert asyncio.get_running_loop().time() - start == pytest.approx(1.0)
        newer = replace(ticket(make_document(0)), min_policy_version=1)
        await sample(sync, worker, [ticket(make_document(0)), newer])
        updating.cancel()

    play(scenario, tmp_path)
    assert worker.sampled_with == [0, 0, 1]


def test_tickets_that_name_a_version_get_it_newer_or_older(tmp_path: Path, make_document: MakeDocument) -> None:
    worker = Worker()

    async def scenario(sync: WeightSync) -> None:
        for _ in range(4):
            await sync.publish()
        for version in (3, 1, None, 2):
            await sample(sync, worker, [ticket(make_document(0), version)])
        sync.forget(below=2)
        with pytest.raises(RuntimeError, match=r"needs weights of version 1, kept are \[2, 3\]"):
            await sample(sync, worker, [ticket(make_document(0), 1)])
        with pytest.raises(RuntimeError, match=r"versions \['2', 'None'\]"):
            await sample(sync, worker, [ticket(make_document(0), 2), ticket(make_document(0))])

    play(scenario, tmp_path, push=False)
    assert worker.sampled_with == [3, 1, 1, 2]


def test_tickets_that_see_several_versions_begin_with_the_first_and_find_the_others_held(
    tmp_path: Path, make_document: MakeDocument
) -> None:
    worker = Worker()

    async def scenario(sync: WeightSync) -> None:
        for _ in range(4):
            await sync.publish()
        one = replace(ticket(make_document(0), 1), weight_steps=((0, 1), (2, 2), (5, 3)))
        await sample(sync, worker, [one, one])
        sync.forget(below=3)
        with pytest.raises(RuntimeError, match=r"needs weights of version 2, kept are \[3\]"):
            await sample(sync, worker, [one])

    play(scenario, tmp_path, push=False)
    assert (worker.received, worker.sampled_with, worker.held) == ([1], [1], [2, 3])


def test_files_are_kept_as_long_as_they_are_read_and_no_longer(tmp_path: Path) -> None:
    async def scenario(sync: WeightSync) -> None:
        slow = asyncio.create_task(sync.push_updates(Worker(receive_s=3.5)))
        for version in range(6):
            await sync.publish()
            sync.forget(below=version)
            present = {int(folder.name) for folder in tmp_path.iterdir()}
            # Version 0 is read until 3.5, version 3 from then until 7.0.
            assert present == {version, 0 if version < 4 else 3}
            await asyncio.sleep(1.0)
        slow.cancel()

    play(scenario, tmp_path)
