"""Rollout workers and feature servers that join and leave during a run.

A process that joins gets its first ticket (or rollout) only when it is up: a rollout worker after it has loaded and
verified published weights, a feature server after it has been given the run's whitening. One that leaves finishes what
it has, of training and of an evaluation, hands it on, and only then ends. When the first rollout of a joining worker is
trained on, one line is logged.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from actors.rollout import Rollout
from actors.worker import RolloutWorker
from feature_server.features.server import FeatureServer
from learner.batch import Example
from orchestration.cluster.cluster import free_places
from orchestration.cluster.control import Answer, ControlLostError, ScaleRequest
from orchestration.cluster.process_specs import ProcessSpec, ProcessSpecs
from orchestration.cluster.remote import Reference, Remote
from orchestration.cluster.role_starter import RoleStarter
from orchestration.controller import Controller
from orchestration.roles.processes import Roles
from orchestration.roles.publications import Publication
from orchestration.roles.roles import FeatureRole, RolloutRole
from orchestration.roles.whitening_fit import WhiteningFit

logger = logging.getLogger(__name__)

Worker = TypeVar("Worker")
Role = TypeVar("Role", RolloutRole, FeatureRole)

RunController = Controller[Publication, Reference[Rollout], Reference[Example]]
"""That of a run, rather than of a simulation."""


class Control(Protocol):
    """Where requests arrive: cluster.control.DriverControl."""

    async def next_request(self) -> ScaleRequest:
        """The next one, as soon as it is submitted. Raises: ControlLostError."""

    async def answer(self, answer: Answer) -> None:
        """Its outcome. Raises: ControlLostError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalableRole(Generic[Worker, Role]):
    """The processes of one role: `join` and `leave` change their number by one and return a line about it."""

    starter: RoleStarter
    spec: ProcessSpec[Worker]
    present: Sequence[Role]
    """Those that have work; kept up to date by what `add` and `remove` call."""
    add: Callable[[Remote[Worker], float], Awaitable[None]]
    """Gives work to a process that is up, and was requested at this time.perf_counter()."""
    remove: Callable[[Role], Awaitable[None]]
    """Stops giving it work; returns when it holds none."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.present)

    async def join(self) -> str:
        """Start one more. Raises: RuntimeError or TimeoutError if it does not come up; it is ended then."""
        start = time.perf_counter()
        remote = await self.starter.add(self.spec)
        try:
            startup = await remote.startup()
        except (RuntimeError, TimeoutError):
            self.starter.remove(remote)
            raise
        await self.add(remote, start)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in startup.items())
        return f"{remote.name} is up after {time.perf_counter() - start:.1f} s ({stages})"

    async def leave(self) -> str:
        """Let the newest finish what it has, and end it."""
        start, role = time.perf_counter(), self.present[-1]
        await self.remove(role)
        self.starter.remove(role.remote)
        return f"{role.name} has left after {time.perf_counter() - start:.1f} s"

    def require_possible(self, wanted: int) -> None:
        """Raises: ValueError with the numbers if the cluster cannot have that many."""
        name, role, count = self.spec.name, self.spec.role, self.count
        if wanted < 1:
            raise ValueError(
                f"{wanted} {name}s were requested, there are {count}: a run needs at least one; to end it, stop the job"
            )
        room = free_places(self.spec) if wanted > count else 0
        if wanted - count > room:
            raise ValueError(
                f"{wanted} {name}s were requested, there are {count}, and the cluster has room for {room} more "
                f"({role.num_cpus:g} CPUs and {role.num_gpus:g} GPUs each); ask for at most {count + room}, or add "
                "nodes"
            )


ScaledWorkers = ScalableRole[RolloutWorker, RolloutRole]
ScaledServers = ScalableRole[FeatureServer, FeatureRole]


class Scaling:
    """Applies scale requests to a running controller."""

    def __init__(
        self,
        *,
        starter: RoleStarter,
        controller: RunController,
        roles: Roles,
        specs: ProcessSpecs,
        whitening: WhiteningFit,
        released: Callable[[RolloutRole | FeatureRole], Awaitable[None]],
    ) -> None:
        """`roles`: those of the controller; their lists are kept up to date. `released(role)` returns when evaluation
        is done with a role that has left its list."""
        self._controller, self._roles, self._whitening, self._released = controller, roles, whitening, released
        self._scored_by_verifiers = specs.verifier is not None
        self._workers = ScalableRole(
            starter=starter,
            spec=specs.worker,
            present=roles.workers,
            add=self._add_worker,
            remove=self._remove_worker,
        )
        self._servers = ScalableRole(
            starter=starter,
            spec=specs.server,
            present=roles.servers,
            add=self._add_server,
            remove=self._remove_server,
        )

    async def serve(self, control: Control | None) -> None:
        """Answer requests one after the other, until cancelled; without a control actor there are none."""
        try:
            while control is not None:
                answer = await self._answer(await control.next_request())
                logger.info("scaling: %s", answer.text)
                await control.answer(answer)
        except ControlLostError as error:
            logger.warning("the control actor was lost: the run goes on and cannot be scaled any more (%s)", error)

    async def _answer(self, request: ScaleRequest) -> Answer:
        try:
            return Answer(True, await self.apply(request))
        except (ValueError, RuntimeError, TimeoutError) as error:
            return Answer(False, str(error))

    async def apply(self, request: ScaleRequest) -> str:
        """Bring the run to these numbers; one line per change. Returns when all that join are up and have work.

        Raises: ValueError with the numbers if a number is below one or beyond the cluster; RuntimeError if a process
        did not come up. Those that did stay.
        """
        lines: list[str] = []
        for role, wanted in self._possible(request):
            joins = [role.join() for _ in range(wanted - role.count)]
            for outcome in await asyncio.gather(*joins, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                lines.append(outcome)
            lines += [await role.leave() for _ in range(role.count - wanted)]
        return "\n".join(lines) or "nothing to change"

    def _possible(self, request: ScaleRequest) -> list[tuple[ScaledWorkers | ScaledServers, int]]:
        """Roles and the wanted number of each, all of it possible."""
        if not self._controller.samples:
            raise ValueError("learner.objective='sft' samples nothing: neither workers nor servers would have work")
        if request.feature_servers is not None and self._scored_by_verifiers:
            raise ValueError("learner.objective='rlvr' scores by verifier servers; feature servers are not scaled")
        asked = [(self._workers, request.rollout_workers), (self._servers, request.feature_servers)]
        changes = [(role, wanted) for role, wanted in asked if wanted is not None]
        for role, wanted in changes:
            role.require_possible(wanted)
        return changes

    async def _add_worker(self, remote: Remote[RolloutWorker], asked_at: float) -> None:
        def log_first_rollout() -> None:
            seconds = time.perf_counter() - asked_at
            logger.info("%s: first rollout trained on %.1f s after it was requested", remote.name, seconds)

        worker = RolloutRole(remote)
        self._roles.workers.append(worker)
        self._controller.add_worker(worker, on_trained=log_first_rollout)

    async def _remove_worker(self, worker: RolloutRole) -> None:
        self._roles.workers.remove(worker)
        await self._released(worker)  # first: its request may still need the channel that the controller closes
        await self._controller.remove_worker(worker)

    async def _add_server(self, remote: Remote[FeatureServer], asked_at: float) -> None:
        server = FeatureRole(remote)
        await self._whitening.pass_on(server)
        self._roles.servers.append(server)
        self._controller.add_scorer(server)

    async def _remove_server(self, server: FeatureRole) -> None:
        self._roles.servers.remove(server)
        await self._released(server)
        await self._controller.remove_scorer(server)
