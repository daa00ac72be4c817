"""Workers and servers that join and leave a running controller: event order, refusals, what joining ones receive."""

import asyncio

import pytest
import staffed_run
from digest_roles import settings
from staffed_run import Job, MakeDocument, NotedServer, Remote

from orchestration.cluster.control import ControlActor, ControlLostError, ScaleRequest
from orchestration.config import RunConfig


def test_workers_join_with_verified_weights_and_leave_empty_handed(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestration.supervision")
    requests = {3: ScaleRequest(rollout_workers=3), 8: ScaleRequest(rollout_workers=1)}
    job = Job(make_document).play(monkeypatch, requests)
    assert [answer.accepted for answer in job.answers] == [True, True]
    assert "rollout worker 1 is up" in job.answers[0].text
    assert "rollout worker 2 has left" in job.answers[1].text
    for name in ("rollout worker 1", "rollout worker 2"):
        mine = job.of(name)
        assert [event[0] for event in mine[:3]] == ["up", "weights", "sample"]
        assert mine[2][2] >= 3, "sampled with weights from before it joined"
        assert mine[-1] == ("removed", name)
        assert mine[-2] == ("sampled", name), "left in the middle of a request"
        assert caplog.text.count(f"{name}: first rollout trained on") == 1
    steps = [event[1] for event in job.events if event[0] == "step"]
    assert steps == list(range(13))


@pytest.mark.parametrize(
    ("more", "fewer"),
    [
        (ScaleRequest(rollout_workers=2), ScaleRequest(rollout_workers=1)),
        (ScaleRequest(feature_servers=2), ScaleRequest(feature_servers=1)),
    ],
)
def test_who_leaves_is_ended_after_evaluation_has_released_it(
    more: ScaleRequest, fewer: ScaleRequest, make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_document).play(monkeypatch, {3: more, 8: fewer})
    (released, role), (removed, name) = [event for event in job.events if event[0] in ("released", "removed")]
    assert (released, removed, role.name) == ("released", "removed", name)


def test_servers_join_with_the_runs_whitening(make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {2: ScaleRequest(feature_servers=2), 9: ScaleRequest(feature_servers=1)}
    job = Job(make_document).play(monkeypatch, requests)
    mine = job.of("feature server 1")
    assert [event[0] for event in mine[:3]] == ["up", "whitening", "score"]
    assert mine[1][2] == "the moment"
    assert mine[-1] == ("removed", "feature server 1")
    assert [event[1] for event in job.events if event[0] == "step"] == list(range(13))


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (ScaleRequest(rollout_workers=0), ["0 rollout workers", "there are 1", "at least one"]),
        (ScaleRequest(feature_servers=-2), ["-2 feature servers", "at least one"]),
        (ScaleRequest(rollout_workers=11), ["11 rollout workers", "room for 8 more", "at most 9"]),
        (ScaleRequest(rollout_workers=2, feature_servers=0), ["0 feature servers"]),
    ],
)
def test_impossible_requests_are_refused_as_a_whole_and_the_run_continues(
    request_: ScaleRequest, parts: list[str], make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_document).play(monkeypatch, {3: request_})
    (answer,) = job.answers
    assert not answer.accepted
    assert [part for part in parts if part not in answer.text] == []
    assert not [event for event in job.events if event[0] in ("up", "removed")]
    assert ("step", 12) in job.events


class DyingControl(ControlActor):
    """Lost once it has been asked twice."""

    asked = 0

    async def next_request(self) -> ScaleRequest:
        self.asked += 1
        if self.asked > 1:
            raise ControlLostError("the actor died")
        return await super().next_request()


def test_without_its_control_actor_the_run_goes_on(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staffed_run, "ControlActor", DyingControl)
    job = Job(make_document).play(monkeypatch, {3: ScaleRequest(rollout_workers=2)})
    assert [answer.accepted for answer in job.answers] == [True]
    assert ("step", 12) in job.events
    assert caplog.text.count("the control actor was lost: the run goes on and cannot be scaled any more") == 1


