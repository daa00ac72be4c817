"""The processes of a run: their start, the wait until all are up, and the roles they play."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from actors.worker import RolloutWorker
from feature_server.features.server import FeatureServer
from feature_server.verifiers.server import VerifierServer
from learner.worker import LearnerWorker
from orchestration.cluster.process_specs import ProcessSpecs
from orchestration.cluster.remote import Remote
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig
from orchestration.roles.roles import FeatureRole, LearnerRole, RolloutRole, ScorerRole, connect_learner
from orchestration.tasks import first_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Those a run starts with."""

    workers: list[Remote[RolloutWorker]]
    servers: list[Remote[FeatureServer]]
    verifiers: list[Remote[VerifierServer]]
    ranks: list[Remote[LearnerWorker]]

    @property
    def all(self) -> list[Remote[object]]:
        """Every one of them."""
        return [*self.workers, *self.servers, *self.verifiers, *self.ranks]


def start_processes(starter: RoleStarter, specs: ProcessSpecs) -> Processes:
    """Start all of them concurrently; `await_startup` waits for them.

    In one process they start in this order: the learner names what is wrong with a model's files, an engine may not.
    """
    return Processes(
        ranks=starter.start(specs.rank),
        servers=starter.start(specs.server),
        verifiers=starter.start(specs.verifier) if specs.verifier is not None else [],
        workers=starter.start(specs.worker),
    )


async def await_startup(processes: Processes, *, timeout_s: float) -> dict[str, dict[str, float]]:
    """Wait until everything is up; start-up seconds by process and stage. Raises what the first that failed raised."""
    with first_error():
        async with asyncio.TaskGroup() as group:
            for remote in (*processes.workers, *processes.servers, *processes.verifiers):
                group.create_task(remote.startup())
            group.create_task(connect_learner(processes.ranks, timeout_s=timeout_s))
    return {remote.name: await remote.startup() for remote in processes.all}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The same processes as the loops see them; scaling changes the lists when some join or leave."""

    workers: list[RolloutRole]
    servers: list[FeatureRole]
    verifiers: list[ScorerRole]
    learner: LearnerRole

    @property
    def scorers(self) -> Sequence[ScorerRole]:
        """Those that turn rollouts into what the learner takes."""
        return self.verifiers or self.servers

    @property
    def remotes(self) -> list[Remote[object]]:
        """The processes that there are now."""
        return [*(role.remote for role in (*self.workers, *self.servers, *self.verifiers)), *self.learner.ranks]

    def processes(self, ranks: list[Remote[LearnerWorker]]) -> Processes:
        """Those that are there now, and these ranks."""
        return Processes(
            workers=[role.remote for role in self.workers],
            servers=[role.server for role in self.servers],
            verifiers=[cast(Remote[VerifierServer], role.remote) for role in self.verifiers],
            ranks=ranks,
        )


def roles_of(processes: Processes, config: RunConfig, *, probe_ids: Sequence[list[int]]) -> Roles:
    """`probe_ids`: the texts by which every weight update is checked."""
    asynchrony = config.asynchrony
    return Roles(
        workers=[RolloutRole(remote) for remote in processes.workers],
        servers=[FeatureRole(remote) for remote in processes.servers],
        verifiers=[ScorerRole(remote) for remote in processes.verifiers],
        learner=LearnerRole(
            processes.ranks,
            list(probe_ids),
            transport=asynchrony.weight_transport,
            channel_timeout_s=asynchrony.request_timeout_s / 2,
        ),
    )
