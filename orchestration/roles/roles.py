"""The three roles as the controller sees them: awaitable methods over references, whatever process answers.

The controller is written against these classes' methods; tests give it fakes with the same methods.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from torch import Tensor

from actors.config import WeightTransport
from actors.rollout import Document, Rollout, RolloutSummary, Ticket
from actors.weights.transports import TRANSPORTS
from actors.worker import RolloutWorker, WeightReceipt
from feature_server.features.server import FeatureServer
from feature_server.scored_rollout import ScoredRollout, ScoredSummary
from learner.batch import Example
from learner.worker import LearnerWorker
from orchestration.buffer.uses import Use
from orchestration.cluster.remote import ProcessLost, Reference, Remote, arriving, failing
from orchestration.roles.publications import Publication
from orchestration.roles.rendezvous import RendezvousStore

T = TypeVar("T")

GRACE_S = 10.0
"""How long to look for the cause when a rank raises: it may only have noticed that another one is lost [s]."""


class RolloutRole:
    """One rollout worker. All methods raise ProcessFailure, of this worker or of the learner that sends it weights."""

    def __init__(self, remote: Remote[RolloutWorker]) -> None:
        self.name = remote.name
        self.policy_version: int | None = None
        """None: the worker has to load published weights, be it version 0, before it samples."""
        self.lock = asyncio.Lock()
        """Held from the moment a request's weights are chosen to its end."""
        self.weights_lock = asyncio.Lock()
        """Held while the worker receives weights, which may happen during a request."""
        self.remote = remote
        self.num_done = 0

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, Reference[Rollout]]]:
        """Summary and reference of each ticket's rollout; to be called inside of `WeightSync.prepare`."""
        with failing(self.name):
            sampled = await self.remote.call_each(RolloutWorker.sample, tickets, Rollout.summary)
        self.num_done += 1
        if tickets[0].weight_steps:  # those that the worker held are live now
            _, self.policy_version = tickets[0].weight_steps[-1]
        return sampled

    async def receive_weights(self, publication: Publication) -> WeightReceipt:
        """Let the worker take, verify and load these weights."""
        receipt = await publication.bring_to(self.remote, RolloutWorker.receive_weights)
        self.policy_version = receipt.policy_version
        return receipt

    async def hold_weights(self, publication: Publication) -> None:
        """Let the worker take and verify these weights, for the next request, which has to see them."""
        await publication.bring_to(self.remote, RolloutWorker.hold_weights)

    async def lost(self) -> NoReturn:
        """Waits as long as the worker lives and answers."""
        await self.remote.lost()


class Scorer(Protocol):
    """A worker that scores: FeatureServer, VerifierServer."""

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """One result for each rollout, in order."""
        ...


class ScorerRole:
    """A feature server or a verifier server: turns rollouts into scored ones. All methods raise ProcessFailure."""

    def __init__(self, remote: Remote[Scorer]) -> None:
        self.name = remote.name
        self.remote = remote
        self.num_done = 0

    async def score(
        self, rollouts: Sequence[Reference[Rollout]]
    ) -> list[tuple[ScoredSummary, Reference[ScoredRollout]]]:
        """Summary and reference of each scored rollout."""
        arrived = [arriving(rollout) for rollout in rollouts]
        with failing(self.name):
            scored = await self.remote.call_each(Scorer.score, arrived, ScoredRollout.summary)
        self.num_done += 1
        return scored

    async def lost(self) -> NoReturn:
        """Waits as long as the server lives and answers."""
        await self.remote.lost()


class FeatureRole(ScorerRole):
    """One feature server."""

    def __init__(self, remote: Remote[FeatureServer]) -> None:
        super().__init__(remote)
        self.server = remote

    async def fit_whitening(self, rollouts: Sequence[Reference[Rollout]]) -> Tensor:
        """Estimate the second moment of pooled whitening, [feature, feature], from these rollouts."""
        with failing(self.name):
            return await self.server.call(FeatureServer.fit_whitening, *[arriving(rollout) for rollout in rollouts])

    async def set_whitening(self, moment: Tensor) -> None:
        """Whiten by a moment that another server estimated."""
        with failing(self.name):
            await self.server.call(FeatureServer.set_whitening, moment)


