"""Publishing and pulling: the newest weights, and workers that sample with nothing older than them.

`publish` runs after each learner step and holds what can be pulled. A worker pulls just before it samples, when a newer
version exists; its lock keeps update and request together, so weights never change under a request and a worker that is
new cannot sample before its first verified load. The learner waits for nobody.
"""

import time
from collections.abc import Sequence

from actors.rollout import RolloutSummary, Ticket
from orchestration.metrics import MetricsLog
from orchestration.roles import LearnerRole, Publication, Reference, RolloutRole


class WeightSync:
    """The newest publication and the way to it."""

    def __init__(self, learner: LearnerRole, metrics: MetricsLog) -> None:
        self._learner = learner
        self._metrics = metrics
        self.newest: Publication | None = None

    async def publish(self) -> int:
        """Take a copy of the learner's weights and make it the newest; returns its policy version."""
        self.newest = await self._learner.publish()
        self._metrics.observe("weights/publish_s", self.newest.publish_s)
        return self.newest.manifest.policy_version

    async def sample(self, worker: RolloutRole, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, Reference]]:
        """Bring the worker up to the newest weights, then sample; nothing comes between the two."""
        async with worker.lock:
            if self.newest is not None and worker.policy_version < self.newest.manifest.policy_version:
                await self._update(worker, self.newest)
            return await worker.sample(tickets)

    async def _update(self, worker: RolloutRole, publication: Publication) -> None:
        start = time.perf_counter()
        receipt = await worker.receive_weights(publication)
        self._metrics.observe("weights/pull_s", time.perf_counter() - start)
        self._metrics.observe("weights/pause_s", receipt.pause_s)
        self._metrics.observe("weights/probe_error", receipt.probe_error)
