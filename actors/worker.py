"""RolloutWorker: samples tickets with the newest weights it has verified.

Lifecycle: ready (version 0, the initial checkpoint) -> receive_weights / sample, any number of times. A failed
verification quarantines the worker: it never samples again until a later load verifies.
"""

import time
from dataclasses import dataclass

import numpy as np

from actors.config import RolloutConfig
from actors.pretrained import resolve_model
from actors.rollout import Rollout, Ticket
from actors.sampler import Sampler
from actors.weights import WeightManifest, WeightMismatchError, largest_probe_error, verified_tensors

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest disagreement [nats] of engine and learner at equal weights, by dtype: rounding gives 1e-5 at 4 layers and
2e-4 at 30 in float32. A stale tensor is noticed as soon as the others have moved away from it by more than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReceipt:
    """What one verified load took, and how well engine and learner agree after it."""

    policy_version: int
    """The version the worker samples with from now on."""
    verify_s: float
    """Time to compare the checksums [s]."""
    pause_s: float
    """Time in which the engine could not sample: load, cache reset and probe [s]."""
    probe_error: float
    """Largest |engine - learner| log-probability on the probe texts [nats]."""


class RolloutWorker:
    """One engine, one policy version at a time."""

    def __init__(
        self,
        *,
        model: str,
        config: RolloutConfig,
        dtype: str,
        max_tokens: int,
        tensor_parallel_size: int = 1,
        gpu_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Start the engine with the initial checkpoint, which is policy version 0."""
        self._sampler = Sampler(
            resolve_model(model),
            config,
            dtype=dtype,
            max_tokens=max_tokens,
            tensor_parallel_size=tensor_parallel_size,
            gpu_share=gpu_share,
            seed=seed,
        )
        self._probe_tolerance = config.probe_tolerance or PROBE_TOLERANCE[dtype]
        self._policy_version: int | None = 0
        self.startup_s = self._sampler.startup_s

    def sample(self, tickets: list[Ticket]) -> list[Rollout]:
        """One rollout for each ticket, in order, at the current policy version.

        Raises: RuntimeError if the worker is quarantined or its weights are too old for a ticket.
        """
        version = self._policy_version
        if version is None:
            raise RuntimeError("this worker's last weight update failed its checks; it samples again after a good one")
        for ticket in tickets:
            ticket.require_allowed(version)
        return self._sampler.sample(tickets, policy_version=version)

    def receive_weights(self, manifest: WeightManifest, buffers: list[np.ndarray]) -> WeightReceipt:
        """Verify, load and probe published weights; from then on sample with them.

        Raises: WeightMismatchError naming the tensor or the probe that failed; the worker is then quarantined.
        """
        self._policy_version = None
        start = time.perf_counter()
        tensors = verified_tensors(manifest, buffers)
        verified = time.perf_counter()
        self._sampler.load(tensors)
        error = largest_probe_error(manifest.probe, self._sampler.score_tokens(manifest.probe.token_ids))
        if not error <= self._probe_tolerance:
            raise WeightMismatchError(
                f"after loading version {manifest.policy_version} the engine's log-probs differ from the learner's by "
                f"{error:.3g} nats on the probe texts, allowed are {self._probe_tolerance:g} "
                "(rollout.probe_tolerance): the engine does not compute with the weights it was sent"
            )
        self._policy_version = manifest.policy_version
        return WeightReceipt(
            policy_version=manifest.policy_version,
            verify_s=verified - start,
            pause_s=time.perf_counter() - verified,
            probe_error=error,
        )
