"""Messages from a feature or verifier server to the learner."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from actors.rollout import Rollout
from feature_server.features.gram import GramStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSummary:
    """What the controller sees of a scored rollout; the rollout itself travels by reference."""

    ticket_id: int
    score_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout and the inner products of its features: all that rewards, baselines and re-weighting need."""

    rollout: Rollout
    raw: GramStatistics
    """Of the features themselves: per-context whitening and the reported CFM start from these."""
    whitened: GramStatistics | None
    """Of the features under the pooled whitening map; None before a map was fitted."""
    verified: Float64[Tensor, "group completion"] | None = None
    """The verifier's reward of each completion; None without a verifier."""
    score_s: float
    """Time of the feature forward or of the verifier [s]."""

    def summary(self) -> ScoredSummary:
        """The few numbers that the controller needs."""
        return ScoredSummary(ticket_id=self.rollout.ticket_id, score_s=self.score_s)


def no_features() -> GramStatistics:
    """Statistics of zero groups, for a rollout that no feature model scored."""
    shapes = {"gram": (0, 0, 0), "ground_truth_products": (0, 0), "ground_truth_norm_sq": (0,)}
    return GramStatistics(**{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
