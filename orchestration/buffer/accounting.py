"""Every ticket ends exactly once: an account of a run, by its buffer's counters or by its event log alone.

A ticket is issued with a document. That ends TRAINED (once or several times), DROPPED (stale on arrival) or FAILED
(its document set aside), or is PENDING: claimed or arrived when the log ends.

    issued = trained + failed + dropped + pending

A ticket whose document failed is issued again with another; a request that its process could not finish is claimed
again, but not issued again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
State = Literal["issued", "claimed", "arrived", "trained", "rejected", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """How many tickets went where."""

    issued: int
    trained: int
    failed: int
    dropped: int
    pending: int

    @property
    def is_balanced(self) -> bool:
        """Nothing is lost, and nothing counted twice."""
        return self.issued == self.trained + self.failed + self.dropped + self.pending

    def __str__(self) -> str:
        return (
            f"{self.issued} tickets issued = {self.trained} trained + {self.failed} failed + {self.dropped} dropped + "
            f"{self.pending} pending"
        )


def audit(rows: Iterable[Row]) -> Account:
    """The account of a run by the rows of its events.jsonl, in order.

    Raises: ValueError naming the first row that no life of a ticket allows: sampled without being claimed, trained on
    before it arrived or twice with one reuse index, a step out of turn.
    """
    ledger = _Ledger()
    for number, row in enumerate(rows, start=1):
        try:
            ledger.enter(row)
        except _OutOfTurn as error:
            raise ValueError(f"row {number} of the event log, {row['event']!r}: {error}") from error
    return ledger.account()


def require_balanced(counted: Account, logged: Account) -> None:
    """The buffer's counters and the event log tell the same, and nothing is lost. Raises: RuntimeError with both."""
    if not counted.is_balanced or counted != logged:
        raise RuntimeError(f"tickets do not add up: {counted}; by the event log: {logged}")


class _OutOfTurn(Exception):
    """No ticket may do this now."""


class _Ledger:
    """Where each ticket is, with the document that it has now."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._uses: Counter[int] = Counter()
        self._num_steps = self._num_failed = 0

    def enter(self, row: Row) -> None:
        match row["event"]:
            case "claimed":
                self._move_all(row["tickets"], {None, "issued", "claimed"}, "claimed")
            case "returned":
                self._move_all(row["tickets"], {"claimed"}, "claimed")
            case "sampled":
                self._move(row["ticket"], {"claimed"}, "arrived")
            case "dropped":
                self._move(row["ticket"], {"arrived"}, "dropped")
            case "failed":
                self._move(row["ticket"], {"claimed", "rejected"}, "issued")
                self._num_failed += 1
            case "trained":
                self._train(row)
            case "rejected":
                self._reject(row)

    def account(self) -> Account:
        counts = Counter(self._states.values())
        return Account(
            issued=len(self._states) + self._num_failed,
            trained=counts["trained"],
            failed=self._num_failed,
            dropped=counts["dropped"],
            pending=counts["issued"] + counts["claimed"] + counts["arrived"] + counts["rejected"],
        )

    def _move_all(self, tickets: Sequence[int], allowed: set[State | None], to: State) -> None:
        for ticket in tickets:
            self._move(ticket, allowed, to)

    def _move(self, ticket: int, allowed: set[State | None], to: State) -> None:
        state = self._states.get(ticket)
        if state not in allowed:
            raise _OutOfTurn(f"ticket {ticket} is {state or 'unknown'}")
        self._states[ticket] = to

    def _train(self, row: Row) -> None:
        if row["step"] != self._num_steps:
            raise _OutOfTurn(f"step {row['step']} after {self._num_steps} steps")
        self._num_steps += 1
        for ticket, reuse_index in zip(row["tickets"], row["reuse"], strict=True):
            if reuse_index != self._uses[ticket]:
                raise _OutOfTurn(f"use {reuse_index} of ticket {ticket} after {self._uses[ticket]} uses")
            self._uses[ticket] += 1
            self._move(ticket, {"arrived"} if reuse_index == 0 else {"trained"}, "trained")

    def _reject(self, row: Row) -> None:
        """Undo the step that was begun last."""
        self._num_steps -= 1
        for ticket in row["tickets"]:
            self._uses[ticket] -= 1
            if self._uses[ticket] == 0:
                self._move(ticket, {"trained"}, "rejected")
