"""The methods of roles.py by roles that only sleep; a reference to a rollout is its summary.

They keep the guarantees of the real ones: a worker's weights change during a request only as in_flight_updates says,
every rollout carries the weights that sampled it, and the learner refuses a lag that is not the one handed over.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from actors.config import InFlightUpdates
from actors.rollout import RolloutSummary, Ticket
from orchestration.buffer.uses import Lag, Use
from orchestration.cluster.remote import ProcessLost
from orchestration.simulator.stage_times import StageTimes


@dataclass(frozen=True, slots=True)
class SimulatedManifest:
    """Manifest of weights that do not exist."""

    policy_version: int


@dataclass(frozen=True, slots=True)
class SimulatedPublication:
    """A version that can be fetched from now on."""

    manifest: SimulatedManifest
    publish_s: float

    def discard(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True)
class SimulatedReceipt:
    """What one update took."""

    policy_version: int
    pause_s: float
    """The probe included."""
    probe_s: float = 0.0
    probe_error: float = 0.0


@dataclass(frozen=True, slots=True)
class SimulatedScore:
    """What one document took on a server."""

    score_s: float


class SimulatedProcess:
    """It is up now, and fails after its lifetime."""

    def __init__(self, name: str, *, lifetime_s: float) -> None:
        self.name, self.num_done = name, 0
        self._lifetime_s = lifetime_s

    async def lost(self) -> NoReturn:
        """Waits as long as it lives. Raises: ProcessLost."""
        if self._lifetime_s == math.inf:  # a timer that never ends would hide a deadlock
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self._lifetime_s)
        raise ProcessLost(self.name, f"{self.name} failed after {self._lifetime_s:.0f} s")


class SimulatedWorker(SimulatedProcess):
    """One rollout worker."""

    def __init__(
        self,
        name: str,
        times: StageTimes,
        *,
        seed: int,
        in_flight_updates: InFlightUpdates,
        policy_version: int | None = 0,
        lifetime_s: float = math.inf,
    ) -> None:
        """`policy_version`: of the weights that it has."""
        super().__init__(name, lifetime_s=lifetime_s)
        self.policy_version = policy_version
        self.lock, self.weights_lock = asyncio.Lock(), asyncio.Lock()
        self._times, self._seed, self._in_flight_updates = times, seed, in_flight_updates
        self._clock = asyncio.get_running_loop().time
        self._engine = asyncio.Lock()
        """Held by a request, or by an update between two requests; first come, first served."""
        self._oldest_version = 0
        self._sampling_since = self._added_s = 0.0
        self._restarted = False

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[RolloutSummary, RolloutSummary]]:
        """One request: its fixed part and all its documents, and the pauses that fall into it.

        Raises: RuntimeError if the worker's weights are too old or too new for a ticket.
        """
        sample_s = [self._times.sample.draw(self._seed, "sample", ticket.ticket_id) for ticket in tickets]
        left_s = sum(sample_s) + self._times.request.draw(self._seed, "request", tickets[0].ticket_id)
        async with self._engine:
            assert self.policy_version is not None, "it has weights before it is given a request"
            for ticket in tickets:
                ticket.require_allowed(self.policy_version)
            self._oldest_version, self._sampling_since = self.policy_version, self._clock()
            self._restarted = False
            while left_s > 0:
                await asyncio.sleep(left_s)
                left_s, self._added_s = self._added_s, 0.0
            newest_version = self.policy_version
        summaries = [
            RolloutSummary(
                ticket_id=ticket.ticket_id,
                min_policy_version=self._oldest_version,
                max_policy_version=newest_version,
                num_completion_tokens=0,
                sample_s=seconds,
            )
            for ticket, seconds in zip(tickets, sample_s, strict=True)
        ]
        return [(summary, summary) for summary in summaries]

    async def receive_weights(self, publication: SimulatedPublication) -> SimulatedReceipt:
        """Fetch concurrently with the running request; then pause, when in_flight_updates allows it."""
        version = publication.manifest.policy_version
        await asyncio.sleep(self._times.fetch.draw(self._seed, "fetch", self.name, version))
        pause_s = self._times.pause.draw(self._seed, "pause", self.name, version)
        if self._in_flight_updates == "wait" or self._restarted or not self._engine.locked():
            async with self._engine:
                await asyncio.sleep(pause_s)
        else:
            self._interrupt(pause_s, version)
            await asyncio.sleep(pause_s)
        self.policy_version = version
        return SimulatedReceipt(version, pause_s)

    async def hold_weights(self, publication: SimulatedPublication) -> None:
        """Of a replay; the simulator does none."""
        raise NotImplementedError(f"{self.name} was sent weights to hold, and no simulated ticket plans any")

    def _interrupt(self, pause_s: float, version: int) -> None:
        """Delay the end of the running request; `abort` restarts it under the new weights, once."""
        self._added_s += pause_s
        if self._in_flight_updates == "abort":
            now = self._clock()
            self._added_s += now - self._sampling_since
            self._sampling_since, self._oldest_version = now + pause_s, version
            self._restarted = True


class SimulatedScorer(SimulatedProcess):
    """One feature or verifier server."""

    def __init__(self, name: str, times: StageTimes, *, seed: int, lifetime_s: float = math.inf) -> None:
        super().__init__(name, lifetime_s=lifetime_s)
        self._times, self._seed = times, seed

    async def score(self, rollouts: Sequence[RolloutSummary]) -> list[tuple[SimulatedScore, RolloutSummary]]:
        """One document after the other; all of the request are done together."""
        score_s = [self._times.score.draw(self._seed, "score", rollout.ticket_id) for rollout in rollouts]
        await asyncio.sleep(sum(score_s))
        return [(SimulatedScore(seconds), rollout) for seconds, rollout in zip(score_s, rollouts, strict=True)]


class SimulatedLearner(SimulatedProcess):
    """All ranks as one; remembers the lag of everything it was trained on."""

    def __init__(
        self,
        times: StageTimes,
        *,
        seed: int,
        lags: Sequence[list[Lag]] | None = None,
        lifetime_s: float = math.inf,
    ) -> None:
        """`lags`: of the steps that it has done already."""
        super().__init__("learner", lifetime_s=lifetime_s)
        self.lags = list(lags or [])
        """Of each step, of each use."""
        self._times, self._seed = times, seed

    async def train_step(self, batch: Sequence[Use[RolloutSummary]]) -> dict[str, float]:
        """One step.

        Raises: RuntimeError if a rollout's lag is not the one that the buffer counted.
        """
        step = len(self.lags)
        for use in batch:
            if step - use.payload.min_policy_version != use.lag.total:
                raise RuntimeError(
                    f"ticket {use.ticket.ticket_id} was sampled by version {use.payload.min_policy_version} and is "
                    f"trained on in step {step} as if its lag were {use.lag.total}; buffer and worker disagree"
                )
        train_s = self._times.train.draw(self._seed, "train", step)
        await asyncio.sleep(train_s)
        self.lags.append([use.lag for use in batch])
        return {"time/train_s": train_s}

    async def publish(self) -> SimulatedPublication:
        """Make the newest version available."""
        version = len(self.lags)
        publish_s = self._times.publish.draw(self._seed, "publish", version)
        await asyncio.sleep(publish_s)
        return SimulatedPublication(SimulatedManifest(version), publish_s)

    def close_channel(self, worker: str) -> None:
        """There is none."""
