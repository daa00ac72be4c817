"""Which rollouts a run trains on, by the rule that its configuration names."""

import asyncio
import random
from collections.abc import Callable

import pytest
from arrivals import finish

from actors.rollout import Document
from orchestration.buffer.schedule import Schedule
from orchestration.config import RunConfig
from orchestration.simulator.virtual_time import run_in_virtual_time

MakeDocument = Callable[[int], Document]
NUM_STEPS, PER_STEP, WORKERS = 150, 4, 6


class NoEvents:
    def write(self, row: dict[str, object]) -> None:
        """Nobody replays."""


def config_of(lag_rule: str) -> RunConfig:
    learner = {"num_steps": NUM_STEPS, "documents_per_step": PER_STEP}
    return RunConfig.model_validate({"learner": learner, "asynchrony": {"lag_rule": lag_rule, "max_lag": 1}})


async def trained_and_sampled(lag_rule: str, make_document: MakeDocument) -> tuple[float, float]:
    """Shares of long completions; whether one is long is a coin of its own, and it takes four times as long."""
    buffer = Schedule(config_of(lag_rule), None, NoEvents()).buffer([make_document(index) for index in range(8)])
    coin, version, sampled, trained = random.Random(0), 0, [], []

    async def sample() -> None:
        while tickets := await buffer.claim(1):
            long, began_at = coin.random() < 0.5, version
            await asyncio.sleep(4.0 if long else 1.0)
            sampled.append(long)
            await finish(buffer, tickets[0], long, version=began_at, weight_steps=((0, began_at),))

    workers = [asyncio.create_task(sample()) for _ in range(WORKERS)]
    for step in range(1, NUM_STEPS + 1):
        trained += [use.payload for use in await buffer.take()]
        await asyncio.sleep(1.0)
        version = step
        await buffer.advance(step)
    await asyncio.gather(*workers)
    return sum(trained) / len(trained), sum(sampled) / len(sampled)


@pytest.mark.parametrize("lag_rule", ["in_order", "wait"])
def test_rules_that_wait_train_on_all_that_was_sampled(lag_rule: str, make_document: MakeDocument) -> None:
    trained, sampled = run_in_virtual_time(trained_and_sampled(lag_rule, make_document))
    assert trained == pytest.approx(sampled, abs=0.01)
    assert sampled == pytest.approx(0.5, abs=0.05)


def test_drop_trains_less_often_on_what_takes_longer(make_document: MakeDocument) -> None:
    trained, sampled = run_in_virtual_time(trained_and_sampled("drop", make_document))
    assert sampled == pytest.approx(0.5, abs=0.05)
    assert trained < sampled - 0.1


@pytest.mark.parametrize(("lag_rule", "times"), [("in_order", 0), ("wait", 0), ("drop", 1)])
def test_drop_says_once_that_it_selects_by_latency(
    lag_rule: str, times: int, make_document: MakeDocument, caplog: pytest.LogCaptureFixture
) -> None:
    Schedule(config_of(lag_rule), None, NoEvents()).buffer([make_document(0)])
    assert caplog.text.count("are trained on less often than they are sampled") == times
