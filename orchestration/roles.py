"""The three roles as the controller sees them: awaitable verbs over references, whatever process answers.

The controller is written against these classes' methods; tests give it fakes with the same verbs.
"""

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ray import ObjectRef

from actors.rollout import Document, RolloutSummary, Ticket
from actors.weight_parts import version_folder
from actors.weights import WeightManifest
from actors.worker import WeightReceipt
from feature_server.scored_rollout import ScoredSummary
from orchestration.cluster import RemoteObject
from orchestration.rollout_buffer import Use

Reference = ObjectRef
"""Something in the object store: it travels between processes without passing through this one. (In one process: the
thing itself.)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Weights of one version, ready to be pulled."""

    manifest: WeightManifest
    parts: list[Reference]
    """The tensors of the manifest, in its order: `actors.weight_parts.Part`."""
    publish_s: float
    """Time the learner spent on it [s]."""
    folder: str | None = None
    """Where its files are, if it travels in files."""

    def discard(self) -> None:
        """Nobody will ask for it any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


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
        return await self.remote.call_each("sample", tickets)

    async def receive_weights(self, publication: Publication) -> WeightReceipt:
        """Let the worker pull, verify and load these weights."""
        # Waits beside a running request, in a thread of its own; when the weights go live is the worker's business.
        receipt = await self.remote.call_beside("receive_weights", publication.manifest, *publication.parts)
        self.policy_version = receipt.policy_version
        return receipt


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

    async def score_held_out(self, rollouts: Sequence[Reference]) -> list[tuple[ScoredSummary, Reference]]:
        """As `score`, without a trace in the server's running second moment."""
        return await self.remote.call_each("score_held_out", rollouts)

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
        weight_folder: str | None = None,
    ) -> None:
        """Weights are published in parts of about `part_bytes`; in files below `weight_folder` if there is one."""
        self._ranks = ranks
        self._probe_ids = probe_ids
        self._part_bytes, self._weight_folder = part_bytes, weight_folder

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
        settings = (self._probe_ids, self._part_bytes, self._weight_folder)
        results = await asyncio.gather(*[rank.call_parts("publish", *settings) for rank in self._ranks])
        parts, manifest = results[0]
        folder = self._weight_folder and version_folder(self._weight_folder, manifest.policy_version)
        return Publication(
            manifest=manifest,
            parts=parts,
            publish_s=time.perf_counter() - start,
            folder=folder and str(folder),
        )

    async def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        """Cross-entropy [nats per token] of each document under the current weights."""
        return (await asyncio.gather(*[rank.call("cross_entropy", documents) for rank in self._ranks]))[0]


async def connect_learner(ranks: Sequence[RemoteObject], *, timeout_s: float) -> None:
    """Join all ranks in one process group and build their engines."""
    address, port = await ranks[0].call("rendezvous")
    calls = [
        rank.call("connect", rank=index, world_size=len(ranks), address=address, port=port, timeout_s=timeout_s)
        for index, rank in enumerate(ranks)
    ]
    await asyncio.gather(*calls)
