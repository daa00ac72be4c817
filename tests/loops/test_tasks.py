"""How loops end: with the last one, by the first failure, and one owner's before the others."""

import asyncio

import pytest

from orchestration.tasks import Loops


async def run_forever(name: str, events: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        events.append(f"{name} cancelled")


async def yield_often(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def test_the_end_of_the_last_loop_is_the_end_of_all() -> None:
    events: list[str] = []

    async def last() -> None:
        await yield_often()
        events.append("last ends")

    async def scenario() -> None:
        loops = Loops()
        async with loops.running():
            loops.start("one", run_forever("one", events), run_forever("other of one", events))
            loops.start("two", run_forever("two", events))
            loops.start_last(last())

    asyncio.run(scenario())
    assert events == ["last ends", "one cancelled", "other of one cancelled", "two cancelled"]


def test_the_first_failure_ends_the_others_and_is_raised_alone() -> None:
    events: list[str] = []
    failure = ConnectionError("first")

    async def fail(error: Exception) -> None:
        await asyncio.sleep(0)
        raise error

    async def scenario() -> None:
        loops = Loops()
        async with loops.running():
            loops.start("one", run_forever("one", events))
            loops.start("two", fail(failure))
            loops.start("three", fail(ValueError("second")))
            loops.start_last(run_forever("last", events))

    with pytest.raises(ConnectionError) as caught:
        asyncio.run(scenario())
    assert caught.value is failure
    assert sorted(events) == ["last cancelled", "one cancelled"]


@pytest.mark.parametrize("busy", [True, False])
def test_one_that_leaves_hands_on_what_it_has_and_waits_for_nothing_more(busy: bool) -> None:
    events: list[str] = []
    handed_over = asyncio.Event()

    async def work(loops: Loops) -> None:
        if not busy:
            with loops.holding_nothing("leaver"):
                await run_forever("wait for work", events)
        await handed_over.wait()
        events.append("handed on")

    async def leave(loops: Loops) -> None:
        await yield_often()
        ending = asyncio.create_task(loops.end("leaver"))
        await yield_often()
        assert ending.done() != busy
        handed_over.set()
        await ending
        events.append("left")

    async def scenario() -> None:
        loops = Loops()
        async with loops.running():
            loops.start_work("leaver", work(loops), run_forever("updates", events))
            loops.start("stayer", run_forever("stayer", events))
            loops.start_last(leave(loops))

    asyncio.run(scenario())
    first = "handed on" if busy else "wait for work cancelled"
    assert events == [first, "updates cancelled", "left", "stayer cancelled"]
