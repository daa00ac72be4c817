"""Calls to a real Ray actor: parts that travel before the last is made, concurrent calls, and senders that stop."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import ray
from own_cluster import ROOT, own_environment

from actors.weights.manifest import Probe, WeightManifest, WeightMismatchError, checksum, verified_tensors
from actors.weights.object_store import ArrayPart
from actors.weights.parts import Part, open_parts
from orchestration.cluster.cluster import Cluster
from orchestration.cluster.deadlines import Deadlines
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import ProcessLost, Remote, arriving
from orchestration.cluster.remote_actor import RemoteActor
from orchestration.config import PlacementConfig, RoleConfig

pytestmark = pytest.mark.engine
NUM_TENSORS = 4
Result = TypeVar("Result")


class Sender:
    """Publishes tensors one part each, and stops at part `at`."""

    def __init__(self) -> None:
        self.startup_s: dict[str, float] = {}
        self._released = False

    def publish(self, stop: str, at: int) -> Generator[Part, None, WeightManifest]:
        buffers = [np.full(4, index, dtype=np.uint8) for index in range(NUM_TENSORS)]
        for index, buffer in enumerate(buffers):
            if index == at and stop == "raise":
                raise OSError("no space left on the learner's disk")
            if index == at and stop == "die":
                os._exit(1)
            if index == at and stop == "hang":
                time.sleep(3600)
            if index == at and stop == "skip":
                continue
            yield ArrayPart([buffer])
        return manifest(buffers)

    def hold(self) -> str:
        """Waits until `release` is called meanwhile."""
        deadline = time.monotonic() + 120
        while not self._released and time.monotonic() < deadline:
            time.sleep(0.01)
        return "released" if self._released else "not released"

    def release(self) -> None:
        self._released = True

    def discard(self, version: int) -> None:
        raise OSError(f"version {version} is still open")

    def doubled(self, parts: list[ArrayPart]) -> list[ArrayPart]:
        return [ArrayPart([2 * buffer for buffer in part.buffers]) for part in parts]


def manifest(buffers: list[np.ndarray]) -> WeightManifest:
    return WeightManifest(
        policy_version=3,
        names=[f"tensor {index}" for index in range(len(buffers))],
        dtypes=["float32"] * len(buffers),
        shapes=[(1,)] * len(buffers),
        checksums=[checksum(buffer) for buffer in buffers],
        probe=Probe(token_ids=[], logprobs=[]),
    )


@pytest.fixture(scope="module")
def placement() -> Iterator[PlacementConfig]:
    saved, own = dict(os.environ), own_environment(RAY_AUTH_MODE="disabled")
    os.environ.clear()
    os.environ.update(own)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    role = RoleConfig(num_cpus=0.25)
    yield PlacementConfig(rollout=role, feature=role, learner=role)
    ray.shutdown()
    os.environ.clear()
    os.environ.update(saved)


Started = tuple[Cluster, Remote[Sender]]
Scenario = Callable[[Cluster, Remote[Sender]], Awaitable[Result]]


@contextmanager
def start_sender(placement: PlacementConfig, *, timeout_s: float = 60.0) -> Iterator[Started]:
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(str(ROOT / "tests" / room) for room in ("cluster", "support"))])
    }
    spec = ProcessSpec(name="learner rank", role=placement.learner, build=partial(Sender), environment=environment)
    with closing(Cluster(placement, timeout_s=timeout_s)) as cluster:
        (sender,) = cluster.start(spec)
        asyncio.run(RemoteActor("learner rank 0", sender._actor, deadlines=Deadlines(60.0)).startup())
        yield cluster, sender


@pytest.fixture(scope="module")
def started(placement: PlacementConfig) -> Iterator[Started]:
    """For scenarios that leave their sender alive and answering."""
    with start_sender(placement) as started:
        yield started


def play(started: Started, scenario: Scenario[Result]) -> Result:
    async def run() -> Result:
        return await scenario(*started)

    return asyncio.run(run())


def test_parts_arrive_in_order_and_the_manifest_last(started: Started) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> tuple[list[Part], WeightManifest]:
        parts, manifest = await sender.stream(Sender.publish, "never", -1)
        return [await cluster.fetch(part) for part in parts], manifest

    parts, manifest = play(started, scenario)
    assert len(parts) == NUM_TENSORS
    assert [name for name, _ in verified_tensors(manifest, open_parts(parts))] == manifest.names


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("die", r"learner rank 0 died: .* \(during publish\(\)\)"),
        ("hang", r"learner rank 0 did not answer publish\(\) within 1 s"),
    ],
)
def test_a_sender_that_stops_half_way_is_named(stop: str, at: int, text: str, placement: PlacementConfig) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> None:
        await sender.stream(Sender.publish, stop, at)

    with (
        start_sender(placement, timeout_s=1.0 if stop == "hang" else 60.0) as started,
        pytest.raises(ProcessLost, match=text),
    ):
        play(started, scenario)


@pytest.mark.parametrize("at", [0, 2])
def test_a_sender_that_fails_half_way_is_named(at: int, started: Started) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> None:
        await sender.stream(Sender.publish, "raise", at)

    with pytest.raises(OSError, match="no space left on the learner's disk"):
        play(started, scenario)


def test_a_tensor_that_was_left_out_is_named_by_the_receiver(started: Started) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> tuple[list[Part], WeightManifest]:
        parts, manifest = await sender.stream(Sender.publish, "skip", 2)
        return [await cluster.fetch(part) for part in parts], manifest

    parts, manifest = play(started, scenario)
    with pytest.raises(WeightMismatchError, match="4 tensors were published, 3 arrived; missing: tensor 2"):
        verified_tensors(manifest, open_parts(parts))


def test_a_concurrent_call_does_not_wait_for_another(started: Started) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> str:
        holding = asyncio.create_task(sender.call(Sender.hold))
        await asyncio.sleep(0.1)
        await sender.call_concurrently(Sender.release)
        return await holding

    assert play(started, scenario) == "released"


def test_a_failure_of_a_fire_and_forget_call_is_logged(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> None:
        sender.notify(Sender.discard, 7)
        async with asyncio.timeout(60):
            while "discard" not in caplog.text:
                await asyncio.sleep(0.01)

    play(started, scenario)
    assert re.search(r"learner rank 0 failed in discard\(\): .*version 7 is still open", caplog.text, re.DOTALL)


def test_references_arrive_as_values_and_each_result_stays_over_there(started: Started) -> None:
    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> tuple[list[int], list[ArrayPart]]:
        parts = [cluster.put(ArrayPart([np.full(size, 3, dtype=np.uint8)])) for size in (2, 5)]
        results = await sender.call_each(Sender.doubled, [arriving(part) for part in parts], num_bytes)
        return [size for size, _ in results], [await cluster.fetch(reference) for _, reference in results]

    sizes, doubled = play(started, scenario)
    assert sizes == [2, 5]
    assert [part.buffers[0].tolist() for part in doubled] == [[6] * 2, [6] * 5]


def num_bytes(part: ArrayPart) -> int:
    return sum(buffer.nbytes for buffer in part.buffers)


@pytest.mark.parametrize("at_work", [True, False])
@pytest.mark.parametrize(("how", "text"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "gave no sign of life for 8 s")])
def test_a_process_that_is_killed_or_stopped_is_lost_at_once(
    how: signal.Signals, text: str, at_work: bool, placement: PlacementConfig
) -> None:
    """Whether it has work or not; and it can be ended after that, whatever state it is in."""

    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> int:
        pid = (await sender.identity()).pid
        waiting = asyncio.create_task(sender.call(Sender.hold) if at_work else sender.lost())
        await asyncio.sleep(0.5)
        os.kill(pid, how)
        async with asyncio.timeout(60):
            with pytest.raises(ProcessLost, match=f"learner rank 0 {text}"):
                await waiting
            with pytest.raises(ProcessLost):
                await sender.call(Sender.release)
            cluster.remove(sender)
            while is_alive(pid):
                await asyncio.sleep(0.05)
        return pid

    with start_sender(placement, timeout_s=600.0) as started:
        play(started, scenario)


def test_a_call_to_a_process_that_is_ended_meanwhile_fails_and_is_not_cancelled(placement: PlacementConfig) -> None:
    """A task group takes a cancelled task for one that is done, and would lose what it had to do."""

    async def scenario(cluster: Cluster, sender: Remote[Sender]) -> None:
        waiting = asyncio.create_task(sender.call(Sender.hold))
        await asyncio.sleep(0.5)
        cluster.remove(sender)
        async with asyncio.timeout(60):
            with pytest.raises(ProcessLost, match=r"learner rank 0 .* \(during hold\(\)\)"):
                await waiting

    with start_sender(placement) as started:
        play(started, scenario)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_call_is_given_up_after_many_times_what_is_usual() -> None:
    deadlines = Deadlines(600.0)
    assert deadlines.of("sample", items=4) == 600
    deadlines.note("sample", 8.0, items=2)
    deadlines.note("sample", 1.0, items=2)
    assert deadlines.of("sample", items=3) == 120, "ten times the longest, for each item"
    assert deadlines.of("sample", items=100) == 600
    assert deadlines.of("score") == 600
    deadlines.note("score", 0.01)
    assert deadlines.of("score") == 30, "no call is given up sooner"
