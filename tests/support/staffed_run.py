"""A run in virtual time whose staff changes: requests to scale it, processes that die, and others in their place."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
from digest_roles import Delays, Learner, Scorer, Worker, settings

from actors.rollout import Document
from orchestration.buffer.schedule import Schedule
from orchestration.cluster.control import Answer, ControlActor, ScaleRequest
from orchestration.cluster.process_specs import ProcessSpec, process_specs
from orchestration.cluster.remote import ProcessLost
from orchestration.config import RunConfig
from orchestration.loops.controller import Controller
from orchestration.output.metrics import MetricsLog
from orchestration.roles.processes import Roles
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.virtual_time import run_in_virtual_time
from orchestration.supervision import staff as staff_module
from orchestration.supervision.failure_log import FailureLog
from orchestration.supervision.recovery import Recovery
from orchestration.supervision.scaling import Scaling
from orchestration.supervision.staff import Staff

MakeDocument = Callable[[int], Document]
AfterStep = Callable[["Job"], Awaitable[None]]


class Events(list):
    """Doubles as the event log's sink."""

    def write(self, row: dict[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


def no_log() -> FailureLog:
    """Nothing of it is kept."""
    return FailureLog(Events(), lambda: 0.0)


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


class Mortal:
    """`die` is the end of its process, which the watch over it notices."""

    name: str

    def die(self, text: str = "out of memory") -> None:
        self._cause = text
        self._dead.set()

    async def lost(self) -> NoReturn:
        self._dead = asyncio.Event()
        await self._dead.wait()
        raise ProcessLost(self.name, f"{self.name} died: {self._cause}")


class NotedWorker(Mortal, Worker):
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


class NotedServer(Mortal, Scorer):
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
    max_replacements: int = 20
    events: Events = field(default_factory=Events)
    answers: list[Answer] = field(default_factory=list)

    def play(
        self,
        monkeypatch: pytest.MonkeyPatch,
        requests: dict[int, ScaleRequest] | None = None,
        *,
        after_steps: dict[int, AfterStep] | None = None,
    ) -> "Job":
        """`requests` are submitted after these steps, and answered before the run continues; what `after_steps` do
        comes before that."""
        monkeypatch.setattr(staff_module, "free_places", lambda spec: self.room)
        monkeypatch.setattr(staff_module, "RolloutRole", NotedWorker)
        monkeypatch.setattr(staff_module, "FeatureRole", NotedServer)
        run_in_virtual_time(self._run(requests or {}, after_steps or {}))
        return self

    async def _run(self, requests: dict[int, ScaleRequest], after_steps: dict[int, AfterStep]) -> None:
        async def after_step(step: int) -> None:
            self.events.append(("step", step))
            if step in after_steps:
                await after_steps[step](self)
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
            on_failure=lambda member, failure: recovery.replace(member, failure),
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
        self.staff = staff
        scaling = Scaling(staff, samples=self.config.learner.samples)
        recovery = Recovery(staff, max_per_hour=self.max_replacements, log=no_log())
        await sync.publish()
        await controller.run(self.config.learner.num_steps, beside=[scaling.serve(control)])

    async def _released(self, role: NotedWorker | NotedServer) -> None:
        """As an evaluation that is still at work."""
        assert role not in (*self.workers, *self.servers), "it could be given another request"
        await asyncio.sleep(50.0)
        self.events.append(("released", role))

    def of(self, name: str) -> list[tuple]:
        """Events of one process, in order."""
        return [event for event in self.events if name in event]
