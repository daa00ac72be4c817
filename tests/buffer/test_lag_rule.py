"""The choice of the next batch against enumerations."""

import itertools
import random

import pytest

from orchestration.buffer.lag_rule import (
    Candidate,
    Demand,
    by_arrival,
    earliest_deadline,
    in_order,
    newest_enough,
    too_old,
)


def can_all_be_in_time(deadlines: list[int], *, next_step: int, per_step: int) -> bool:
    """By trying every order: is there one in which each is trained on by its deadline?"""
    return any(
        all(next_step + place // per_step <= due for place, due in enumerate(order))
        for order in itertools.permutations(deadlines)
    )


def random_case(draw: random.Random) -> tuple[Demand, list[Candidate]]:
    demand = Demand(
        step=draw.randrange(4), count=draw.randrange(1, 4), later=draw.randrange(1, 4), max_lag=draw.randrange(4)
    )
    versions = [draw.randrange(max(0, demand.step - demand.max_lag), demand.step + 1) for _ in range(draw.randrange(7))]
    arrivals = iter(draw.sample(range(20), len(versions)))
    return demand, [
        Candidate(i, version, next(arrivals) if draw.random() < 0.7 else None) for i, version in enumerate(versions)
    ]


def test_wait_takes_a_batch_exactly_when_all_others_can_still_be_in_time() -> None:
    draw, taken, waited = random.Random(0), 0, 0
    for _ in range(1500):
        demand, candidates = random_case(draw)
        arrived = [c for c in candidates if c.arrival is not None]
        possible = any(
            can_all_be_in_time(
                [c.version + demand.max_lag for c in candidates if c not in batch],
                next_step=demand.step + 1,
                per_step=demand.later,
            )
            for batch in itertools.combinations(arrived, demand.count)
        )
        batch = earliest_deadline(demand, candidates)
        assert (batch is not None) == possible, (demand, candidates)
        taken, waited = taken + possible, waited + (not possible)
        if batch is not None:
            left = [c.version + demand.max_lag for c in candidates if c.ticket_id not in batch]
            assert can_all_be_in_time(left, next_step=demand.step + 1, per_step=demand.later)
            assert all(candidates[i].arrival is not None for i in batch)
            assert len(set(batch)) == len(batch) == demand.count
    assert min(taken, waited) > 100


def test_wait_prefers_the_older_weights_and_then_the_first_to_arrive() -> None:
    candidates = [Candidate(0, 2, 0), Candidate(1, 1, 3), Candidate(2, 1, 1), Candidate(3, 2, 2)]
    assert earliest_deadline(Demand(step=2, count=3, later=3, max_lag=2), candidates) == [2, 1, 0]


def test_in_order_waits_for_the_next_tickets_and_for_no_other() -> None:
    demand = Demand(step=0, count=2, later=2, max_lag=3)
    assert in_order(demand, [Candidate(5, 0, 9), Candidate(4, 0, 10), Candidate(6, 0, None)]) == [4, 5]
    assert in_order(demand, [Candidate(5, 0, None), Candidate(4, 0, 10), Candidate(6, 0, 1)]) is None
    assert in_order(demand, [Candidate(4, 0, 1)]) is None


@pytest.mark.parametrize(("max_lag", "old"), [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (3, [])])
def test_too_old_are_those_that_lag_more_than_the_bound(max_lag: int, old: list[int]) -> None:
    """Versions 0, 1, 2, 3 at step 3; one that has not arrived may still turn out to be newer."""
    demand = Demand(step=3, count=1, later=1, max_lag=max_lag)
    candidates = [Candidate(v, v, 10 - v) for v in range(4)] + [Candidate(9, 0, None)]
    assert too_old(demand, candidates) == old
    newest_first = [3, 2, 1, 0]
    assert newest_enough(demand, candidates) == [next(v for v in newest_first if v not in old)]
    everyone = Demand(step=3, count=4 - len(old), later=1, max_lag=max_lag)
    assert newest_enough(everyone, candidates) == [v for v in newest_first if v not in old]
    assert newest_enough(Demand(step=3, count=5 - len(old), later=1, max_lag=max_lag), candidates) is None


def test_free_asks_for_arrival_alone() -> None:
    candidates = [Candidate(0, 0, 5), Candidate(1, 3, 2), Candidate(2, 3, None)]
    assert by_arrival(Demand(step=9, count=2, later=2, max_lag=0), candidates) == [1, 0]
    assert by_arrival(Demand(step=9, count=3, later=3, max_lag=0), candidates) is None
