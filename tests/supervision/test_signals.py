"""Real signals to real processes: what the first does, what the second does, and what is left as it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestration.supervision.signals import SIGNALS, StopSignals, stop_signals

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
HEAD = """
import asyncio, signal, sys, time
from orchestration.supervision.signals import SIGNALS, StoppedBySignal, stop_signals

for number in SIGNALS:  # whatever the tests themselves were started to ignore
    signal.signal(number, signal.SIG_DFL)

def say(*words):
    print(*words, flush=True)

def sleep():
    time.sleep(60)
    say("nothing came")
"""
NOTHING_TO_SAVE = """
try:
    with stop_signals() as signals:
        say("ready")
        sleep()
except StoppedBySignal as stop:
    say("stopped by", stop.number, "first", signals.received)
"""
ASKING = """
try:
    with stop_signals() as signals, signals.asking(lambda: say("asked")):
        say("ready")
        sleep()
except StoppedBySignal as stop:
    say("stopped by", stop.number, "first", signals.received)
"""
AFTER_ASKING = """
try:
    with stop_signals() as signals:
        with signals.asking(lambda: say("asked")):
            pass
        say("ready")
        sleep()
except StoppedBySignal as stop:
    say("stopped by", stop.number)
"""
TASKS = """
async def loop(name):
    try:
        while True:
            await asyncio.sleep(0.001)
    except asyncio.CancelledError:
        say("cancelled", name)
        raise

async def main():
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):
            group.create_task(loop(name))
        await asyncio.sleep(0.01)
        say("ready")

try:
    with stop_signals():
        asyncio.run(main())
        say("went on")
except StoppedBySignal as stop:
    say("stopped by", stop.number)
"""
BUSY_TASK = """
async def work():
    say("ready")
    while True:
        sum(range(100))

async def main():
    try:
        await asyncio.gather(work(), return_exceptions=True)
    finally:
        say("unwound")

try:
    with stop_signals():
        asyncio.run(main())
        say("went on")
except StoppedBySignal as stop:
    say("stopped by", stop.number)
"""
IN_A_LOOP = """
async def main(signals):
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    with signals.asking(lambda: loop.call_soon_threadsafe(stop.set)):
        say("ready")
        async with asyncio.timeout(60):
            await stop.wait()
    return "saved"

with stop_signals() as signals:
    say(asyncio.run(main(signals)), "after", signals.received)
"""
IGNORED = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
try:
    with stop_signals() as signals:
        signals.install()  # as after Ray has started
        say("ready")
        sleep()
except StoppedBySignal as stop:
    say("stopped by", stop.number, "ignores", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
"""


class Process:
    """A script in a process of its own, which says `ready` when a signal may come."""

    def __init__(self, script: str) -> None:
        command = [sys.executable, "-c", HEAD + script]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
        self.expect("ready")

    def expect(self, line: str) -> None:
        """Its next line."""
        assert self.process.stdout.readline().strip() == line

    def end(self) -> tuple[list[str], str]:
        """What it says until it has ended, and what it logs."""
        said, logged = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, logged
        return said.split("\n")[:-1], logged


@contextmanager
def running(script: str) -> Iterator[Process]:
    process = Process(script)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_with_nothing_to_save_the_first_signal_ends_the_run(number: signal.Signals) -> None:
    with running(NOTHING_TO_SAVE) as process:
        process.process.send_signal(number)
        said, logged = process.end()
    assert said == [f"stopped by {number.value} first {number.value}"]
    assert f"{number.name}: ending" in logged


@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_asks_once_and_the_second_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with running(ASKING) as process:
        process.process.send_signal(first)
        process.expect("asked")
        process.process.send_signal(second)
        said, logged = process.end()
    assert said == [f"stopped by {second.value} first {first.value}"]
    assert f"{first.name}: saving" in logged and f"{second.name}: ending at once" in logged


def test_outside_of_asking_the_first_signal_ends_the_run_again() -> None:
    with running(AFTER_ASKING) as process:
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == [f"stopped by {signal.SIGTERM.value}"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_event_loop_lets_it_pass_and_cancels_its_tasks(number: signal.Signals) -> None:
    with running(TASKS) as process:
        process.process.send_signal(number)
        said, _ = process.end()
    assert said[-1] == f"stopped by {number.value}"
    assert {"cancelled a", "cancelled b"} >= set(said[:-1]) and said[:-1]


def test_it_is_not_swallowed_by_a_task_whose_errors_are_collected() -> None:
    with running(BUSY_TASK) as process:
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == ["unwound", f"stopped by {signal.SIGTERM.value}"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_idle_event_loop_is_woken_by_what_is_asked(number: signal.Signals) -> None:
    with running(IN_A_LOOP) as process:
        process.process.send_signal(number)
        assert process.end()[0] == [f"saved after {number.value}"]


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    with running(IGNORED) as process:
        process.process.send_signal(signal.SIGHUP)
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == [f"stopped by {signal.SIGTERM.value} ignores True"]


def test_handlers_are_as_before_afterwards() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError("not while they are handled")

    kept = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        before = dict(zip(SIGNALS, (own, signal.SIG_DFL, signal.SIG_IGN), strict=True))
        for number, handler in before.items():
            signal.signal(number, handler)
        with pytest.raises(ValueError, match="an error inside"), stop_signals() as signals:
            signal.signal(signal.SIGTERM, own)  # as Ray does
            signals.install()
            first, second, third = [signal.getsignal(number) for number in SIGNALS]
            assert first == second and first not in before.values() and third is signal.SIG_IGN
            raise ValueError("an error inside")
        assert {number: signal.getsignal(number) for number in SIGNALS} == before
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_no_signal_has_been_received_at_first() -> None:
    assert StopSignals().received is None
