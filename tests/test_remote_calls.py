"""Calls to a real Ray actor: parts that travel before the last is made, calls beside others, and senders that stop."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import ray
from own_cluster import ROOT, own_environment

from actors.weights.manifest import Probe, WeightManifest, WeightMismatchError, checksum, verified_tensors
from actors.weights.parts import Part, open_parts
from orchestration.cluster.cluster import Cluster, RemoteObject
from orchestration.cluster.role_starter import ProcessSpec
from orchestration.config import PlacementConfig, RoleConfig

pytestmark = pytest.mark.engine
NUM_TENSORS = 4


class Sender:
    """Publishes tensors one part each, and stops where it is told to."""

    def __init__(self) -> None:
        self.startup_s: dict[str, float] = {}
        self._released = False

    def publish(self, stop: str, at: int) -> Iterator[Part | WeightManifest]:
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
            yield [buffer]
        yield manifest(buffers)

    def hold(self) -> str:
        """Waits until `release` is called meanwhile."""
        deadline = time.monotonic() + 120
        while not self._released and time.monotonic() < deadline:
            time.sleep(0.01)
        return "released" if self._released else "nobody came"

    def release(self) -> None:
        self._released = True


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


def with_sender(placement: PlacementConfig, scenario, *, timeout_s: float = 60.0):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    spec = ProcessSpec(
        name="learner rank",
        role=placement.learner,
        target="test_remote_calls:Sender",
        kwargs={},
        environment=environment,
    )
    cluster = Cluster(placement, timeout_s=timeout_s)
    with closing(cluster):
        (sender,) = cluster.start(spec)

        async def run():
            await RemoteObject("learner rank 0", sender._actor, timeout_s=60.0).startup()
            return await scenario(cluster, sender)

        return asyncio.run(run())


def test_parts_arrive_in_order_and_the_manifest_last(placement: PlacementConfig) -> None:
    async def scenario(cluster: Cluster, sender: RemoteObject) -> tuple[list[Part], WeightManifest]:
        parts, manifest = await sender.call_parts("publish", "never", -1)
        return [await cluster.fetch(part) for part in parts], manifest

    parts, manifest = with_sender(placement, scenario)
    assert len(parts) == NUM_TENSORS
    assert [name for name, _ in verified_tensors(manifest, open_parts(parts))] == manifest.names


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("stop", "error", "text"),
    [
        ("raise", OSError, "no space left on the learner's disk"),
        ("die", RuntimeError, r"learner rank 0 died during publish\(\)"),
        ("hang", TimeoutError, r"learner rank 0 did not answer publish\(\) within 1 s"),
    ],
)
def test_a_sender_that_stops_half_way_is_named(
    stop: str, at: int, error: type[Exception], text: str, placement: PlacementConfig
) -> None:
    async def scenario(cluster: Cluster, sender: RemoteObject) -> None:
        await sender.call_parts("publish", stop, at)

    with pytest.raises(error, match=text):
        with_sender(placement, scenario, timeout_s=1.0 if stop == "hang" else 60.0)


def test_a_tensor_that_was_left_out_is_named_by_the_receiver(placement: PlacementConfig) -> None:
    async def scenario(cluster: Cluster, sender: RemoteObject) -> tuple[list[Part], WeightManifest]:
        parts, manifest = await sender.call_parts("publish", "skip", 2)
        return [await cluster.fetch(part) for part in parts], manifest

    parts, manifest = with_sender(placement, scenario)
    with pytest.raises(WeightMismatchError, match="4 tensors were published, 3 arrived; missing: tensor 2"):
        verified_tensors(manifest, open_parts(parts))


def test_a_call_beside_another_does_not_wait_for_it(placement: PlacementConfig) -> None:
    async def scenario(cluster: Cluster, sender: RemoteObject) -> str:
        holding = asyncio.create_task(sender.call("hold"))
        await asyncio.sleep(0.1)
        await sender.call_concurrently("release")
        return await holding

    assert with_sender(placement, scenario) == "released"
