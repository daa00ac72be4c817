"""Publishing and pulling weights, such that workers sample only with those that their tickets require.

`publish` runs after each learner step. `push_updates`, one loop per worker, hands the newest weights on at once;
`prepare` ensures, before each request, that the worker has weights its tickets allow: those they name (exact lag,
replay), or any that are new enough. A worker begins without a version, so it cannot sample before its first verified
load, not even with the initial weights. The learner waits for no worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Generic, Protocol, TypeVar

from actors.rollout import Ticket
from orchestration.idle_time import IdleTime
from orchestration.output.metrics import MetricsLog


class Manifest(Protocol):
    """What was published."""

    @property
    def policy_version(self) -> int:
        """Learner steps behind the weights."""
        ...


class Published(Protocol):
    """Weights of one version, however they travel: publications.Publication."""

    @property
    def manifest(self) -> Manifest:
        """What they are."""
        ...

    @property
    def publish_s(self) -> float:
        """Time the learner spent on it [s]."""
        ...

    def discard(self) -> None:
        """No one will request it any more."""


Weights = TypeVar("Weights", bound=Published)
Weights_co = TypeVar("Weights_co", bound=Published, covariant=True)
Weights_contra = TypeVar("Weights_contra", bound=Published, contravariant=True)


class Publisher(Protocol[Weights_co]):
    """Publishes weights: roles.LearnerRole."""

    async def publish(self) -> Weights_co:
        """The current ones."""
        ...


class Receipt(Protocol):
    """What one load took: actors.worker.WeightReceipt."""

    @property
    def policy_version(self) -> int: ...

    @property
    def pause_s(self) -> float: ...

    @property
    def probe_s(self) -> float: ...

    @property
    def probe_error(self) -> float: ...


class Receiver(Protocol[Weights_contra]):
    """A rollout worker: roles.RolloutRole, which documents its locks."""

    @property
    def name(self) -> str: ...

    @property
    def policy_version(self) -> int | None: ...

    @property
    def lock(self) -> asyncio.Lock: ...

    @property
    def weights_lock(self) -> asyncio.Lock: ...

    async def receive_weights(self, publication: Weights_contra) -> Receipt:
        """Load these weights."""
        ...

    async def hold_weights(self, publication: Weights_contra) -> None:
        """Keep these weights for the next request, which has to see them."""


class WeightSync(Generic[Weights]):
    """The publications that may still be requested, and how workers get them."""

    def __init__(
        self,
        learner: Publisher[Weights],
        metrics: MetricsLog,
        *,
        push: bool = True,
        on_publish: Callable[[Weights], None] = lambda publication: None,
    ) -> None:
        """`push`: hand new weights on when they are published, not only when a request needs them."""
        self._learner = learner
        self._metrics = metrics
        self._push, self._on_publish = push, on_publish
        self._publications: dict[int, Weights] = {}
        self._published_at: dict[int, float] = {}
        self._on_their_way: list[int] = []
        self._changed = asyncio.Condition()
        self._newest: Weights | None = None

    @property
    def has_published(self) -> bool:
        """There are weights to be had."""
        return self._newest is not None

    @property
    def newest(self) -> Weights:
        """The last publication."""
        assert self._newest is not None, "nothing was published yet"
        return self._newest

    async def publish(self) -> int:
        """Take a copy of the learner's weights and make it the newest; returns its policy version."""
        publication = await self._learner.publish()
        self._metrics.observe("weights/publish_s", publication.publish_s)
        version = publication.manifest.policy_version
        self._on_publish(publication)
        async with self._changed:
            self._newest = self._publications[version] = publication
            self._published_at[version] = asyncio.get_running_loop().time() - publication.publish_s
            self._changed.notify_all()
        return version

    @contextmanager
    def keeping(self, publication: Weights) -> Iterator[None]:
        """Inside, this one is not discarded."""
        version = publication.manifest.policy_version
        self._on_their_way.append(version)
        try:
            yield
        finally:
            self._on_their_way.remove(version)

    def forget(self, *, below: int) -> None:
        """No ticket will require weights older than these any more; the newest, and those on their way to a worker, are
        kept."""
        kept = {self._version, *self._on_their_way}
        for version in [v for v in self._publications if v < below and v not in kept]:
            self._publications.pop(version).discard()
            del self._published_at[version]

    @asynccontextmanager
    async def prepare(
        self, worker: Receiver[Weights], tickets: Sequence[Ticket], idle: IdleTime | None = None
    ) -> AsyncIterator[None]:
        """Bring the worker the weights that its tickets require; inside, no other request can change them.

        Raises: RuntimeError if the weights they demand are not kept.
        """
        async with worker.lock:
            version, present = self._named(tickets), worker.policy_version
            # Newer weights on their way are loaded when they arrive: no request waits for what it does not need.
            allowed = present is not None and all(ticket.allows(present) for ticket in tickets)
            if not allowed:
                with idle.waiting("rollout/weights") if idle is not None else nullcontext():
                    await self._bring(worker, version)
            for _, later in tickets[0].weight_steps[1:]:
                async with worker.weights_lock:
                    await worker.hold_weights(self._kept(worker, later))
            yield

    async def bring_newest(self, workers: Sequence[Receiver[Weights]]) -> None:
        """All these workers hold the newest weights when this returns.

        Raises: what the first worker raised that could not verify them.
        """
        await asyncio.gather(*[self._bring(worker, None) for worker in workers])

    async def push_updates(self, worker: Receiver[Weights]) -> None:
        """Hand every new publication to the worker, until cancelled; one that is superseded is skipped."""
        while self._push:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self._newest is not None and worker.policy_version != self._version
                )
            await self._bring(worker, None)

    @property
    def _version(self) -> int:
        return self.newest.manifest.policy_version

    def _named(self, tickets: Sequence[Ticket]) -> int | None:
        demanded = {ticket.max_policy_version for ticket in tickets}
        if len(demanded) > 1:
            raise RuntimeError(f"one request requires weights of versions {sorted(map(str, demanded))}; split it")
        return demanded.pop()

    async def _bring(self, worker: Receiver[Weights], version: int | None) -> None:
        """The worker holds this version (None: the newest) when this returns."""
        async with worker.weights_lock:
            wanted = self._version if version is None else version
            if worker.policy_version == wanted:
                return
            await self._update(worker, self._kept(worker, wanted))

    def _kept(self, worker: Receiver[Weights], version: int) -> Weights:
        if version not in self._publications:
            raise RuntimeError(
                f"{worker.name} needs weights of version {version}, kept are {sorted(self._publications)}; a ticket "
                "required them after they were discarded"
            )
        return self._publications[version]

    async def _update(self, worker: Receiver[Weights], publication: Weights) -> None:
        clock = asyncio.get_running_loop().time
        start = clock()
        with self.keeping(publication):
            receipt = await worker.receive_weights(publication)
        self._metrics.observe("weights/pull_s", clock() - start)
        self._metrics.observe("weights/pause_s", receipt.pause_s)
        self._metrics.observe("weights/probe_s", receipt.probe_s)
        self._metrics.observe("weights/probe_error", receipt.probe_error)
        if publication is self._newest:
            self._metrics.observe("weights/publish_to_live_s", clock() - self._published_at[receipt.policy_version])
