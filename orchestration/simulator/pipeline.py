"""What is simulated: numbers of processes, and the settings that decide what waits for what."""

from dataclasses import dataclass

from actors.config import InFlightUpdates
from orchestration.asynchrony_config import LagConfig
from orchestration.simulator.stage_times import StageTimes, ideal_speedup, longest_stage_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How many processes there are, and the settings that decide what waits for what."""

    rollout_workers: int
    scorers: int
    documents_per_step: int
    documents_per_request: int
    asynchrony: LagConfig
    in_flight_updates: InFlightUpdates = "wait"
    """As rollout.in_flight_updates."""

    @property
    def warm_up_steps(self) -> int:
        """Steps until the initial filling of buffer and pool has no effect any more, and some more."""
        return 10 + self.asynchrony.effective_prefetch_steps + self.asynchrony.max_lag + self.asynchrony.max_uses

    def longest_stage_s(self, times: StageTimes) -> float:
        """Its stage_times.longest_stage_s."""
        return longest_stage_s(times, **self._cluster)

    def ideal_speedup(self, times: StageTimes) -> float:
        """Its stage_times.ideal_speedup."""
        return ideal_speedup(times, **self._cluster)

    @property
    def _cluster(self) -> dict[str, int]:
        return {
            "rollout_workers": self.rollout_workers,
            "scorers": self.scorers,
            "fresh_documents": self.documents_per_step // self.asynchrony.max_uses,
            "documents_per_request": self.documents_per_request,
        }
