"""What travels from a feature server to the learner."""

from dataclasses import dataclass

import torch

from actors.rollout import Document, Rollout, unsampled
from feature_server.gram import GramStatistics


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
    score_s: float
    """Time of the feature forward [s]."""

    def summary(self) -> ScoredSummary:
        """The few numbers that the controller needs."""
        return ScoredSummary(ticket_id=self.rollout.ticket_id, score_s=self.score_s)


def unscored(document: Document) -> ScoredRollout:
    """A document without completions, in the form the learner takes: supervised fine-tuning needs nothing else."""
    shapes = {"gram": (0, 0, 0), "products": (0, 0), "ground_truth_norm_sq": (0,)}
    empty = GramStatistics(**{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
    return ScoredRollout(rollout=unsampled(document), raw=empty, whitened=None, score_s=0.0)
