"""Workers and servers that join and leave a running controller: event order, refusals, what joining ones receive."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from digest_roles import Delays, Learner, Scorer, Worker, settings

from actors.rollout import Document
from orchestration.buffer.schedule import Schedule
from orchestration.cluster.control import Answer, ControlActor, ScaleRequest
from orchestration.cluster.process_specs import ProcessSpec, process_specs
from orchestration.config import RunConfig
from orchestration.controller import Controller
from orchestration.output.metrics import MetricsLog
from orchestration.roles.processes import Roles
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.virtual_time import run_in_virtual_time
from orchestration.supervision import staff as staff_module
from orchestration.supervision.scaling import Scaling
from orchestration.supervision.staff import Staff

MakeDocument = Callable[[int], Document]


class Events(list):
    """Doubles as the event log's sink."""

    def write(self, row: dict[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Remote:
    """What a starter gives; `role` is the fake that answers for it."""

    name: str
    events: Events

    async def startup(self) -> dict[str, float]:
        await asyncio.sleep(5.0)
        self.events.append(("up", self.name))
        return {"engine": 5.0}


@dataclass
class Starter:
    """Counts what it starts."""

    events: Events
    num_started: dict[str, int] = field(default_factory=lambda: {"rollout worker": 1, "feature server": 1})

    async def add(self, spec: ProcessSpec) -> Remote:
        number = self.num_started[spec.name]
        self.num_started[spec.name] = number + 1
        return Remote(f"{spec.name} {number}", self.events)

    def remove(self, remote: Remote) -> None:
        self.events.append(("removed", remote.name))


class NotedWorker(Worker):
    """As one of digest_roles, and records what it does."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote.name, Delays(3))
        self.remote = remote

    async def sample(self, tickets):
        self.remote.events.append(("sample", self.name, self.policy_version))
        results = await super().sample(tickets)
        self.remote.events.append(("sampled", self.name))
        return results

    async def receive_weights(self, publication):
        receipt = await super().receive_weights(publication)
        self.remote.events.append(("weights", self.name, receipt.policy_version))
        return receipt


class NotedServer(Scorer):
    def __init__(self, remote: Remote) -> None:
        super().__init__(Delays(4), remote.name)
        self.remote = remote

    async def set_whitening(self, moment: object) -> None:
        self.remote.events.append(("whitening", self.name, moment))

    async def score(self, rollouts):
        self.remote.events.append(("score", self.name))
        return await super().score(rollouts)


class Whitening:
    """What the run's first server estimated."""

    async def pass_on(self, server: NotedServer) -> None:
        await server.set_whitening("the moment")


@dataclass
class Job:
    """A run in virtual time with one worker and one server at first."""

    make_document: MakeDocument
    config: RunConfig = field(default_factory=lambda: settings(max_lag=2))
    room: int = 8
    events: Events = field(default_factory=Events)
    answers: list[Answer] = field(default_factory=list)

    def play(self, monkeypatch: pytest.MonkeyPatch, requests: dict[int, ScaleRequest]) -> "Job":
        """`requests` are submitted after these steps, and answered before the run continues."""
        monkeypatch.setattr(staff_module, "free_places", lambda spec: self.room)
        monkeypatch.setattr(staff_module, "RolloutRole", NotedWorker)
        monkeypatch.setattr(staff_module, "FeatureRole", NotedServer)
        run_in_virtual_time(self._run(requests))
        return self

    async def _run(self, requests: dict[int, ScaleRequest]) -> None:
        async def after_step(step: int) -> None:
            self.events.append(("step", step))
            if step in requests:
                self.answers.append(await control.submit(requests[step]))
                self.events.append(("answered",))

        documents = [self.make_document(index) for index in range(5)]
        schedule = Schedule(self.config, None, self.events)
        learner, metrics, control = Learner(Delays(1)), MetricsLog([]), ControlActor()
        sync = WeightSync(learner, metrics)
        self.workers = workers = [NotedWorker(Remote("rollout worker 0", self.events))]
        self.servers = servers = [NotedServer(Remote("feature server 0", self.events))]
        controller = Controller(
            buffer=schedule.buffer(documents),
            rollout_workers=workers,
            scorers=servers,
            learner=learner,
            weight_sync=sync,
            metrics=metrics,
            documents_per_request=1,
            batch_timeout_s=1e6,
            after_step=after_step,
            without_rollouts=None if self.config.learner.samples else lambda document: "unsampled",
        )
        staff = Staff(
            starter=Starter(self.events),
            controller=controller,
            roles=Roles(workers=workers, servers=servers, verifiers=[], learner=learner),
            specs=process_specs(self.config),
            whitening=Whitening(),
            released=self._released,
        )
        scaling = Scaling(staff, samples=self.config.learner.samples)
        await sync.publish()
        await controller.run(self.config.learner.num_steps, extra_loop=scaling.serve(control))

    async def _released(self, role: NotedWorker | NotedServer) -> None:
        """As an evaluation that is still at work."""
        assert role not in (*self.workers, *self.servers), "it could be given another request"
        await asyncio.sleep(50.0)
        self.events.append(("released", role))

    def of(self, name: str) -> list[tuple]:
        """Events of one process, in order."""
        return [event for event in self.events if name in event]


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
