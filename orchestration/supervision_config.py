"""Settings of what a run does about failures, and of what it keeps to go on from."""

import math
from dataclasses import dataclass

from pydantic import Field

from actors.config import Settings


@dataclass(frozen=True, slots=True)
class Chaos:
    """A schedule of faults."""

    seed: int
    faults_per_minute: float


def parse_chaos(text: str) -> Chaos:
    """`SEED` or `SEED:RATE`. Raises: ValueError with the rule."""
    seed, colon, rate = text.partition(":")
    try:
        chaos = Chaos(int(seed), float(rate) if colon else 1.0)
    except ValueError:
        chaos = Chaos(-1, 0.0)
    if chaos.seed < 0 or not 0 < chaos.faults_per_minute < math.inf:
        raise ValueError(
            f"chaos={text!r} must be SEED or SEED:RATE, a whole number from 0 and faults per minute, as in 7:2.5"
        )
    return chaos


class CheckpointConfig(Settings):
    """What a run can be resumed from: everything it needs to go on as if it had not stopped."""

    every_steps: int = Field(50, ge=0)
    """Learner steps between two checkpoints, written beside training; 0: only when the run is stopped."""
    keep: int = Field(2, gt=0)
    """How many of the last ones are kept, beside the one with the best evaluation."""
    hugging_face: bool = False
    """True: each checkpoint also holds the weights as an ordinary Hugging Face folder, `model`."""


class RecoveryConfig(Settings):
    """How often what failed is started again."""

    max_replacements: int = Field(20, ge=0)
    """Processes of one role (rollout workers, feature servers, verifier servers) that are replaced within an hour; the
    more of them there are, the more may fail."""
    max_learner_restarts: int = Field(3, ge=0)
    """Times that the learner is restarted from one and the same checkpoint, within one job."""
