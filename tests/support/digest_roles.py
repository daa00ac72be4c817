"""Roles of a run whose every result is a digest of all that it may depend on, and settings of short runs with them.

Weights are the digest of the weights before and of the batch, in its order; a rollout is the digest of the weights of
each engine step and of the whole request that sampled it. Delays are random. So two runs end with equal weights only if
every decision that matters was the same.
"""

import asyncio
import hashlib
import random
from collections.abc import Sequence

from fake_publication import FakePublication, fake_manifest

from actors.config import InFlightUpdates
from actors.rollout import RolloutSummary, Ticket
from actors.worker import WeightReceipt
from feature_server.scored_rollout import ScoredSummary
from orchestration.buffer.uses import Use
from orchestration.config import RunConfig

STEPS = 4


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Delays:
    """Random waits, now and then a long one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def wait(self) -> None:
        await asyncio.sleep(self._random.expovariate(1.0) * self._random.choice((1, 1, 1, 8)))


class Worker:
    """Takes STEPS steps for a request; the first token of its k-th ticket is sampled in step k."""

    def __init__(self, name: str, delays: Delays, *, in_flight_updates: InFlightUpdates = "wait") -> None:
        self.name, self.num_done, self.policy_version, self.weights = name, 0, None, ""
        self.lock, self.weights_lock, self._engine = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._delays, self._keeps = delays, in_flight_updates == "keep"
        self._incoming: FakePublication | None = None
        self._held: dict[int, FakePublication] = {}

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, str]]:
        planned, request = dict(tickets[0].weight_steps[1:]), [(t.seed, t.document.document_id) for t in tickets]
        async with self._engine:
            seen, computed = [(0, self.policy_version)], []
            for step in range(STEPS):
                if step in planned:
                    self._install(self._held.pop(planned[step]))
                    seen.append((step, self.policy_version))
                elif step and self._keeps and self._incoming is not None:
                    self._install_incoming()
                    seen.append((step, self.policy_version))
                computed.append((self.policy_version, self.weights))
                await self._delays.wait()
        self.num_done += 1
        return [
            (self._summary(ticket, computed[k:], seen), digest(computed, request, ticket.ticket_id))
            for k, ticket in enumerate(tickets)
        ]

    def _summary(self, ticket: Ticket, computed: list[tuple[int, str]], seen: list[tuple[int, int]]) -> RolloutSummary:
        versions = [version for version, _ in computed]
        return RolloutSummary(
            ticket_id=ticket.ticket_id,
            min_policy_version=min(versions),
            max_policy_version=max(versions),
            num_completion_tokens=len(versions),
            sample_s=1.0,
            weight_steps=tuple(seen),
        )

    async def receive_weights(self, publication: FakePublication) -> WeightReceipt:
        await self._delays.wait()
        self._incoming = publication
        while self._incoming is publication:
            if self._engine.locked():
                await asyncio.sleep(0.05)
            else:
                self._install_incoming()
        version = publication.manifest.policy_version
        return WeightReceipt(policy_version=version, verify_s=0.0, pause_s=0.0, probe_s=0.0, probe_error=0.0)

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def hold_weights(self, publication: FakePublication) -> None:
        await self._delays.wait()
        self._held[publication.manifest.policy_version] = publication

    def _install_incoming(self) -> None:
        self._install(self._incoming)
        self._incoming = None

    def _install(self, publication: FakePublication) -> None:
        self.policy_version, self.weights = publication.manifest.policy_version, publication.manifest.digest


class Scorer:
    def __init__(self, delays: Delays, name: str = "server") -> None:
        self.name, self.num_done, self._delays = name, 0, delays

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def score(self, rollouts: Sequence[str]) -> list[tuple[ScoredSummary, str]]:
        await self._delays.wait()
        self.num_done += 1
        return [(ScoredSummary(ticket_id=0, score_s=0.0), digest(rollout, list(rollouts))) for rollout in rollouts]


class Learner:
    def __init__(self, delays: Delays) -> None:
        self.version, self.weights, self.batches = 0, "initial", []
        self._delays = delays

    async def train_step(self, batch: Sequence[Use[str]]) -> dict[str, float]:
        await self._delays.wait()
        self.batches.append([(use.ticket.ticket_id, use.reuse_index) for use in batch])
        self.weights = digest(self.weights, [(use.payload, use.reuse_index, use.lag.total) for use in batch])
        self.version += 1
        return {}

    async def lost(self) -> None:
        await asyncio.Event().wait()

    def close_channel(self, worker: str) -> None:
        """There is no channel to close."""

    async def publish(self) -> FakePublication:
        await self._delays.wait()
        return FakePublication(fake_manifest(self.version, self.weights), publish_s=0.0)


def settings(*, in_flight_updates: InFlightUpdates = "wait", **asynchrony: object) -> RunConfig:
    learner = {"num_steps": 12, "documents_per_step": 6, "micro_batch_documents": 1}
    rollout = {"documents_per_request": 2, "in_flight_updates": in_flight_updates}
    return RunConfig.model_validate({"learner": learner, "rollout": rollout, "asynchrony": asynchrony})