def test_supervised_fine_tuning_has_no_work_for_more_processes(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = settings().learner.model_dump() | {"objective": "sft"}
    config = RunConfig.model_validate(settings(max_lag=2).model_dump() | {"learner": learner})
    job = Job(make_document, config).play(monkeypatch, {3: ScaleRequest(rollout_workers=2)})
    assert "learner.objective='sft' samples nothing" in job.answers[0].text
    assert ("step", 12) in job.events


def test_a_joining_worker_that_does_not_come_up_is_reported_and_ended(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(remote: Remote) -> dict[str, float]:
        raise RuntimeError(f"{remote.name} died during startup()")

    monkeypatch.setattr(Remote, "startup", fail)
    job = Job(make_document).play(monkeypatch, {3: ScaleRequest(rollout_workers=2)})
    assert not job.answers[0].accepted
    assert "rollout worker 1 died during startup()" in job.answers[0].text
    assert job.of("rollout worker 1") == [("removed", "rollout worker 1")]
    assert ("step", 12) in job.events


# -- while processes fail -----------------------------------------------------------------------------------------


async def two_workers_and_one_dies(job: Job) -> None:
    """The scaling to two is applied by now; another starts in the place of the first."""
    job.workers[0].die()
    await asyncio.sleep(1.0)
    assert len(job.workers) == 1 and job.staff.workers.num_coming == 1


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_a_request_while_a_replacement_starts_counts_it(
    wanted: int, make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {2: ScaleRequest(rollout_workers=2), 5: ScaleRequest(rollout_workers=wanted)}
    job = Job(make_document).play(monkeypatch, requests, after_steps={5: two_workers_and_one_dies})
    assert [answer.accepted for answer in job.answers] == [True, True]
    assert len(job.workers) == job.staff.workers.count == wanted
    assert ("step", 12) in job.events
    up = [event[1] for event in job.events if event[0] == "up"]
    assert len(up) == {1: 2, 2: 2, 3: 3}[wanted], "one in the place of the lost one, and one more if it was asked for"
    sampling = {event[1] for event in job.events if event[0] == "sample"}
    assert ("rollout worker 2" in sampling) == (wanted > 1), "one that is not needed any more samples nothing"
    removed = [event[1] for event in job.events if event[0] == "removed"]
    assert removed == ["rollout worker 0", "rollout worker 2"][: 2 if wanted == 1 else 1]


@pytest.mark.parametrize("role", ["rollout worker", "feature server"])
def test_one_that_dies_while_an_evaluation_keeps_it_from_leaving_is_not_replaced(
    role: str, make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(count: int) -> ScaleRequest:
        return ScaleRequest(rollout_workers=count) if role == "rollout worker" else ScaleRequest(feature_servers=count)

    async def die_soon(job: Job) -> None:
        members = job.workers if role == "rollout worker" else job.servers
        asyncio.get_running_loop().call_later(20.0, members[-1].die)  # `released` takes 50 s

    job = Job(make_document).play(monkeypatch, {2: request(2), 5: request(1)}, after_steps={5: die_soon})
    assert [answer.accepted for answer in job.answers] == [True, True]
    assert f"{role} 1 has left" in job.answers[1].text
    assert [event[1] for event in job.events if event[0] == "up"] == [f"{role} 1"]
    assert [event[1] for event in job.events if event[0] == "removed"] == [f"{role} 1"]
    assert ("step", 12) in job.events


def test_a_server_that_cannot_be_given_the_whitening_is_ended(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(server: NotedServer, moment: object) -> None:
        raise RuntimeError(f"{server.name} failed: out of memory")

    monkeypatch.setattr(NotedServer, "set_whitening", fail)
    job = Job(make_document).play(monkeypatch, {3: ScaleRequest(feature_servers=2)})
    assert job.answers[0].text == "feature server 1 failed: out of memory"
    assert ("removed", "feature server 1") in job.events
    assert ("step", 12) in job.events
