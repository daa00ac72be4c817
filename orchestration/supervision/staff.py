"""The processes of each role during a run: how one more joins, how one leaves, and how a lost one is dropped.

A process that joins gets its first ticket (or rollout) only when it is up: a rollout worker after it has loaded and
verified published weights, a feature server after it has been given the run's whitening. One that leaves finishes what
it has, of training and of an evaluation, hands it on, and only then ends. When the first rollout of a joining worker is
trained on, one line is logged.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from actors.rollout import Rollout
from actors.worker import RolloutWorker
from feature_server.features.server import FeatureServer
from feature_server.verifiers.server import VerifierServer
from learner.batch import Example
from orchestration.cluster.cluster import free_places
from orchestration.cluster.process_specs import ProcessSpec, ProcessSpecs
from orchestration.cluster.remote import Reference, Remote
from orchestration.cluster.role_starter import RoleStarter
from orchestration.loops.controller import Controller
from orchestration.roles.processes import Roles
from orchestration.roles.protocols import Member
from orchestration.roles.publications import Publication
from orchestration.roles.roles import FeatureRole, RolloutRole, ScorerRole
from orchestration.roles.whitening_fit import WhiteningFit

logger = logging.getLogger(__name__)

Worker = TypeVar("Worker")
Role = TypeVar("Role", RolloutRole, FeatureRole, ScorerRole)

RunController = Controller[Publication, Reference[Rollout], Reference[Example]]
"""That of a run, rather than of a simulation."""


@dataclass(slots=True, kw_only=True)
class StaffedRole(Generic[Worker, Role]):
    """The processes of one role: `join`, `leave` and `drop` change their number by one."""

    starter: RoleStarter
    spec: ProcessSpec[Worker]
    present: list[Role]
    """Those that have work; shared with evaluation."""
    add: Callable[[Remote[Worker], float], Awaitable[None]]
    """Gives work to a process that is up, and was requested at this time.perf_counter()."""
    remove: Callable[[Role], Awaitable[None]]
    """Stops giving it work; returns when it holds none."""
    wanted: int
    """How many there are to be; one that is up when there are as many is ended again."""
    num_coming: int = field(default=0, init=False)
    """Processes that are starting, or will be started."""

    @property
    def count(self) -> int:
        """How many have work."""
        return len(self.present)

    async def join(self) -> str:
        """Start one more; returns a line about it.

        Raises: ProcessFailure or ValueError if it does not come up; it is ended then.
        """
        start = time.perf_counter()
        with self.coming():
            remote = await self.starter.add(self.spec)
            try:
                startup = await remote.startup()
                if self.count >= self.wanted:
                    self.starter.remove(remote)
                    return f"{remote.name} is not needed any more"
                await self.add(remote, start)
            except BaseException:  # a cancelled wait too: nobody else knows of it
                self.starter.remove(remote)
                raise
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in startup.items())
        return f"{remote.name} is up after {time.perf_counter() - start:.1f} s ({stages})"

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Inside, one more can be expected."""
        self.num_coming += 1
        try:
            yield
        finally:
            self.num_coming -= 1

    async def leave(self) -> str:
        """Let the newest finish what it has, and end it; returns a line about it."""
        start, role = time.perf_counter(), self.present[-1]
        await self.remove(role)
        self.starter.remove(role.remote)
        return f"{role.name} has left after {time.perf_counter() - start:.1f} s"

    def drop(self, member: Member) -> None:
        """It failed and has no work any more: end what is left of it."""
        role = next(role for role in self.present if role is member)
        self.present.remove(role)
        self.starter.remove(role.remote)

    def require_possible(self, wanted: int) -> None:
        """Raises: ValueError with the numbers if the cluster cannot have that many."""
        name, role, count = self.spec.name, self.spec.role, self.count + self.num_coming
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


StaffedWorkers = StaffedRole[RolloutWorker, RolloutRole]
StaffedServers = StaffedRole[FeatureServer, FeatureRole]
StaffedVerifiers = StaffedRole[VerifierServer, ScorerRole]
AnyStaffedRole = StaffedWorkers | StaffedServers | StaffedVerifiers
Wanted = Mapping[str, int]
"""Role -> how many processes it is to have."""


class Staff:
    """All processes of a run but the learner's."""

    def __init__(
        self,
        *,
        starter: RoleStarter,
        controller: RunController,
        roles: Roles,
        specs: ProcessSpecs,
        whitening: WhiteningFit,
        released: Callable[[RolloutRole | FeatureRole], Awaitable[None]],
        wanted: Wanted | None = None,
    ) -> None:
        """`roles`: those of the controller; their lists are kept up to date. `released(role)` returns when evaluation
        is done with a role that has left its list. `wanted`: of the life before, if some may be missing now."""
        wanted = wanted or {}
        self._controller, self._roles, self._whitening, self._released = controller, roles, whitening, released
        self.workers: StaffedWorkers = StaffedRole(
            starter=starter,
            spec=specs.worker,
            present=roles.workers,
            wanted=wanted.get(specs.worker.name, len(roles.workers)),
            add=self._add_worker,
            remove=self._remove_worker,
        )
        self.servers: StaffedServers = StaffedRole(
            starter=starter,
            spec=specs.server,
            present=roles.servers,
            wanted=wanted.get(specs.server.name, len(roles.servers)),
            add=self._add_server,
            remove=self._remove_server,
        )
        self.verifiers: StaffedVerifiers | None = None
        if specs.verifier is not None:
            self.verifiers = StaffedRole(
                starter=starter,
                spec=specs.verifier,
                present=roles.verifiers,
                wanted=wanted.get(specs.verifier.name, len(roles.verifiers)),
                add=self._add_verifier,
                remove=self._remove_verifier,
            )

    @property
    def scored_by_verifiers(self) -> bool:
        """Feature servers have no work but in evaluations."""
        return self.verifiers is not None

    @property
    def all(self) -> list[AnyStaffedRole]:
        """Every role."""
        return [self.workers, self.servers, *([self.verifiers] if self.verifiers is not None else [])]

    @property
    def wanted(self) -> Wanted:
        """How many processes each role is to have."""
        return {role.spec.name: role.wanted for role in self.all}

    def role_of(self, member: Member) -> AnyStaffedRole | None:
        """Where this one works; None: nowhere any more."""
        return next((role for role in self.all if member in role.present), None)

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
        self._controller.add_scorer(server, scores=not self.scored_by_verifiers)

    async def _remove_server(self, server: FeatureRole) -> None:
        self._roles.servers.remove(server)
        await self._released(server)
        await self._controller.remove_scorer(server)

    async def _add_verifier(self, remote: Remote[VerifierServer], asked_at: float) -> None:
        verifier = ScorerRole(remote)
        self._roles.verifiers.append(verifier)
        self._controller.add_scorer(verifier)

    async def _remove_verifier(self, verifier: ScorerRole) -> None:
        self._roles.verifiers.remove(verifier)
        await self._controller.remove_scorer(verifier)
