"""FeatureServer: turns rollouts into Gram statistics with a frozen network.

Guarantee: what it returns depends on the request, the frozen network and the whitening map alone, so a replica or a
restarted server gives the same answer, in whatever order requests arrive. Replay relies on it: nothing is kept from
one request to the next. The other rollouts of a request change a result by rounding only, as they share its forwards.
"""

import time
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from actors.rollout import Rollout
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import FeatureModel
from feature_server.features.gram import GramStatistics, gram_statistics, merge_duplicates
from feature_server.features.pooled_whitening import pooled_whitening_map, second_moment, whiten_by_moment_of
from feature_server.scored_rollout import ScoredRollout


class PooledWhitening:
    """Whitens one document at a time, by the second moment that feature.pooled_moment names.

    - `initial`: one moment for the whole run, given to `start`.
    - `document`: that of the document's own completions, the whitened one included (so rewards depend weakly on all of
      them, and the baseline is unbiased up to that). No start, no state.

    The mean squared norm of whitened features is 1 over the named moment.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self._config = config
        self._map: Float64[Tensor, "feature feature"] | None = None

    def start(self, moment: Float64[Tensor, "feature feature"]) -> None:
        """Whiten by this moment from now on.

        Raises: RuntimeError if documents are whitened by their own moments.
        """
        if self._config.pooled_moment == "document":
            raise RuntimeError(
                "feature.pooled_moment='document' whitens each document by its own completions and takes no fitted "
                "moment; leave out the fit"
            )
        self._map = pooled_whitening_map(moment, self._config.whitening_shrinkage)

    def __call__(
        self, completions: Float[Tensor, "group completion feature"], ground_truth: Float[Tensor, "group feature"]
    ) -> tuple[Float64[Tensor, "group completion feature"], Float64[Tensor, "group feature"]] | None:
        """Both whitened; None before a start.

        Raises: ValueError if the document's own completions have no second moment that could be inverted.
        """
        if self._config.pooled_moment == "document":
            pool = completions.flatten(0, 1)
            vectors = torch.cat([pool, ground_truth])
            whitened = whiten_by_moment_of(pool, vectors, self._config.whitening_shrinkage)
            return whitened[: len(pool)].unflatten(0, completions.shape[:2]), whitened[len(pool) :]
        if self._map is None:
            return None
        return completions.double() @ self._map, ground_truth.double() @ self._map


class FeatureServer:
    """One frozen network, and the pooled whitening of what it embeds."""

    def __init__(
        self,
        *,
        model: str,
        config: FeatureConfig,
        dtype: str,
        max_tokens: int,
        policy: str | None = None,
        attention: str = "sdpa",
    ) -> None:
        """Load the frozen network; no whitening map yet. `policy`, `attention` and `max_tokens` as in FeatureModel."""
        self._config = config
        self._model = FeatureModel(
            model, config, dtype=dtype, policy=policy, attention=attention, max_tokens=max_tokens
        )
        self._whitening = PooledWhitening(config)
        self.startup_s = self._model.startup_s

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """Gram statistics of each rollout, in order.

        Raises: ValueError, naming the document, if the network produced NaN or infinite features, or nothing but zero
        ones where a document is whitened by its own moment.
        """
        scored: list[ScoredRollout] = []
        for first in range(0, len(rollouts), self._config.micro_batch_documents):
            scored += self._score(rollouts[first : first + self._config.micro_batch_documents])
        return scored

    def fit_whitening(self, *rollouts: Rollout) -> Float64[Tensor, "feature feature"]:
        """Estimate the pooled second moment from these rollouts' completions; whiten by it from now on.

        Returns the moment, so that every other replica can be given the same one.
        Raises: ValueError if there are fewer completions than dimensions: the directions never seen would be amplified;
        RuntimeError as `PooledWhitening.start`.
        """
        features = torch.cat([f.flatten(0, 1) for rollout in rollouts for f in self._model([rollout])[0]])
        count, dimensions = features.shape
        if count < dimensions:
            raise ValueError(
                f"pooled whitening of {dimensions} dimensions needs at least as many completions, {len(rollouts)} "
                f"documents gave {count}; set feature.whitening_documents to "
                f"{-(-dimensions * len(rollouts) // count)} or more, or learner.whitening='none'"
            )
        moment = second_moment(features)
        self.set_whitening(moment)
        return moment

    def set_whitening(self, moment: Float64[Tensor, "feature feature"]) -> None:
        """Whiten by this second moment from now on."""
        self._whitening.start(moment)

    def _score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        start = time.perf_counter()
        features = self._model(rollouts)
        scored = []
        for rollout, completions, ground_truth in zip(rollouts, *features, strict=True):
            try:
                scored.append(self._score_document(rollout, completions, ground_truth))
            except ValueError as error:
                raise ValueError(f"document {rollout.document.document_id!r}: {error}") from error
        seconds = (time.perf_counter() - start) / len(rollouts)
        return [replace(one, score_s=seconds) for one in scored]

    def _score_document(
        self,
        rollout: Rollout,
        completions: Float[Tensor, "group completion feature"],
        ground_truth: Float[Tensor, "group feature"],
    ) -> ScoredRollout:
        raw = _statistics(rollout, completions, ground_truth)
        whitened = self._whitening(completions, ground_truth)
        return ScoredRollout(
            rollout=rollout,
            raw=raw,
            whitened=None if whitened is None else _statistics(rollout, *whitened),
            score_s=0.0,
        )


def _statistics(
    rollout: Rollout,
    completions: Float[Tensor, "group completion feature"],
    ground_truth: Float[Tensor, "group feature"],
) -> GramStatistics:
    statistics = gram_statistics(completions, ground_truth)
    # Copies: arrays out of Ray's store are read-only, which torch does not support.
    ids, lengths = torch.tensor(rollout.completion_ids), torch.tensor(rollout.completion_lengths)
    return merge_duplicates(statistics, ids, lengths)
