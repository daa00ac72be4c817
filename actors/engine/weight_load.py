"""One set of new weights on its way into an engine: installed between two steps, then checked with probe texts.

Lifecycle: waiting -> `install_into` -> its probes are sampled -> `check` -> checked, with or without a failure.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from actors.engine.request_batch import Engine, EngineRequest, Output
from actors.weights.manifest import ProbeError, WeightMismatchError


@dataclass(slots=True, kw_only=True, eq=False)
class WeightLoad(Generic[Output]):
    """Weights whose checksums agree; the holder of the engine lock records here what became of them."""

    policy_version: int
    install: Callable[[], object]
    """Puts them into the engine; called between two steps."""
    probes: Sequence[EngineRequest]
    """Texts that the engine scores with the new weights."""
    probe_error_of: Callable[[list[Output]], ProbeError]
    """From the finished probes to their error. Raises: WeightMismatchError where it is too large."""
    pause_s: float = field(init=False)
    """Time in which the engine could not step: weights and caches [s]."""
    probe_s: float = field(init=False)
    """From there to the result of the check [s]; running requests share these steps."""
    probe_error: ProbeError = field(init=False)
    """What `probe_error_of` returned."""
    failure: WeightMismatchError | None = None
    """What `probe_error_of` raised."""
    is_checked: bool = False
    """Whether the check is done and known to the other thread; set under the condition of the engine lock."""
    _installed_at: float = field(init=False)
    """On the clock of time.perf_counter [s]."""

    def __post_init__(self) -> None:
        if not self.probes:
            raise ValueError(
                f"weights of version {self.policy_version} came without probe texts, so there is no way to check that "
                "the engine computes with them; publish at least one text"
            )

    def install_into(self, engine: Engine[Output]) -> None:
        """Replace the weights and forget what the old ones computed: cached prefixes, and keys and values in use.

        Requests in the middle of their completions recompute theirs at the next step, from all their tokens so far.

        Raises: WeightMismatchError if the engine keeps its prefix cache.
        """
        start = time.perf_counter()
        self.install()
        if not engine.reset_prefix_cache(reset_running_requests=True):
            raise WeightMismatchError(
                f"after loading version {self.policy_version} the engine refused to drop its prefix cache, which holds "
                "keys and values of the old weights; is another thread stepping it?"
            )
        engine.set_weight_version(str(self.policy_version))
        self._installed_at = time.perf_counter()
        self.pause_s = self._installed_at - start

    def check(self, probe_outputs: list[Output]) -> None:
        """Compare the finished probes with the learner's; an error beyond the tolerance is kept in `failure`."""
        try:
            self.probe_error = self.probe_error_of(probe_outputs)
        except WeightMismatchError as error:
            self.failure = error
        self.probe_s = time.perf_counter() - self._installed_at
