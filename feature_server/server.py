"""FeatureServer: turns rollouts into Gram statistics with a frozen network.

Guarantee: what it returns depends on the rollout, the frozen network and the whitening map alone, so a replica or a
restarted server gives the same answer. The ground truth of a document is embedded once and kept.
"""

import time
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor

from actors.rollout import Document, Rollout
from feature_server.config import FeatureConfig
from feature_server.feature_model import FeatureModel
from feature_server.gram import GramStatistics, gram_statistics, merge_duplicates
from feature_server.pooled_whitening import pooled_whitening_map, second_moment
from feature_server.scored_rollout import ScoredRollout


class FeatureServer:
    """One frozen network, at most one whitening map."""

    def __init__(self, *, model: str, config: FeatureConfig, dtype: str) -> None:
        """Load the frozen network; no whitening map yet."""
        self._config = config
        self._model = FeatureModel(model, config, dtype=dtype)
        self._whitening_map: Float[Tensor, "feature feature"] | None = None
        self._ground_truth: OrderedDict[tuple, Float[Tensor, "group feature"]] = OrderedDict()
        self.startup_s = self._model.startup_s

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """Gram statistics of each rollout, in order.

        Raises: ValueError if the network produced NaN or infinite features, naming document and group.
        """
        scored = []
        for first in range(0, len(rollouts), self._config.micro_batch_documents):
            scored += self._score(rollouts[first : first + self._config.micro_batch_documents])
        return scored

    def fit_whitening(self, rollouts: list[Rollout]) -> Float[Tensor, "feature feature"]:
        """Estimate the pooled second moment from these rollouts' completions; whiten with it from now on.

        Returns the map, so that every other replica can be given the same one.
        Raises: ValueError if there are fewer completions than dimensions: the directions never seen would be blown up.
        """
        features = torch.cat([f.flatten(0, 1) for rollout in rollouts for f in self._model([rollout])[0]])
        count, dimensions = features.shape
        if count < dimensions:
            raise ValueError(
                f"pooled whitening of {dimensions} dimensions needs at least as many completions, {len(rollouts)} "
                f"documents gave {count}; set feature.whitening_documents to "
                f"{-(-dimensions * len(rollouts) // count)} or more, or learner.whitening='none'"
            )
        self.set_whitening(pooled_whitening_map(second_moment(features), self._config.whitening_shrinkage))
        return self._whitening_map

    def set_whitening(self, whitening_map: Float[Tensor, "feature feature"]) -> None:
        """Whiten with this map from now on."""
        self._whitening_map = whitening_map

    def _score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        start = time.perf_counter()
        features = self._model(rollouts)
        scored = []
        for rollout, completions, ground_truth in zip(rollouts, *features, strict=True):
            ground_truth = self._cached(rollout.document, ground_truth)
            raw = self._statistics(rollout, completions, ground_truth)
            whitened = None
            if self._whitening_map is not None:
                root = self._whitening_map
                whitened = self._statistics(rollout, completions.to(root) @ root, ground_truth.to(root) @ root)
            scored.append((rollout, raw, whitened))
        seconds = (time.perf_counter() - start) / len(rollouts)
        return [ScoredRollout(rollout=r, raw=raw, whitened=whitened, score_s=seconds) for r, raw, whitened in scored]

    def _statistics(self, rollout: Rollout, completions: Tensor, ground_truth: Tensor) -> GramStatistics:
        try:
            statistics = gram_statistics(completions, ground_truth)
        except ValueError as error:
            raise ValueError(f"document {rollout.document.document_id!r}: {error}") from error
        # Copies: arrays out of Ray's store are read-only, which torch does not support.
        ids, lengths = torch.tensor(rollout.completion_ids), torch.tensor(rollout.completion_lengths)
        return merge_duplicates(statistics, ids, lengths)

    def _cached(self, document: Document, fresh: Float[Tensor, "group feature"]) -> Float[Tensor, "group feature"]:
        # The first embedding is the one that counts: kernels may round differently in another batch.
        windows = (document.document_id, document.horizon, document.anchors.tobytes())
        features = self._ground_truth.setdefault(windows, fresh)
        self._ground_truth.move_to_end(windows)
        if len(self._ground_truth) > self._config.cached_documents:
            self._ground_truth.popitem(last=False)
        return features
