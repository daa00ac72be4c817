"""Where the decisions of a run come from: its own timing, which it logs, or the log of an earlier run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from actors.data.documents import DocumentStream
from actors.rollout import Document
from actors.weights.manifest import WeightManifest
from orchestration.buffer.event_log import (
    Recording,
    header,
    published,
    read_recording,
    require_same_configuration,
    require_same_weights,
)
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.config import RunConfig

Payload = TypeVar("Payload")

logger = logging.getLogger(__name__)


def recording_of(config: RunConfig) -> Recording | None:
    """The run that `config.replay` names; None: this run decides for itself.

    Raises: ValueError or OSError if there is no such log, or if it is of another configuration.
    """
    if config.replay is None:
        return None
    recording = read_recording(Path(config.replay))
    require_same_configuration(recording, config)
    return recording


class EventLog(Protocol):
    """Where the rows of a log go."""

    def write(self, row: Mapping[str, object]) -> None:
        """Take one row."""


class Publication(Protocol):
    """Weights of one version, made available."""

    @property
    def manifest(self) -> WeightManifest:
        """What they are."""
        ...


class Schedule:
    """Makes the buffer, and records (or compares) what a replay needs."""

    def __init__(
        self, config: RunConfig, recording: Recording | None, events: EventLog, *, continues: bool = False
    ) -> None:
        """`continues`: the log has its first row already."""
        self._config, self._recording, self._events = config, recording, events
        if not continues:
            events.write(header(config))

    @property
    def names_versions(self) -> bool:
        """Tickets name the weights that sample them, so that workers must be sent no others."""
        return self._recording is not None or self._config.asynchrony.mode == "exact"

    @property
    def position(self) -> int:
        """Documents that the buffer took from the data, since the start."""
        return self._stream.position

    def buffer(
        self, documents: Sequence[Document], *, position: int = 0
    ) -> RolloutBuffer[Payload] | ReplayBuffer[Payload]:
        """Admission and order for these training documents; `position`: of the first to be taken."""
        config, asynchrony = self._config, self._config.asynchrony
        if self._recording is not None:
            return ReplayBuffer(
                self._recording,
                documents,
                num_steps=config.learner.num_steps,
                completions_per_context=config.rollout.completions_per_context,
                seed=config.seed,
                record=self._events.write,
            )
        if asynchrony.rule == "drop":
            logger.warning(
                "asynchrony.lag_rule='drop' trains on what arrives in time: completions that take longer, such as long "
                "ones, are trained on less often than they are sampled; `in_order` and `wait` leave none out"
            )
        pool = ReusePool(
            documents_per_step=config.learner.documents_per_step,
            max_uses=asynchrony.max_uses,
            max_reuse_lag=asynchrony.max_reuse_lag,
            order=asynchrony.reuse_order,
            seed=config.seed,
        )
        self._stream = DocumentStream(documents, seed=config.seed, position=position)
        return RolloutBuffer(
            self._stream.take,
            pool=pool,
            num_steps=config.learner.num_steps,
            lag_rule=asynchrony.rule,
            max_lag=asynchrony.max_lag,
            prefetch_steps=asynchrony.effective_prefetch_steps,
            completions_per_context=config.rollout.completions_per_context,
            seed=config.seed,
            record=self._events.write,
        )

    def published(self, publication: Publication) -> None:
        """Note the weights' digest; a replay compares it.

        Raises: RuntimeError if a replay computed other weights than the run it repeats.
        """
        manifest = publication.manifest
        self._events.write(published(manifest.policy_version, manifest.digest))
        if self._recording is not None:
            require_same_weights(self._recording, manifest.policy_version, manifest.digest)
