"""How often simulated processes fail, and what it takes until others have taken their place."""

import math
from dataclasses import dataclass, replace

from orchestration.simulator.stage_times import uniform

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """A fault ends its process at a random moment, whether it has work or not: times between faults are exponential.

    With r faults per minute a process fails within a minute with probability 1 - exp(-r).
    """

    workers_per_minute: float = 0.0
    """Of one rollout worker that is up."""
    scorers_per_minute: float = 0.0
    """Of one feature or verifier server that is up."""
    learner_per_minute: float = 0.0
    """Of the learner, all ranks together."""
    restart_s: float = 0.0
    """From the end of a worker or server until another is up in its place; a worker then fetches weights."""
    learner_restart_s: float = 0.0
    """From the end of the learner until the run goes on from its last checkpoint, with every process up."""
    checkpoint_steps: int = 1
    """Learner steps between two checkpoints. What was done since the last one is done again."""

    @property
    def kinds(self) -> dict[str, "Faults"]:
        """Those of each role that fails, alone."""
        none = replace(self, workers_per_minute=0.0, scorers_per_minute=0.0, learner_per_minute=0.0)
        alone = {
            "rollout workers": replace(none, workers_per_minute=self.workers_per_minute),
            "scorers": replace(none, scorers_per_minute=self.scorers_per_minute),
            "learner": replace(none, learner_per_minute=self.learner_per_minute),
        }
        return {role: faults for role, faults in alone.items() if faults != none}


NO_FAULTS = Faults()


def lifetime_s(per_minute: float, *key: object) -> float:
    """Seconds until a process fails, drawn from an exponential distribution; equal keys give equal seconds."""
    return -math.log(uniform("lifetime", *key)) * MINUTE_S / per_minute if per_minute > 0 else math.inf
