"""What the control actor takes, and whom a command means."""

import asyncio
import re
import socket
from dataclasses import dataclass

import pytest

from orchestration.cluster.control import (
    Answer,
    ControlActor,
    ScaleRequest,
    chosen_run,
    control_name,
    reason_to_refuse,
)


@dataclass
class Foreign:
    """As a request, but of another class."""

    rollout_workers: object = 2
    feature_servers: object = None


def forged(**values: object) -> ScaleRequest:
    """As it would be unpickled, without its constructor."""
    request = object.__new__(ScaleRequest)
    for name, value in values.items():
        object.__setattr__(request, name, value)
    return request


MALFORMED = [
    (None, "got NoneType"),
    ("2", "got str"),
    ({"rollout_workers": 2}, "got dict"),
    (Foreign(), "got Foreign"),
    (forged(rollout_workers="2", feature_servers=None), "rollout_workers='2' must be a whole number"),
    (forged(rollout_workers=None, feature_servers=1.5), "feature_servers=1.5 must be a whole number"),
    (forged(rollout_workers=True, feature_servers=None), "rollout_workers=True must be a whole number"),
    (forged(rollout_workers=[1], feature_servers=None), r"rollout_workers=\[1\] must be"),
    (forged(feature_servers=float("nan")), "feature_servers=nan must be"),
]


@pytest.mark.parametrize(("request_", "reason"), MALFORMED)
def test_what_is_no_request_is_refused_where_it_arrives(request_: object, reason: str) -> None:
    """The driver, which takes requests meanwhile, does not see it, and gets the next one."""

    async def play() -> tuple[Answer, Answer, ScaleRequest]:
        actor = ControlActor()
        taken = asyncio.create_task(actor.next_request())
        refused = await actor.submit(request_)
        assert not taken.done()
        good = asyncio.create_task(actor.submit(ScaleRequest(rollout_workers=2)))
        request = await taken
        await actor.answer(Answer(True, "done"))
        return refused, await good, request

    refused, good, request = asyncio.run(play())
    assert not refused.accepted
    assert reason_to_refuse(request_) == refused.text
    assert re.search(reason, refused.text)
    assert (good, request) == (Answer(True, "done"), ScaleRequest(rollout_workers=2))


def test_answers_that_nobody_waits_for_are_forgotten() -> None:
    async def play() -> Answer:
        actor = ControlActor()
        await actor.answer(Answer(True, "to nobody"))
        waiting = asyncio.create_task(actor.submit(ScaleRequest(rollout_workers=3)))
        await actor.next_request()
        await actor.answer(Answer(True, "first"))
        await actor.answer(Answer(False, "second"))
        return await waiting

    assert asyncio.run(play()) == Answer(True, "first")


def test_runs_of_one_name_in_two_folders_do_not_meet() -> None:
    here, there = control_name("/a/outputs/tuned"), control_name("/b/outputs/tuned")
    assert here != there and here == f"{socket.gethostname()}:/a/outputs/tuned"
    assert chosen_run("/a/outputs/tuned", [here, there]) == here
    assert chosen_run(there, [here, there]) == there
    assert chosen_run("tuned", [here]) == chosen_run(None, [here]) == here
    for run in (None, "tuned"):
        with pytest.raises(ValueError, match=r"2 runs are active .*/a/outputs/tuned, .*/b/outputs/tuned"):
            chosen_run(run, [here, there])
    with pytest.raises(ValueError, match=r"no run 'other' is active in this cluster; there are: .*tuned"):
        chosen_run("other", [here])
    with pytest.raises(ValueError, match=r"0 runs are active \(none\)"):
        chosen_run(None, [])
