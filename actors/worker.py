"""RolloutWorker: samples tickets with the newest weights it has verified.

Lifecycle: ready (the initial checkpoint, unverified) -> receive_weights -> receive_weights / sample, any number of
times and concurrently. The first set of weights, version 0 or a later one, also calibrates how far engine and learner
may disagree. A failed verification quarantines the worker: a request that is running then raises, and none is sampled
until a later update passes its checks.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from actors.config import Dtype, RolloutConfig
from actors.engine.sampler import Sampler
from actors.models.pretrained import resolve_model
from actors.rollout import Rollout, Ticket
from actors.weights.channel import RECEIVER, Channels, Rendezvous
from actors.weights.manifest import Probe, WeightManifest, probe_error, verified_tensors
from actors.weights.parts import Part, open_parts
from actors.weights.tolerance import allowed_at_start, calibrated, require_same_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReceipt:
    """What one verified load took, and how well engine and learner agree after it."""

    policy_version: int
    """The version the worker samples with from now on."""
    verify_s: float
    """Time to open the parts, compare the checksums and build the tensors, while the engine keeps stepping [s]."""
    pause_s: float
    """Time in which the engine could not step: load and reset of its caches [s]."""
    probe_s: float
    """From there to the end of the probe [s]; in `keep` the running request shares these steps."""
    probe_error: float
    """Largest |engine - learner| log-probability on the probe texts [nats]; their mean was judged as well."""


class RolloutWorker:
    """One engine. `sample` and `receive_weights` may be called from two threads at once."""

    def __init__(
        self,
        *,
        model: str,
        config: RolloutConfig,
        dtype: Dtype,
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
        self._dtype: Dtype = dtype
        self._allowed_probe_error, self._is_calibrated = allowed_at_start(dtype, config.probe_tolerance), False
        self._receiving = threading.Lock()
        self._channels = Channels(RECEIVER)
        self.startup_s = self._sampler.startup_s

    def sample(self, tickets: list[Ticket]) -> list[Rollout]:
        """One rollout for each ticket, in order; each token says which policy version sampled it.

        Waits while weights are loaded and probed.

        Raises: RuntimeError if the worker is quarantined or its weights are too old or too new for a ticket;
        WeightMismatchError if weights that arrived meanwhile failed their checks.
        """
        return self._sampler.sample(tickets)

    def receive_weights(
        self, manifest: WeightManifest, *parts: Part, rendezvous: Rendezvous | None = None
    ) -> WeightReceipt:
        """Verify published weights while the engine keeps sampling, then load and probe them.

        `rendezvous`: of the channel through which the learner sends them, if it does. rollout.in_flight_updates says
        when they enter a running request. Any version may follow any other.

        Raises: WeightMismatchError naming the tensor or the probe that failed, ConnectionError or TimeoutError if the
        learner failed or did not send; the worker is then quarantined.
        RuntimeError, without any effect, if other weights are still on their way in: they are not queued.
        """
        with self._receiving_one(manifest.policy_version):
            self._calibrate(manifest.initial_probe)
            start = time.perf_counter()
            tensors = self._verified(manifest, parts, rendezvous)
            verify_s = time.perf_counter() - start
            load = self._sampler.load(manifest, tensors, allowed=self._allowed_probe_error)
        return WeightReceipt(
            policy_version=manifest.policy_version,
            verify_s=verify_s,
            pause_s=load.pause_s,
            probe_s=load.probe_s,
            probe_error=load.probe_error.largest,
        )

    def hold_weights(self, manifest: WeightManifest, *parts: Part, rendezvous: Rendezvous | None = None) -> None:
        """Verify published weights and keep them for the request whose tickets plan them (`Ticket.weight_steps`).

        Raises: as `receive_weights`.
        """
        with self._receiving_one(manifest.policy_version):
            tensors = self._verified(manifest, parts, rendezvous)
            self._sampler.hold(manifest, tensors, allowed=self._allowed_probe_error)

    def _calibrate(self, initial: Probe | None) -> None:
        """Before the first load: compare what the engine read by itself with version 0, which it should be.

        Raises: WeightMismatchError if it is not.
        """
        if self._is_calibrated or initial is None:
            return
        error = probe_error(initial, self._sampler.score_tokens(initial.token_ids))
        require_same_start(error, self._allowed_probe_error)
        self._allowed_probe_error = calibrated(error, dtype=self._dtype, limit=self._allowed_probe_error)
        self._is_calibrated = True
        logger.info(
            "engine and learner differ by %s at version 0; allowed from now on: %s", error, self._allowed_probe_error
        )

    @contextmanager
    def _receiving_one(self, policy_version: int) -> Iterator[None]:
        if not self._receiving.acquire(blocking=False):
            raise RuntimeError(
                f"weights of version {policy_version} arrived while others were being received; wait for the receipt "
                "of one update before the next is sent"
            )
        try:
            with ExitStack() as on_failure:
                on_failure.callback(self._sampler.quarantine)
                yield
                on_failure.pop_all()
        finally:
            self._receiving.release()

    def _verified(
        self, manifest: WeightManifest, parts: Sequence[Part], rendezvous: Rendezvous | None
    ) -> list[tuple[str, Tensor]]:
        if rendezvous is None:
            return verified_tensors(manifest, open_parts(parts))
        with self._channels.at(rendezvous) as channel:
            buffers = open_parts(parts, channel.receive)
        return verified_tensors(manifest, buffers)
