"""Which scored rollouts the learner takes next: five treatments of lag, as pure functions of the candidates.

The lag of a rollout at its first use is s - u: s steps were done when it is trained on, u when the oldest weights that
sampled it were published. Admission (admission.py) is the same for all: with L = max_lag, A = prefetch_steps <= L and
planned(t) fresh rollouts needed by the first t steps, a ticket may be claimed only while

    num_claimed < admitted(v) = planned(v + 1 + A) + num_extra,        v the published version,

where num_extra counts what comes on top of the plan: replacements of dropped rollouts, and fills for reusable ones that
expired. A ticket claimed at v demands u >= v. With `in_order` one that is planned for a step t, no fill, demands
u >= t - L instead, and in mode exact u = max(0, t - L).

`in_order` (modes bounded/in_order and exact). The n-th ticket claimed is the n-th trained on. Take one that is trained
in step s: at least planned(s) + e were claimed before it, with e the num_extra of the steps before s. If it was claimed
before the learner waited for step s, num_extra was e at most, so that it is planned for a step t >= s: s - u <= L. It
was admitted, so t <= v + A <= v + L: weights as new as it demands were published. If it was claimed during that wait,
v = s.

`earliest_deadline` (bounded/wait). Rollouts may overtake each other. A rollout's deadline is step u + L. A batch is
taken only if what stays can still meet its deadlines: for every j >= 1, at most j * F of those left have deadlines up
to s + j, with at least F fresh rollouts per step. Deadlines up to s are then in the batch, so no lag exceeds L. Such a
batch exists once all have arrived: of those left by step s - 1 at most (j + 1) * F have deadlines up to s + j;
tickets claimed since then have deadlines from s + L on, and with them the batch of step s leaves at most A * F,
that is L * F. So the learner waits for late rollouts, and only for those.

`newest_enough` (bounded/drop). In order of arrival, among those with s - u <= L. Older ones are dropped and counted,
and their documents sampled again; drops cannot starve the learner, because replacements are sampled at u >= s.

`by_arrival` (free). In order of arrival, whatever their lag: nothing but admission bounds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rule knows about a ticket that was claimed and not yet trained on."""

    ticket_id: int
    version: int
    """Oldest weights that sampled it; until it has arrived, the oldest that may."""
    arrival: int | None
    """Its place among all rollouts that arrived, scored; None: it has not arrived."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the learner wants for its next step."""

    step: int
    """Steps done: the learner's version."""
    count: int
    """Fresh rollouts it needs now."""
    later: int
    """Fresh rollouts that every later step needs at least."""
    max_lag: int


LagRule = Callable[[Demand, Sequence[Candidate]], list[int] | None]
"""Ticket ids of the next batch, or None if it has to wait."""


def in_order(demand: Demand, candidates: Sequence[Candidate]) -> list[int] | None:
    """The lowest ticket ids, once they have all arrived."""
    first = sorted(candidates, key=lambda c: c.ticket_id)[: demand.count]
    complete = len(first) == demand.count and all(c.arrival is not None for c in first)
    return [c.ticket_id for c in first] if complete else None


def earliest_deadline(demand: Demand, candidates: Sequence[Candidate]) -> list[int] | None:
    """Of those that arrived the ones that are due first, if the others can still be trained on in time."""
    arrived = sorted(_arrived(candidates), key=lambda c: (c.version, _arrival(c)))
    batch = [c.ticket_id for c in arrived[: demand.count]]
    if len(batch) < demand.count:
        return None
    left = sorted(c.version + demand.max_lag for c in candidates if c.ticket_id not in batch)
    # The i-th of those left must be trained on among the first i of them.
    steps_needed = (index // demand.later + 1 for index in range(len(left)))
    in_time = all(demand.step + steps <= due for steps, due in zip(steps_needed, left, strict=True))
    return batch if in_time else None


def newest_enough(demand: Demand, candidates: Sequence[Candidate]) -> list[int] | None:
    """The first to arrive among those within the bound."""
    fit = [c for c in candidates if c.version >= demand.step - demand.max_lag]
    return by_arrival(demand, fit)


def by_arrival(demand: Demand, candidates: Sequence[Candidate]) -> list[int] | None:
    """The first to arrive."""
    arrived = sorted(_arrived(candidates), key=_arrival)
    return [c.ticket_id for c in arrived[: demand.count]] if len(arrived) >= demand.count else None


def too_old(demand: Demand, candidates: Sequence[Candidate]) -> list[int]:
    """Ids of rollouts that arrived and can never be trained on within the bound."""
    return [c.ticket_id for c in _arrived(candidates) if c.version < demand.step - demand.max_lag]


def _arrived(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.arrival is not None]


def _arrival(candidate: Candidate) -> int:
    assert candidate.arrival is not None
    return candidate.arrival


LAG_RULES: dict[str, LagRule] = {
    "exact": in_order,
    "in_order": in_order,
    "wait": earliest_deadline,
    "drop": newest_enough,
    "free": by_arrival,
}
"""By `asynchrony.lag_rule`, or by `asynchrony.mode` where that is not `bounded`."""
