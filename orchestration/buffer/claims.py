"""Requests that are being sampled and scored, those that came back from a process that failed, and their failures.

Life of a request: OUT (hand_out) -> its tickets ARRIVE, or BACK (give_back) -> OUT again, with the same tickets and
seeds. A request whose documents failed once goes out as it was, so that its rollouts are the same; after the next
failure each of its tickets goes out alone, so that one bad document takes no other with it. A document that failed
MAX_FAILURES times is set aside: its ticket goes out with another document, in the same place of the order and with the
same demands on the weights, so neither lag rule nor admission sees a difference.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from actors.rollout import Ticket

MAX_FAILURES = 3
"""Times that a document may fail, be it with or without a fault of its own, before it is set aside."""


@dataclass(frozen=True, slots=True)
class Request:
    """Tickets that are sampled together."""

    number: int
    tickets: list[Ticket]


class Claims:
    """Who is out and who came back."""

    def __init__(self) -> None:
        self.num_requests = 0
        """Requests since the start."""
        self.failures: Counter[str] = Counter()
        """Document -> its failures; one that arrives is forgotten."""
        self._out: dict[int, tuple[Ticket, int]] = {}
        self._back: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._out)

    @property
    def has_back(self) -> bool:
        """A request waits to go out again."""
        return bool(self._back)

    @property
    def tickets(self) -> list[Ticket]:
        """All that have not arrived, those that came back too."""
        return [ticket for ticket, _ in self._out.values()]

    @property
    def requests(self) -> list[Request]:
        """The same by request, in the order in which they first went out."""
        by_number: dict[int, list[Ticket]] = {}
        for ticket, number in sorted(self._out.values(), key=lambda claim: (claim[1], claim[0].ticket_id)):
            by_number.setdefault(number, []).append(ticket)
        return [Request(number, tickets) for number, tickets in by_number.items()]

    def hand_out(self, tickets: list[Ticket]) -> Request:
        """A new request goes out."""
        request = self._new(tickets)
        self._note(request)
        return request

    def hand_out_again(self) -> Request:
        """The next that came back."""
        return self._back.popleft()

    def arrive(self, ticket: Ticket) -> int:
        """It was sampled and scored; returns the number of its request. Raises: KeyError if it is not out."""
        _, number = self._out.pop(ticket.ticket_id)
        self.failures.pop(ticket.document.document_id, None)
        return number

    def failing_too_often(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """The process that held these tickets failed: count that, and return those that are to be set aside."""
        self.failures.update(ticket.document.document_id for ticket in tickets)
        return [t for t in tickets if self.failures[t.document.document_id] >= MAX_FAILURES]

    def give_back(self, tickets: Sequence[Ticket]) -> None:
        """They go out again before any new one: together, or each alone if one of them failed before."""
        if any(self.failures[ticket.document.document_id] > 1 for ticket in tickets):
            for ticket in tickets:
                self._go_alone(ticket)
        elif tickets:
            _, number = self._out[tickets[0].ticket_id]
            self._back.append(Request(number, list(tickets)))

    def replace(self, failed: Ticket, ticket: Ticket) -> None:
        """This one goes out in the place of one whose document failed."""
        self.failures.pop(failed.document.document_id, None)
        self._go_alone(ticket)

    def restore(self, requests: Sequence[Request], *, num_requests: int, failures: dict[str, int]) -> None:
        """As another one was: all of its requests wait to go out again."""
        self.num_requests, self.failures = num_requests, Counter(failures)
        for request in requests:
            self._note(request)
            self._back.append(request)

    def _go_alone(self, ticket: Ticket) -> None:
        request = self._new([ticket])
        self._note(request)
        self._back.append(request)

    def _new(self, tickets: list[Ticket]) -> Request:
        request = Request(self.num_requests, tickets)
        self.num_requests += 1
        return request

    def _note(self, request: Request) -> None:
        self._out |= {ticket.ticket_id: (ticket, request.number) for ticket in request.tickets}
