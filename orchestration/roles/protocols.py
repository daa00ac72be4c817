"""What the loops ask of each role: roles.py answers with processes, the simulator and tests with others."""

from collections.abc import Sequence
from typing import NoReturn, Protocol, TypeVar

from actors.rollout import RolloutSummary, Ticket
from orchestration.buffer.uses import Use
from orchestration.roles.weight_sync import Receiver, Weights_contra

Sampled = TypeVar("Sampled")
"""A rollout, or a reference to one: never opened by the loops."""
Scored = TypeVar("Scored")
"""Likewise, of what the learner takes."""
Sampled_co = TypeVar("Sampled_co", covariant=True)
Sampled_contra = TypeVar("Sampled_contra", contravariant=True)
Scored_co = TypeVar("Scored_co", covariant=True)


class Member(Protocol):
    """Any process that has work."""

    @property
    def name(self) -> str:
        """As its failures name it."""
        ...

    @property
    def num_done(self) -> int:
        """Requests that it has finished."""
        ...

    async def lost(self) -> NoReturn:
        """Waits as long as the process lives and answers. Raises: ProcessFailure."""
        ...


class Worker(Member, Receiver[Weights_contra], Protocol[Weights_contra, Sampled_co]):
    """A rollout worker: roles.RolloutRole."""

    async def sample(self, tickets: Sequence[Ticket]) -> Sequence[tuple[RolloutSummary, Sampled_co]]:
        """One rollout for each ticket. Raises: ProcessFailure."""
        ...


class ScoreSummary(Protocol):
    """What the loops see of a scored rollout."""

    @property
    def score_s(self) -> float:
        """Time it took [s]."""
        ...


class Scorer(Member, Protocol[Sampled_contra, Scored_co]):
    """Turns rollouts into what the learner takes: roles.ScorerRole."""

    async def score(self, rollouts: Sequence[Sampled_contra]) -> Sequence[tuple[ScoreSummary, Scored_co]]:
        """One result for each rollout. Raises: ProcessFailure."""
        ...


class Learner(Protocol[Scored]):
    """The learner: roles.LearnerRole."""

    async def train_step(self, batch: Sequence[Use[Scored]]) -> dict[str, float]:
        """One optimizer step; its metrics. Raises: FloatingPointError if it cannot be applied; it is not, then."""
        ...

    async def lost(self) -> NoReturn:
        """Waits as long as all of its processes live and answer. Raises: ProcessFailure."""
        ...

    def close_channel(self, worker: str) -> None:
        """This worker has left."""
