"""The processes of a run: how each is made from the configuration, the wait until all are up, and their roles."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from actors.models.pretrained import portable_name
from orchestration.cluster.cluster import RemoteObject
from orchestration.cluster.role_starter import (
    ProcessSpec,
    RoleStarter,
    feature_server,
    learner_rank,
    rollout_worker,
    verifier_server,
)
from orchestration.config import RunConfig
from orchestration.roles.roles import FeatureRole, LearnerRole, RolloutRole, ScorerRole, connect_learner


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpecs:
    """How to make one more process of each role of this run."""

    worker: ProcessSpec
    server: ProcessSpec
    verifier: ProcessSpec | None
    """None unless the objective has a verifier."""
    rank: ProcessSpec


def process_specs(config: RunConfig) -> ProcessSpecs:
    """The roles' arguments, each role told what it needs of the configuration."""
    placement, dtype = config.placement, config.model.dtype
    policy = portable_name(config.model.policy)
    feature_model = portable_name(config.model.feature_model or config.model.policy)
    return ProcessSpecs(
        worker=rollout_worker(
            placement,
            model=policy,
            config=config.rollout,
            dtype=dtype,
            max_tokens=config.data.document_tokens + config.data.horizon,
            seed=config.seed,
        ),
        server=feature_server(
            placement,
            model=feature_model,
            policy=policy,
            config=config.feature,
            dtype=dtype,
            attention=config.model.attention,
        ),
        verifier=verifier_server(placement, model=policy, config=config.verifier) if config.verifies else None,
        rank=learner_rank(
            placement,
            model=policy,
            config=config.learner,
            dtype=dtype,
            temperature=config.rollout.temperature,
            seed=config.seed,
            attention=config.model.attention,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Those a run starts with."""

    workers: list[RemoteObject]
    servers: list[RemoteObject]
    verifiers: list[RemoteObject]
    ranks: list[RemoteObject]

    @property
    def all(self) -> list[RemoteObject]:
        """Every one of them."""
        return [*self.workers, *self.servers, *self.verifiers, *self.ranks]


def start_processes(starter: RoleStarter, specs: ProcessSpecs) -> Processes:
    """Start all of them side by side; `await_startup` waits for them."""
    return Processes(
        workers=starter.start(specs.worker),
        servers=starter.start(specs.server),
        verifiers=starter.start(specs.verifier) if specs.verifier is not None else [],
        ranks=starter.start(specs.rank),
    )


async def await_startup(processes: Processes, *, timeout_s: float) -> dict[str, dict[str, float]]:
    """Wait until everything is up; start-up seconds by process and stage. Raises what the first that failed raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for remote in (*processes.workers, *processes.servers, *processes.verifiers):
                group.create_task(remote.startup())
            group.create_task(connect_learner(processes.ranks, timeout_s=timeout_s))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return {remote.name: await remote.startup() for remote in processes.all}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The same processes as the loops see them; the lists change when some join or leave."""

    workers: list[RolloutRole]
    servers: list[FeatureRole]
    verifiers: list[ScorerRole]
    learner: LearnerRole

    @property
    def scorers(self) -> list[ScorerRole]:
        """Who turns rollouts into what the learner takes."""
        return self.verifiers or self.servers


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
            weight_folder=asynchrony.weight_folder,
            channel_timeout_s=asynchrony.request_timeout_s / 2,
        ),
    )
