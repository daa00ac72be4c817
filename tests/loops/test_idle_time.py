"""Idle seconds by reason, split at the ends of intervals."""

import pytest

from orchestration.idle_time import IdleTime


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_waits_count_in_the_interval_in_which_they_happen() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    clock.now = 1.0
    with idle.waiting("rollout/admission"):
        clock.now = 3.0
        with idle.waiting("rollout/admission"), idle.waiting("learner/batch"):
            clock.now = 4.0
        assert idle.flush() == ({"rollout/admission": 4.0, "learner/batch": 1.0}, 4.0)
        clock.now = 6.0
        assert idle.flush() == ({"rollout/admission": 2.0}, 2.0)
        clock.now = 6.5
    clock.now = 10.0
    assert idle.flush() == ({"rollout/admission": 0.5}, 4.0)
    assert idle.flush() == ({}, 0.0)


def test_a_wait_that_fails_still_counts() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    with pytest.raises(TimeoutError), idle.waiting("learner/batch"):
        clock.now = 2.0
        raise TimeoutError
    assert idle.flush() == ({"learner/batch": 2.0}, 2.0)
