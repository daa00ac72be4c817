"""Where the time of a rollout worker that joins a running job goes."""

from collections.abc import Callable, Sequence

from actors.rollout import Ticket


class JoinTimeline:
    """The stages of a worker between joining and the first training on a rollout of its own."""

    def __init__(self, clock: Callable[[], float], on_trained: Callable[[dict[str, float]], None]) -> None:
        self.ticket_ids: set[int] = set()
        """Tickets it has taken."""
        self._clock, self._on_trained = clock, on_trained
        self._last = clock()
        self._stages: dict[str, float] = {}

    def note(self, stage: str, tickets: Sequence[Ticket]) -> None:
        """A stage has ended; only the first time counts."""
        self.ticket_ids |= {ticket.ticket_id for ticket in tickets}
        if stage not in self._stages:
            now = self._clock()
            self._stages[stage], self._last = now - self._last, now

    def arrived(self) -> None:
        """The learner is about to train on one of its rollouts."""
        self.note("scoring and queue", ())
        self._on_trained(self._stages)
