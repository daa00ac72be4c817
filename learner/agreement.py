"""The check that stays on in a run: at lag 0, learner and engine give a token the same probability, but for rounding.

The first step trains on version 0 alone, so it is judged before any update; later steps whenever a batch holds tokens
of the learner's present weights. These are sampled tokens of whole documents, in packed rows and in training mode: what
the probe texts of a weight update, short and plain, do not see.
"""

from actors.config import Dtype
from actors.weights.manifest import WeightMismatchError
from actors.weights.tolerance import FACTOR, FLOOR, allowed_at_start

MIN_TOKENS = 64
"""The mean of fewer says little: until there are as many, FACTOR times as much is allowed."""


class Agreement:
    """Judges the mean |log p_learner - log p_engine| at lag 0 [nats] of every MIN_TOKENS tokens or more.

    The mean alone: the largest difference of many thousand tokens grows with their number, and in a mixture of experts
    with every token that rounding sends to another expert.
    """

    def __init__(self, *, dtype: Dtype, temperature: float, configured: float | None, model_type: str) -> None:
        """`configured`: rollout.probe_tolerance [nats]. The temperature divides logits, so their rounding too."""
        self._allowed = allowed_at_start(dtype, configured).mean / min(1.0, temperature)
        self._floor, self._model_type = FLOOR[dtype].mean / min(1.0, temperature), model_type
        self._is_calibrated = False
        self._sum, self._count = 0.0, 0

    @property
    def memory(self) -> tuple[float, bool, float, int]:
        """What it has learned from the steps so far; set on another, that one judges as this would."""
        return self._allowed, self._is_calibrated, self._sum, self._count

    @memory.setter
    def memory(self, memory: tuple[float, bool, float, int]) -> None:
        self._allowed, self._is_calibrated, self._sum, self._count = memory

    def judge(self, total: float, count: int, *, step: int) -> None:
        """Add a step's differences, of which `total` is the sum [nats], to those of too few tokens before it.

        The first MIN_TOKENS that are judged make later limits stricter.
        Raises: WeightMismatchError, naming the model type, if the mean is beyond what is allowed.
        """
        self._sum, self._count = self._sum + total, self._count + count
        if not self._count:
            return
        mean, is_whole = self._sum / self._count, self._count >= MIN_TOKENS
        allowed = self._allowed if is_whole else FACTOR * self._allowed
        if not mean <= allowed:
            raise WeightMismatchError(
                f"step {step}: at equal weights the learner's log-probs of {self._count} sampled tokens differ from "
                f"the engine's by {mean:.3g} nats in the mean, allowed are {allowed:.3g} "
                "(rollout.probe_tolerance): they do not compute the same network. The step was not applied; train a "
                f"model of another type than {self._model_type!r}, or set model.dtype='float32' if it is rounding"
            )
        if is_whole and not self._is_calibrated:
            self._allowed, self._is_calibrated = min(self._allowed, max(self._floor, FACTOR * mean)), True
        if is_whole:
            self._sum, self._count = 0.0, 0
