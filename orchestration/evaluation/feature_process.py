"""A feature server in a process of its own, as a run has it, for an evaluation that has an engine in its process.

Where vLLM runs a model by its transformers backend, it changes the model's class for the whole process: the class then
expects an engine's configuration when it is built, and what it computes is the engine's.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

from actors.config import Dtype
from actors.rollout import Rollout
from feature_server.config import FeatureConfig
from feature_server.features.server import FeatureServer
from feature_server.scored_rollout import ScoredRollout

_servers: list[FeatureServer] = []
"""In the other process: the one that it holds."""


class FeatureProcess:
    """Scores as `FeatureServer` does; use it as a context manager, at whose end the process ends."""

    def __init__(self, *, model: str, policy: str, config: FeatureConfig, dtype: Dtype, max_tokens: int) -> None:
        """Start the process and load the network. `max_tokens`: of the longest context and completion together.

        Raises: what FeatureServer raises; RuntimeError if the process ended.
        """
        # Spawned: a fork would have the engine's threads and the classes that it changed.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self._pool.submit(_load, model, policy, config, dtype, max_tokens).result()
        except BaseException:
            self._pool.shutdown()
            raise

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Gram statistics of each rollout, in order.

        Raises: as FeatureServer.score; RuntimeError if the process ended.
        """
        return self._pool.submit(_score, list(rollouts)).result()

    def __enter__(self) -> "FeatureProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _load(model: str, policy: str, config: FeatureConfig, dtype: Dtype, max_tokens: int) -> None:
    _servers.append(FeatureServer(model=model, policy=policy, config=config, dtype=dtype, max_tokens=max_tokens))


def _score(rollouts: list[Rollout]) -> list[ScoredRollout]:
    return _servers[0].score(rollouts)
