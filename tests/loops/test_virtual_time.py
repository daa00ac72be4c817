"""The loop whose clock jumps: what happens in which order and when, without real waiting."""

import asyncio
import random

import pytest

from orchestration.simulator.virtual_time import StandstillError, VirtualTimeLoop, run_in_virtual_time

DAY_S = 24 * 3600.0


def now() -> float:
    return asyncio.get_running_loop().time()


def test_every_task_wakes_at_its_requested_time_and_in_that_order() -> None:
    """A month of waits in one test."""
    generator = random.Random(0)
    delays = [generator.uniform(0, 30 * DAY_S) for _ in range(200)]
    woken: list[tuple[float, int]] = []

    async def sleeper(number: int) -> None:
        await asyncio.sleep(delays[number])
        woken.append((now(), number))

    async def scenario() -> None:
        await asyncio.gather(*[sleeper(number) for number in range(len(delays))])

    run_in_virtual_time(scenario())
    assert [number for _, number in woken] == sorted(range(len(delays)), key=delays.__getitem__)
    assert [time for time, _ in woken] == pytest.approx(sorted(delays), rel=1e-12)


def test_waits_in_a_row_add_up() -> None:
    async def scenario() -> list[float]:
        times = [now()]
        for delay in (0.5, 0.0, 0.25, 2 * DAY_S):
            await asyncio.sleep(delay)
            times.append(now())
        return times

    assert run_in_virtual_time(scenario()) == [0.0, 0.5, 0.5, 0.75, 0.75 + 2 * DAY_S]


@pytest.mark.parametrize("years", [1, 40, 400])
def test_waits_of_years_end_too(years: int) -> None:
    async def scenario() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(years * 365 * DAY_S):
                await asyncio.Event().wait()
        await asyncio.sleep(1.0)
        return now()

    assert run_in_virtual_time(scenario()) == pytest.approx(years * 365 * DAY_S + 1.0, rel=1e-15)


def test_the_clock_stands_still_while_any_task_can_run() -> None:
    async def scenario() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return now()

    assert run_in_virtual_time(scenario()) == 0.0


@pytest.mark.parametrize(("answer_s", "ends_at"), [(9.0, 9.0), (11.0, 10.0)])
def test_a_timeout_ends_a_wait_at_its_own_time(answer_s: float, ends_at: float) -> None:
    async def scenario() -> tuple[bool, float]:
        try:
            async with asyncio.timeout(10.0):
                await asyncio.sleep(answer_s)
        except TimeoutError:
            return True, now()
        return False, now()

    assert run_in_virtual_time(scenario()) == (answer_s > 10, ends_at)


def test_a_timeout_ends_a_wait_for_an_event_that_never_comes() -> None:
    async def scenario() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * DAY_S):
                await asyncio.Event().wait()
        return now()

    assert run_in_virtual_time(scenario()) == 3 * DAY_S


def test_a_deadlock_is_an_error_and_leaves_no_task_behind() -> None:
    ended: list[str] = []

    async def wait_forever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def scenario() -> None:
        other = asyncio.create_task(wait_forever("other"))
        await asyncio.sleep(1.0)
        await wait_forever("main")
        await other

    with pytest.raises(StandstillError, match="every task waits for another"):
        run_in_virtual_time(scenario())
    assert sorted(ended) == ["main", "other"]


def test_two_runs_are_identical() -> None:
    def play() -> list[tuple[float, int]]:
        generator, events = random.Random(1), []

        async def walk(number: int) -> None:
            for _ in range(20):
                await asyncio.sleep(generator.choice((0.0, 1.0, 2.0)))
                events.append((now(), number))

        async def scenario() -> None:
            await asyncio.gather(*[walk(number) for number in range(5)])

        run_in_virtual_time(scenario())
        return events

    assert play() == play()


def test_results_and_errors_come_back() -> None:
    async def succeed() -> int:
        await asyncio.sleep(1)
        return 7

    async def fail() -> None:
        await asyncio.sleep(1)
        raise KeyError("from within")

    assert run_in_virtual_time(succeed()) == 7
    with pytest.raises(KeyError, match="from within"):
        run_in_virtual_time(fail())


def test_every_run_starts_at_0_on_a_loop_of_its_own() -> None:
    async def scenario() -> tuple[float, type]:
        start = now()
        await asyncio.sleep(5)
        return start, type(asyncio.get_running_loop())

    assert [run_in_virtual_time(scenario()) for _ in range(2)] == [(0.0, VirtualTimeLoop)] * 2
