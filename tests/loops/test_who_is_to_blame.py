"""When several processes notice a failure, which one is named: ranks that wait for each other, the ends of a channel.

In virtual time, in which a grace of seconds is exact.
"""

import asyncio
from collections.abc import Awaitable

import pytest

from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.roles import publications, roles
from orchestration.simulator.virtual_time import run_in_virtual_time

NEVER_S = 1e6
BROKEN = RuntimeError("connection closed by peer")
OTHER = ValueError("checksum")
LEARNER_LOST = ProcessLost("learner 1", "learner 1 died")
WORKER_LOST = ProcessLost("rollout worker 0", "rollout worker 0 died")


async def after(seconds: float, outcome: object) -> object:
    await asyncio.sleep(seconds)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def seconds_until(result: Awaitable[object]) -> tuple[float, object]:
    """When it ended, and what it returned or raised; nothing is left running."""

    async def scenario() -> tuple[float, object]:
        loop = asyncio.get_running_loop()
        try:
            found = await result
        except (RuntimeError, ValueError) as error:
            found = error
        ended_at = loop.time()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ended_at, found

    return run_in_virtual_time(scenario())


GRACE_S = roles.GRACE_S

RANKS = [
    pytest.param([(1, "a"), (3, "b"), (2, "c")], (3, ["a", "b", "c"]), id="all end well"),
    pytest.param([(1, "a"), (2, LEARNER_LOST), (NEVER_S, "c")], (2, LEARNER_LOST), id="one is lost"),
    pytest.param([(1, BROKEN), (4, LEARNER_LOST)], (4, LEARNER_LOST), id="another raises first"),
    pytest.param([(1, BROKEN), (2, OTHER), (4, LEARNER_LOST)], (4, LEARNER_LOST), id="two others do"),
    pytest.param([(1, LEARNER_LOST), (1, BROKEN)], (1, LEARNER_LOST), id="at once"),
    pytest.param([(1, BROKEN), (1, LEARNER_LOST)], (1, LEARNER_LOST), id="at once, in the other order"),
    pytest.param([(1, BROKEN), (2, OTHER), (3, "c")], (3, BROKEN), id="none is lost"),
    pytest.param([(1, BROKEN), (NEVER_S, "b")], (1 + GRACE_S, BROKEN), id="none is lost and one hangs"),
    pytest.param([(1, BROKEN), (5 + GRACE_S, LEARNER_LOST)], (1 + GRACE_S, BROKEN), id="lost too late"),
    pytest.param([(2, BROKEN), (1, "b")], (2, BROKEN), id="one alone raises"),
]


@pytest.mark.parametrize(("calls", "expected"), RANKS)
def test_a_rank_that_is_lost_is_named_whoever_raised_first(
    calls: list[tuple[float, object]], expected: tuple[float, object]
) -> None:
    async def all_ranks() -> object:
        return await roles._all([after(*call) for call in calls])

    assert seconds_until(all_ranks()) == expected


SIDES = [
    pytest.param((2, "receipt"), (1, None), (2, "receipt"), id="both end well"),
    pytest.param((1, WORKER_LOST), (2, BROKEN), (2, WORKER_LOST), id="the worker is lost"),
    pytest.param((2, WORKER_LOST), (1, BROKEN), (2, WORKER_LOST), id="and the learner notices first"),
    pytest.param((1, WORKER_LOST), (NEVER_S, None), (1 + GRACE_S, WORKER_LOST), id="and the learner hangs"),
    pytest.param((1, BROKEN), (2, LEARNER_LOST), (2, LEARNER_LOST), id="the learner is lost"),
    pytest.param((NEVER_S, None), (1, LEARNER_LOST), (1 + GRACE_S, LEARNER_LOST), id="and the worker hangs"),
    pytest.param((1, WORKER_LOST), (2, LEARNER_LOST), (2, LEARNER_LOST), id="both are lost"),
]


@pytest.mark.parametrize(("receiving", "sending", "expected"), SIDES)
def test_of_a_transfer_the_learner_is_to_blame_only_if_it_is_lost(
    receiving: tuple[float, object], sending: tuple[float, object], expected: tuple[float, object]
) -> None:
    async def received() -> object:
        return await publications._received(after(*receiving), after(*sending), by="rollout worker 0")

    assert seconds_until(received()) == expected


@pytest.mark.parametrize(
    ("receiving", "sending", "cause", "ends_at"),
    [
        pytest.param((1, OTHER), (2, BROKEN), "checksum", 2, id="both raise"),
        pytest.param((2, OTHER), (1, BROKEN), "checksum", 2, id="both raise, the learner first"),
        pytest.param((NEVER_S, None), (1, BROKEN), "closed by peer", 1 + GRACE_S, id="the learner raises"),
        pytest.param((2, "receipt"), (1, BROKEN), "closed by peer", 2, id="the learner raises, the worker does not"),
        pytest.param((1, OTHER), (2, None), "checksum", 2, id="the worker raises"),
    ],
)
def test_of_a_transfer_that_fails_otherwise_the_worker_is_replaced(
    receiving: tuple[float, object], sending: tuple[float, object], cause: str, ends_at: float
) -> None:
    async def received() -> object:
        return await publications._received(after(*receiving), after(*sending), by="rollout worker 0")

    seconds, error = seconds_until(received())
    assert seconds == ends_at
    assert isinstance(error, ProcessFailure) and not isinstance(error, ProcessLost)
    assert error.process == "rollout worker 0" and cause in str(error)
