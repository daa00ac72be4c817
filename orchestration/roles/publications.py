"""Weights of one version as the driver holds them: how they reach a worker, and when they are discarded."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from actors.weights.channel import Rendezvous
from actors.weights.manifest import WeightManifest
from actors.weights.parts import Part, open_parts
from actors.worker import RolloutWorker
from learner.worker import LearnerWorker
from orchestration.cluster.remote import ProcessLost, Reference, Remote, arriving, failing
from orchestration.roles.rendezvous import RendezvousStore

Result = TypeVar("Result", covariant=True)

GRACE_S = 10.0
"""How long to look for the cause when one side of a transfer raises [s]."""


class Receive(Protocol[Result]):
    """What a worker does with weights that reach it: RolloutWorker.receive_weights or hold_weights."""

    def __call__(
        self, worker: RolloutWorker, /, manifest: WeightManifest, *parts: Part, rendezvous: Rendezvous | None = None
    ) -> Result: ...


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights of one version, for workers to pull or to be sent."""

    manifest: WeightManifest
    parts: list[Reference[Part]]
    """The tensors of the manifest, in its order."""
    publish_s: float
    """Time the learner spent on it [s]."""
    rank: Remote[LearnerWorker]
    """The rank that published it."""
    kept_by_learner: bool
    """Its bytes stay with that rank (`Transport.keeps_weights`)."""
    rendezvous_store: RendezvousStore | None
    """For transports that send; None: workers pull."""

    async def bring_to(self, worker: Remote[RolloutWorker], receive: Receive[Result]) -> Result:
        """Let the worker take them, verify them and do what `receive` does; returns what that returns.

        Runs concurrently with a request; the worker decides when the weights go live.
        Raises: ProcessFailure of the worker; of the learner's rank if that one is lost.
        """
        manifest, parts = self.manifest, [arriving(part) for part in self.parts]
        if self.rendezvous_store is None:
            with failing(worker.name):
                return await worker.call_concurrently(receive, manifest, *parts)
        with self.rendezvous_store.renewed_on_failure(worker.name) as rendezvous:
            sending = self.rank.call_concurrently(LearnerWorker.send_weights, manifest.policy_version, rendezvous)
            receiving = worker.call_concurrently(receive, manifest, *parts, rendezvous=rendezvous)
            return await _received(receiving, sending, by=worker.name)

    async def buffers(self, fetch: Callable[[Reference[Part]], Awaitable[Part]]) -> list[np.ndarray]:
        """The byte arrays of all tensors, brought to this process, which may be on another node, or see no GPU."""
        if not self.kept_by_learner:
            return open_parts([await fetch(part) for part in self.parts])
        version = self.manifest.policy_version
        indices = range(len(self.parts))
        return open_parts(
            [await self.rank.call_concurrently(LearnerWorker.kept_part, version, index) for index in indices]
        )

    def discard(self) -> None:
        """It will not be requested any more."""
        self.rank.notify(LearnerWorker.discard_weights, self.manifest.policy_version)


async def _received(receiving: Awaitable[Result], sending: Awaitable[None], *, by: str) -> Result:
    """What the worker returned. If one side fails the other notices: the learner is to blame only if it is lost."""
    tasks = receiver, sender = asyncio.ensure_future(receiving), asyncio.ensure_future(sending)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() is not None for task in tasks):
            await asyncio.wait(tasks, timeout=GRACE_S)
        if sender.done() and isinstance(sender.exception(), ProcessLost):
            sender.result()  # raises
        with failing(by):
            if sender.done() and (not receiver.done() or receiver.exception() is None):
                sender.result()
            return receiver.result()
    finally:
        for task in tasks:
            task.cancel()
