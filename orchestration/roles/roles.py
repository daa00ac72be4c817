"""The three roles as the controller sees them: awaitable verbs over references, whatever process answers.

The controller is written against these classes' methods; tests give it fakes with the same verbs.
"""

import asyncio
import time
from collections.abc import Sequence

from actors.config import KEPT_BY_LEARNER, WeightTransport
from actors.rollout import Document, RolloutSummary, Ticket
from actors.weights.manifest import WeightManifest
from actors.weights.parts import version_folder
from actors.worker import WeightReceipt
from feature_server.scored_rollout import ScoredSummary
from orchestration.buffer.rollout_buffer import Use
from orchestration.cluster.cluster import RemoteObject
from orchestration.roles.publications import KeptPublication, Publication, Reference, SentPublication
from orchestration.roles.rendezvous import RendezvousStore


class RolloutRole:
    """One rollout worker."""

    def __init__(self, remote: RemoteObject, *, policy_version: int | None = 0) -> None:
        """`policy_version` None: the worker has to load published weights before it samples."""
        self.name = remote.name
        self.policy_version = policy_version
        self.lock = asyncio.Lock()
        """Held from the moment a request's weights are chosen to its end."""
        self.weights_lock = asyncio.Lock()
        """Held while the worker receives weights, which may go on during a request."""
        self.remote = remote

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, Reference]]:
        """Summary and reference of each ticket's rollout."""
        sampled = await self.remote.call_each("sample", tickets)
        if tickets[0].weight_steps:  # those that the worker held are live now
            _, self.policy_version = tickets[0].weight_steps[-1]
        return sampled

    async def receive_weights(self, publication: Publication) -> WeightReceipt:
        """Let the worker pull, verify and load these weights."""
        receipt = await publication.bring_to(self.remote, "receive_weights")
        self.policy_version = receipt.policy_version
        return receipt

    async def hold_weights(self, publication: Publication) -> None:
        """Let the worker pull and verify these weights, for the next request, which has to meet them."""
        await publication.bring_to(self.remote, "hold_weights")


class ScorerRole:
    """Who turns rollouts into scored ones: a feature server or a verifier server."""

    def __init__(self, remote: RemoteObject) -> None:
        self.name = remote.name
        self.remote = remote

    async def score(self, rollouts: Sequence[Reference]) -> list[tuple[ScoredSummary, Reference]]:
        """Summary and reference of each scored rollout."""
        return await self.remote.call_each("score", rollouts)


class FeatureRole(ScorerRole):
    """One feature server."""

    async def fit_whitening(self, rollouts: Sequence[Reference]) -> object:
        """Estimate the second moment of pooled whitening from these rollouts; returns it."""
        return await self.remote.call_on("fit_whitening", rollouts)

    async def set_whitening(self, moment: object) -> None:
        """Whiten by a moment that another server estimated."""
        await self.remote.call("set_whitening", moment)


class LearnerRole:
    """All learner ranks as one."""

    def __init__(
        self,
        ranks: Sequence[RemoteObject],
        probe_ids: list[list[int]],
        *,
        part_bytes: int = 2**28,
        transport: WeightTransport = "object_store",
        weight_folder: str | None = None,
        channel_timeout_s: float = 300.0,
    ) -> None:
        """Weights are published in parts of about `part_bytes`.

        `weight_folder`: where those of the transport `files` are. `channel_timeout_s`: longest wait of `gloo` and
        `nccl` for the other side [s]; less than that of the call, whose error would tell less.
        """
        self._ranks = ranks
        self._probe_ids = probe_ids
        self._part_bytes, self._transport, self._weight_folder = part_bytes, transport, weight_folder
        self._rendezvous_store = (
            RendezvousStore(transport, timeout_s=channel_timeout_s) if transport in ("gloo", "nccl") else None
        )

    async def train_step(self, batch: Sequence[Use[Reference]]) -> dict[str, float]:
        """One optimizer step on these documents, an equal share for each rank; metrics of the whole step.

        The ranks refuse a rollout whose lag is not the one that the buffer stands for.
        """
        share = len(batch) // len(self._ranks)
        shares = [batch[index * share : (index + 1) * share] for index in range(len(self._ranks))]
        calls = [
            rank.call("train_step", *[use.payload for use in uses], lags=[use.lag.total for use in uses])
            for rank, uses in zip(self._ranks, shares, strict=True)
        ]
        return (await asyncio.gather(*calls))[0]

    async def publish(self) -> Publication:
        """The current weights, copied out of the learner."""
        start = time.perf_counter()
        settings = (self._probe_ids, self._part_bytes, self._transport, self._weight_folder)
        results = await asyncio.gather(*[rank.call_parts("publish", *settings) for rank in self._ranks])
        parts, manifest = results[0]
        return self._publication(manifest=manifest, parts=parts, publish_s=time.perf_counter() - start)

    def close_channel(self, worker: str) -> None:
        """This worker has left: nothing will be sent to it any more."""
        if self._rendezvous_store is not None:
            self._ranks[0].notify("close_channel", worker)

    async def release(self) -> None:
        """The run is over: free every version that the learner still keeps.

        Memory that workers map has a name on its node, which would outlast a process that is killed.
        """
        if self._transport in KEPT_BY_LEARNER:
            await self._ranks[0].call_concurrently("discard_all_weights")

    async def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        """Cross-entropy [nats per token] of each document under the current weights."""
        return (await asyncio.gather(*[rank.call("cross_entropy", documents) for rank in self._ranks]))[0]

    def _publication(self, *, manifest: WeightManifest, **made: object) -> Publication:
        match self._transport:
            case "ipc":
                return KeptPublication(manifest=manifest, rank=self._ranks[0], **made)
            case "gloo" | "nccl":
                return SentPublication(
                    manifest=manifest, rank=self._ranks[0], rendezvous_store=self._rendezvous_store, **made
                )
            case "files":
                folder = version_folder(self._weight_folder, manifest.policy_version)
                return Publication(manifest=manifest, folder=str(folder), **made)
        return Publication(manifest=manifest, **made)


async def connect_learner(ranks: Sequence[RemoteObject], *, timeout_s: float) -> None:
    """Join all ranks in one process group and build their engines."""
    address, port = await ranks[0].call("rendezvous")
    calls = [
        rank.call("connect", rank=index, world_size=len(ranks), address=address, port=port, timeout_s=timeout_s)
        for index, rank in enumerate(ranks)
    ]
    await asyncio.gather(*calls)
