"""From a publication to a worker that samples with it, against a copy of the same bytes in memory.

    python benchmarks/weight_updates.py [--model embedded] [--repeats 20] [--transport ipc]

A real learner and a real rollout worker in Ray actors of their own, idle except for the updates: the learner publishes,
the worker receives, verifies, loads and probes. Printed, as medians with the lowest and highest: each stage in seconds,
and in copies: times that `numpy` takes to copy the same bytes within one process, measured between the updates.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from orchestration.ray_addresses import address_to_join  # noqa: E402
from orchestration.start_up import set_ray_environment  # noqa: E402

set_ray_environment(address_to_join())

import numpy as np  # noqa: E402
import ray  # noqa: E402
import tyro  # noqa: E402

from actors.config import WeightTransport  # noqa: E402
from benchmarks.measured import median_and_range  # noqa: E402
from orchestration.cluster.cluster import Cluster  # noqa: E402
from orchestration.cluster.process_specs import process_specs  # noqa: E402
from orchestration.config import RunConfig  # noqa: E402
from orchestration.parts import PROBE_TEXTS, PROBE_TOKENS  # noqa: E402
from orchestration.roles.processes import await_startup, start_processes  # noqa: E402
from orchestration.roles.roles import LearnerRole, RolloutRole  # noqa: E402

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time weight updates."""

    model: str = "embedded"
    """As `model.policy`."""
    repeats: int = 20
    """Updates behind each median."""
    transport: WeightTransport = "object_store"
    """As `asynchrony.weight_transport`; files go to a temporary folder."""


class Copy:
    """A copy of `num_bytes` within one process, between memory that has been written to before."""

    def __init__(self, num_bytes: int) -> None:
        self._source, self._target = np.ones(num_bytes, dtype=np.uint8), np.ones(num_bytes, dtype=np.uint8)

    def seconds(self) -> float:
        """Of one copy [s]."""
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start


async def measure(settings: Measurement, cluster: Cluster, config: RunConfig) -> dict[str, list]:
    """Seconds of every stage, one value per update."""
    processes = start_processes(cluster, process_specs(config))
    await await_startup(processes, timeout_s=600.0)
    worker = RolloutRole(processes.workers[0])
    probe_ids = [list(range(1, 1 + PROBE_TOKENS))] * PROBE_TEXTS
    learner = LearnerRole(processes.ranks, probe_ids, transport=settings.transport)
    seen: dict[str, list[float]] = {}
    copy = None
    for repeat in range(settings.repeats + WARM_UP):
        start = time.perf_counter()
        publication = await learner.publish()
        receipt = await worker.receive_weights(publication)
        live_s = time.perf_counter() - start
        # Nothing is discarded: without a step between them all are version 0, and each takes the place of the last.
        copy = copy or Copy(publication.manifest.num_bytes)
        values = {
            "publish to live": live_s,
            "of it: publish (copy, checksums, probe of the learner)": publication.publish_s,
            "of it: verify (parts opened, checksums)": receipt.verify_s,
            "of it: pause (load, caches reset)": receipt.pause_s,
            "of it: probe": receipt.probe_s,
            "a copy of the bytes": copy.seconds(),
        }
        if repeat >= WARM_UP:
            for name, value in values.items():
                seen.setdefault(name, []).append(value)
    await learner.release()
    seen["megabytes"] = [publication.manifest.num_bytes / 2**20]
    return seen


def table(seen: dict[str, list[float]]) -> str:
    """Medians, in seconds and in copies."""
    copy = statistics.median(seen["a copy of the bytes"])
    lines = [
        f"{seen.pop('megabytes')[0]:.0f} MiB of weights.",
        "",
        "| stage | seconds | copies |",
        "| --- | --- | --- |",
    ]
    for name, values in seen.items():
        lines.append(f"| {name} | {median_and_range(values, decimals=4)} | {statistics.median(values) / copy:.1f} |")
    return "\n".join(lines)


def main(settings: Measurement) -> None:
    """Start learner and worker, and update again and again."""
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    try:
        with tempfile.TemporaryDirectory(prefix="async-ebft-") as folder:
            asynchrony = {"weight_transport": settings.transport}
            if settings.transport == "files":
                asynchrony["weight_folder"] = folder
            config = RunConfig.model_validate({"model": {"policy": settings.model}, "asynchrony": asynchrony})
            with closing(Cluster(config.placement, timeout_s=600.0)) as cluster:
                print(table(asyncio.run(measure(settings, cluster, config))))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Measurement))
