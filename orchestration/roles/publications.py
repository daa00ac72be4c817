"""Weights of one version as the controller holds them: how they come to a worker, and when they are let go."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ray import ObjectRef

from actors.weights.manifest import WeightManifest
from actors.weights.parts import open_parts
from actors.worker import WeightReceipt
from orchestration.cluster.cluster import RemoteObject
from orchestration.roles.rendezvous import RendezvousStore

Reference = ObjectRef
"""Something in the object store: it travels between processes without passing through this one. (In one process: the
thing itself.)"""

WorkerVerb = Literal["receive_weights", "hold_weights"]
"""What a worker does with weights that reach it."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights of one version, ready to be pulled from the object store, or from files."""

    manifest: WeightManifest
    parts: list[Reference]
    """The tensors of the manifest, in its order: `actors.weights.parts.Part`."""
    publish_s: float
    """Time the learner spent on it [s]."""
    folder: str | None = None
    """Where its files are, if it travels in files."""

    async def bring_to(self, worker: RemoteObject, verb: WorkerVerb) -> WeightReceipt | None:
        """Let the worker pull and verify them, and do what the verb says; returns what the verb does.

        Raises: what the verb raises.
        """
        # Waits beside a running request, in a thread of its own; when the weights go live is the worker's business.
        return await worker.call_concurrently(verb, self.manifest, *self.parts)

    async def buffers(self, fetch: Callable[[Reference], Awaitable[object]]) -> list[np.ndarray]:
        """The byte arrays of all tensors, brought to this process."""
        return open_parts([await fetch(part) for part in self.parts])

    def discard(self) -> None:
        """Nobody will ask for it any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


@dataclass(frozen=True, kw_only=True)
class KeptPublication(Publication):
    """Weights that the learner's first rank keeps in its own memory, for workers to map."""

    rank: RemoteObject

    async def buffers(self, fetch: Callable[[Reference], Awaitable[object]]) -> list[np.ndarray]:
        """Through the object store: this process may be on another node, or see no GPU."""
        version = self.manifest.policy_version
        calls = [self.rank.call_concurrently("kept_part", version, index) for index in range(len(self.parts))]
        return open_parts([await call for call in calls])

    def discard(self) -> None:
        """Nobody will ask for it any more."""
        self.rank.notify("discard_weights", self.manifest.policy_version)


@dataclass(frozen=True, kw_only=True)
class SentPublication(KeptPublication):
    """Weights that the learner's first rank keeps, and sends to each worker through a channel of its own."""

    rendezvous_store: RendezvousStore

    async def bring_to(self, worker: RemoteObject, verb: WorkerVerb) -> WeightReceipt | None:
        """Let the learner send and the worker receive them; after a failure the next ones go through a new channel.

        Raises: what the verb or `send_weights` of the learner raises first.
        """
        rendezvous = self.rendezvous_store.of(worker.name)
        with ExitStack() as on_failure:
            on_failure.callback(self.rendezvous_store.renew, worker.name)
            result, _ = await asyncio.gather(
                worker.call_concurrently(verb, self.manifest, *self.parts, rendezvous=rendezvous),
                self.rank.call_concurrently("send_weights", self.manifest.policy_version, rendezvous),
            )
            on_failure.pop_all()
        return result
