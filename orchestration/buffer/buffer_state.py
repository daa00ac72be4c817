"""What a buffer holds and counts, as a checkpoint keeps it: plain data, without what the tickets brought."""

from dataclasses import dataclass

from actors.rollout import Document, Ticket
from orchestration.buffer.claims import Request


@dataclass(frozen=True, slots=True)
class ArrivedTicket:
    """A ticket that was sampled and scored."""

    ticket: Ticket
    version: int
    """Oldest weights that sampled it."""
    arrived_at: int
    """The published version then."""
    arrival: int
    """Its place among all that arrived."""


@dataclass(frozen=True, slots=True)
class PooledTicket:
    """One that was trained on and may be used again."""

    arrived: ArrivedTicket
    first_step: int
    num_uses: int
    max_uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """A RolloutBuffer between two steps."""

    step: int
    """Steps done, which is the published version too."""
    num_extra: int
    num_fills: int
    num_claimed: int
    num_issued: int
    num_trained: int
    num_arrived: int
    num_dropped: int
    num_failed: int
    num_expired: int
    num_requests: int
    failures: list[tuple[str, int]]
    """Of documents that have not failed too often yet."""
    set_aside: list[str]
    """Those that have."""
    returned: list[Document]
    requests: list[Request]
    """Claimed and not arrived."""
    arrived: list[ArrivedTicket]
    """Waiting for their first use."""
    pool: list[PooledTicket]
    """Waiting for another."""

    @property
    def all_arrived(self) -> list[ArrivedTicket]:
        """Those of `arrived`, then those of `pool`: the order of their payloads."""
        return self.arrived + [pooled.arrived for pooled in self.pool]