class LearnerRole:
    """All learner ranks as one."""

    def __init__(
        self,
        ranks: Sequence[Remote[LearnerWorker]],
        probe_ids: list[list[int]],
        *,
        part_bytes: int = 2**28,
        transport: WeightTransport = "object_store",
        channel_timeout_s: float = 300.0,
    ) -> None:
        """Weights are published in parts of about `part_bytes`, by the transport that the ranks were built with.

        `channel_timeout_s`: longest wait of a transport that sends for the other side [s]; less than that of the call,
        whose error would tell less.
        """
        self.ranks = ranks
        self._probe_ids, self._part_bytes = probe_ids, part_bytes
        self._transport, backend = TRANSPORTS[transport], TRANSPORTS[transport].backend
        self._rendezvous_store = RendezvousStore(backend, timeout_s=channel_timeout_s) if backend is not None else None

    async def train_step(self, batch: Sequence[Use[Reference[Example]]]) -> dict[str, float]:
        """One optimizer step on these documents, an equal share for each rank; metrics of the whole step.

        The ranks refuse a rollout whose lag is not the one that the buffer counted.
        """
        share = len(batch) // len(self.ranks)
        shares = [batch[index * share : (index + 1) * share] for index in range(len(self.ranks))]
        calls = [
            rank.call(
                LearnerWorker.train_step,
                *[arriving(use.payload) for use in uses],
                lags=[use.lag.total for use in uses],
            )
            for rank, uses in zip(self.ranks, shares, strict=True)
        ]
        return (await _all(calls))[0]

    async def lost(self) -> NoReturn:
        """Waits as long as all ranks live and answer."""
        await _all([rank.lost() for rank in self.ranks])
        raise AssertionError("a process is lost by an error")

    async def publish(self) -> Publication:
        """The current weights, copied out of the learner."""
        start = time.perf_counter()
        calls = [rank.stream(LearnerWorker.publish, self._probe_ids, self._part_bytes) for rank in self.ranks]
        parts, manifest = (await _all(calls))[0]
        assert manifest is not None, "the first rank returns the manifest"
        return Publication(
            manifest=manifest,
            parts=parts,
            publish_s=time.perf_counter() - start,
            rank=self.ranks[0],
            kept_by_learner=self._transport.keeps_weights,
            rendezvous_store=self._rendezvous_store,
        )

    async def copy_state(self) -> None:
        """All ranks keep a copy of what they need to go on from here."""
        await _all([rank.call(LearnerWorker.copy_state) for rank in self.ranks])

    async def write_state(self, folder: Path) -> None:
        """Write the copy, each rank its share, concurrently with training."""
        await _all([rank.call_concurrently(LearnerWorker.write_state, str(folder)) for rank in self.ranks])

    async def restore_state(self, folder: Path) -> None:
        """Go on from what was written there, by however many ranks."""
        await _all([rank.call(LearnerWorker.restore_state, str(folder)) for rank in self.ranks])

    def close_channel(self, worker: str) -> None:
        """This worker has left; nothing more will be sent to it."""
        if self._rendezvous_store is not None:
            self.ranks[0].notify(LearnerWorker.close_channel, worker)

    async def release(self) -> None:
        """The run is over: free every version that would outlast the learner's process, which may be killed.

        Memory that workers map has a name on its node, and files have one on a disk.
        """
        if self._transport.outlasts_process:
            await self.ranks[0].call_concurrently(LearnerWorker.discard_all_weights)

    async def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        """Cross-entropy [nats per token] of each document under the current weights."""
        calls = [rank.call(LearnerWorker.cross_entropy, documents) for rank in self.ranks]
        return (await _all(calls))[0]


async def connect_learner(ranks: Sequence[Remote[LearnerWorker]], *, timeout_s: float) -> None:
    """Join all ranks in one process group and build their engines."""
    address, port = await ranks[0].call(LearnerWorker.rendezvous)
    calls = [
        rank.call(
            LearnerWorker.connect,
            rank=index,
            world_size=len(ranks),
            address=address,
            port=port,
            timeout_s=timeout_s,
        )
        for index, rank in enumerate(ranks)
    ]
    await _all(calls)


async def _all(calls: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all ranks.

    Raises: ProcessLost if one is lost, even if others, which waited for it, were the first to raise; else what one of
    the first raised.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if first := _errors(tasks):
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await _loss_known(tasks)
            raise _loss(tasks) or first[0]
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _loss_known(tasks: Sequence[asyncio.Future[T]]) -> None:
    """Returns when one is lost, or all have ended."""
    while _loss(tasks) is None and (waiting := [task for task in tasks if not task.done()]):
        await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)


def _errors(tasks: Sequence[asyncio.Future[T]]) -> list[BaseException]:
    """Of those that have failed so far."""
    return [error for task in tasks if task.done() and (error := task.exception()) is not None]


def _loss(tasks: Sequence[asyncio.Future[T]]) -> ProcessLost | None:
    return next((error for error in _errors(tasks) if isinstance(error, ProcessLost)), None)
