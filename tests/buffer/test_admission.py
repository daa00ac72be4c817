"""The counts of admission against lists with one entry for each ticket, and the bound on lag that follows from them."""

import itertools
import random
from collections.abc import Iterator

import pytest

from orchestration.buffer.admission import AdmissionPlan

SIZES = [(1, 1), (4, 4), (4, 2), (6, 2), (6, 3)]
"""Fresh rollouts of the first and of every later step."""


def make_plan(first: int, later: int, *, num_steps: int = 9, prefetch_steps: int = 1) -> AdmissionPlan:
    return AdmissionPlan(num_steps=num_steps, prefetch_steps=prefetch_steps, first_step=first, later_steps=later)


def steps_of_tickets(first: int, later: int, *, num_steps: int) -> list[int]:
    """The step of each ticket of the plan, in the order of their ids."""
    return [step for step in range(num_steps) for _ in range(later if step else first)]


def fresh_of(first: int, later: int, step: int) -> int:
    return later if step else first


def test_planned_counts_the_fresh() -> None:
    assert [make_plan(4, 2).planned(steps) for steps in (0, 1, 2, 5)] == [0, 4, 6, 12]


@pytest.mark.parametrize(("first", "later"), SIZES)
@pytest.mark.parametrize("prefetch_steps", [0, 1, 3, 20])
def test_admitted_are_the_tickets_of_the_steps_in_reach(prefetch_steps: int, first: int, later: int) -> None:
    plan = make_plan(first, later, prefetch_steps=prefetch_steps)
    tickets = steps_of_tickets(first, later, num_steps=9)
    for version in range(12):
        assert plan.admitted(version) == sum(step <= version + prefetch_steps for step in tickets)
        assert plan.replacing(3).admitted(version) == plan.admitted(version) + 3


@pytest.mark.parametrize(("first", "later"), SIZES)
@pytest.mark.parametrize("num_extra", [0, 1, 5])
def test_a_ticket_is_planned_for_the_step_that_it_completes(num_extra: int, first: int, later: int) -> None:
    plan = make_plan(first, later).replacing(num_extra)
    tickets = steps_of_tickets(first, later, num_steps=9)
    for place, step in enumerate(tickets):
        assert plan.step_of(place + num_extra) == step
        for count in range(1, len(tickets) - place):
            same = len(list(itertools.takewhile(step.__eq__, tickets[place : place + count])))
            assert plan.num_in_same_step(place + num_extra, count) == same


def test_a_wait_that_was_cancelled_and_repeated_admits_its_fills_once() -> None:
    waited = make_plan(4, 2).awaiting(3, 4)
    assert (waited.num_extra, waited.num_fills) == (2, 2)
    assert waited.awaiting(3, 4) == waited
    dropped_meanwhile = waited.replacing(1).awaiting(3, 4)
    assert (dropped_meanwhile.num_extra, dropped_meanwhile.num_fills) == (3, 2)
    taken = waited.batch_taken()
    assert (taken.num_extra, taken.num_fills) == (2, 0)
    assert taken.awaiting(4, 2) == taken, "a step that takes what was planned"
    assert taken.awaiting(4, 3).num_extra == 3, "fills of a later step come on top"


def histories(seed: int) -> Iterator[tuple[AdmissionPlan, int, int, int]]:
    """(plan, version, tickets trained on or dropped, step) at every moment of a run with drops, expiries and waits that
    are begun up to three times."""
    draw = random.Random(seed)
    first, later = draw.choice(SIZES)
    plan = make_plan(first, later, prefetch_steps=draw.randrange(4))
    gone = 0
    for step in range(plan.num_steps):
        expired = draw.choice((0, 0, 1, later)) if step else 0
        for _ in range(draw.randrange(1, 4)):
            plan = plan.awaiting(step, fresh_of(first, later, step) + expired)
            yield plan, step, gone, step
        dropped = draw.choice((0, 0, 2))
        plan, gone = plan.replacing(dropped), gone + dropped
        yield plan, step, gone, step
        plan, gone = plan.batch_taken(), gone + fresh_of(first, later, step) + expired
        yield plan, step, gone, step + 1


@pytest.mark.parametrize("seed", range(20))
def test_between_two_steps_the_alive_are_the_planned_of_the_steps_ahead(seed: int) -> None:
    for plan, version, gone, step in histories(seed):
        if step == version:  # published, and not trained on yet
            ahead = range(step, min(step + 1 + plan.prefetch_steps, plan.num_steps))
            of_plan = sum(fresh_of(plan.first_step, plan.later_steps, s) for s in ahead)
            assert plan.admitted(version) - gone == of_plan + plan.num_fills
        else:  # the batch is taken: what is left are whole steps, and no fill
            ahead = range(step, min(step + plan.prefetch_steps, plan.num_steps))
            assert plan.admitted(version) - gone == plan.later_steps * len(ahead)


@pytest.mark.parametrize("seed", range(20))
def test_admission_never_closes_again(seed: int) -> None:
    admitted = [plan.admitted(version) for plan, version, _, _ in histories(seed)]
    assert admitted == sorted(admitted)


@pytest.mark.parametrize("expiries", [(0,), (0, 0, 1, 2)])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_in_order_the_lag_is_at_most_the_prefetch(seed: int, eager: bool, expiries: tuple[int, ...]) -> None:
    """The proof of lag_rule.py by enumeration: the version at which each ticket is claimed, and the step it trains."""
    draw = random.Random(seed)
    first, later = draw.choice(SIZES)
    plan = make_plan(first, later, prefetch_steps=draw.randrange(4))
    claimed_at: list[int] = []
    lags: list[int] = []

    def claim(step: int, *, at_least: int) -> None:
        free = plan.admitted(step) - len(claimed_at)
        chosen = free if eager else draw.randrange(free + 1)
        for ticket_id in range(len(claimed_at), max(len(claimed_at) + chosen, at_least)):
            assert ticket_id < plan.admitted(step), "the learner waits for a ticket that may not be claimed"
            if plan.num_fills == 0:
                assert step <= plan.step_of(ticket_id) <= step + plan.prefetch_steps
            claimed_at.append(step)

    for step in range(plan.num_steps):
        claim(step, at_least=0)
        num_fresh = fresh_of(first, later, step) + (draw.choice(expiries) if step else 0)
        plan = plan.awaiting(step, num_fresh)
        claim(step, at_least=len(lags) + num_fresh)
        lags += [step - version for version in claimed_at[len(lags) : len(lags) + num_fresh]]
        plan = plan.batch_taken()
    assert max(lags) <= plan.prefetch_steps
    assert max(lags) == plan.prefetch_steps or not eager or expiries != (0,), "the bound is tight"
