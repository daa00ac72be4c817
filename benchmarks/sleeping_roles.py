"""Workers that sleep instead of computing: real processes, real messages, real loops, known stage times.

With them the speed of the orchestration can be measured against its ideal on a machine with few cores. Only sampling,
scoring and training sleep; tickets, rollouts, Gram statistics and weights are real ones of the real sizes.
"""

import random
import time
from collections.abc import Generator

import numpy as np
import torch

from actors.rollout import Rollout, Ticket
from actors.weights.manifest import Probe, WeightManifest, as_bytes, checksum, verified_tensors
from actors.weights.object_store import ArrayPart
from actors.weights.parts import Part, open_parts
from actors.worker import WeightReceipt
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout


def wait(mean_s: float, variation: float, seed: int) -> None:
    """Sleep for a time drawn uniformly from mean * [1 - variation, 1 + variation]."""
    time.sleep(mean_s * random.Random(seed).uniform(1 - variation, 1 + variation))


class SleepingRolloutWorker:
    """Takes `sample_s` for each document; what it samples is noise."""

    def __init__(self, *, sample_s: float, variation: float) -> None:
        self._sample_s, self._variation = sample_s, variation
        self._policy_version = 0
        self.startup_s: dict[str, float] = {}

    def sample(self, tickets: list[Ticket]) -> list[Rollout]:
        """As RolloutWorker, with the version that it holds at the beginning."""
        version = self._policy_version
        return [self._sample(ticket, version) for ticket in tickets]

    def reset(self) -> None:
        """Back to version 0."""
        self._policy_version = 0

    def receive_weights(self, manifest: WeightManifest, *parts: Part) -> WeightReceipt:
        """Compares checksums, and keeps the version."""
        start = time.perf_counter()
        verified_tensors(manifest, open_parts(parts))
        self._policy_version = manifest.policy_version
        verify_s = time.perf_counter() - start
        return WeightReceipt(
            policy_version=manifest.policy_version,
            verify_s=verify_s,
            pause_s=0.0,
            probe_s=0.0,
            probe_error=0.0,
        )

    def _sample(self, ticket: Ticket, version: int) -> Rollout:
        start = time.perf_counter()
        wait(self._sample_s, self._variation, ticket.seed)
        document = ticket.document
        shape = (len(document.anchors), ticket.completions_per_context, document.horizon)
        return Rollout(
            ticket_id=ticket.ticket_id,
            document=document,
            completion_ids=np.random.default_rng(ticket.seed).integers(0, 2000, shape),
            completion_lengths=np.full(shape[:2], shape[2]),
            behavior_logprobs=np.full(shape, -1.0, dtype=np.float32),
            token_versions=np.full(shape, version),
            sample_s=time.perf_counter() - start,
        )


class SleepingFeatureServer:
    """Takes `score_s` for each document; its features are noise."""

    def __init__(self, *, score_s: float, variation: float) -> None:
        self._score_s, self._variation = score_s, variation
        self.startup_s: dict[str, float] = {}

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """As FeatureServer."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> ScoredRollout:
        start = time.perf_counter()
        wait(self._score_s, self._variation, rollout.ticket_id)
        groups, n = rollout.completion_lengths.shape
        raw = gram_statistics(torch.randn(groups, n, 8), torch.randn(groups, 8))
        return ScoredRollout(rollout=rollout, raw=raw, whitened=None, score_s=time.perf_counter() - start)


class SleepingLearner:
    """Takes `train_s` (given by `reset`) for each step; publishes `megabytes` of weights that never change."""

    def __init__(self, *, variation: float, megabytes: float) -> None:
        self._train_s, self._variation = 0.0, variation
        self._weights = as_bytes(torch.randn(int(megabytes * 2**18)))
        self._policy_version = 0
        self.startup_s: dict[str, float] = {}

    def train_step(self, *scored: ScoredRollout, lags: list[int]) -> dict[str, float]:
        """As LearnerWorker: checks every lag."""
        start = time.perf_counter()
        found = [self._policy_version - one.rollout.min_policy_version for one in scored]
        if found != list(lags):
            raise RuntimeError(f"the rollouts' lags are {found}, they were handed over as {list(lags)}")
        wait(self._train_s, self._variation, self._policy_version)
        self._policy_version += 1
        seconds = time.perf_counter() - start
        return {"lag/mean": sum(found) / len(found), "lag/max": max(found), "time/train_s": seconds}

    def publish(self, probe_ids: list[list[int]], part_bytes: int) -> Generator[ArrayPart, None, WeightManifest]:
        """The weights in one part, and their manifest."""
        yield ArrayPart([self._weights])
        return WeightManifest(
            policy_version=self._policy_version,
            names=["weights"],
            dtypes=["float32"],
            shapes=[(self._weights.size // 4,)],
            checksums=[checksum(self._weights)],
            probe=Probe(token_ids=[], logprobs=[]),
        )

    def discard_weights(self, policy_version: int) -> None:
        """As LearnerWorker, whose transport `object_store` has nothing to free."""

    def reset(self, *, train_s: float) -> None:
        """Back to version 0, with another time for a step."""
        self._policy_version, self._train_s = 0, train_s
