"""Rollout workers and feature servers come and go while the run lasts.

A process that joins gets its first ticket (or rollout) only when it is up: a rollout worker after it has loaded and
verified published weights, a feature server after it has been given the run's whitening. One that leaves finishes what
it has, hands it on, and only then ends. Where the time until a newcomer's first trained rollout went is logged.
"""

import asyncio
import logging
import time
from typing import Protocol

from orchestration.cluster.cluster import RemoteObject, free_places
from orchestration.cluster.control import Answer, ScaleRequest
from orchestration.cluster.processes import ProcessSpecs, Roles
from orchestration.cluster.role_starter import ProcessSpec, RoleStarter
from orchestration.controller import Controller
from orchestration.roles.roles import FeatureRole, RolloutRole
from orchestration.roles.whitening_fit import WhiteningFit

logger = logging.getLogger(__name__)


class Desk(Protocol):
    """Where requests come in: cluster.DriverControl."""

    async def next_request(self) -> ScaleRequest:
        """The next one, as soon as somebody hands it in."""

    async def answer(self, answer: Answer) -> None:
        """What became of it."""


class Scaling:
    """Applies scale requests to a running controller."""

    def __init__(
        self,
        *,
        starter: RoleStarter,
        controller: Controller,
        roles: Roles,
        specs: ProcessSpecs,
        whitening: WhiteningFit,
    ) -> None:
        """`roles`: those of the controller, which keeps their lists up to date."""
        self._starter, self._controller = starter, controller
        self._workers, self._servers = roles.workers, roles.servers
        self._specs, self._whitening = specs, whitening

    async def serve(self, desk: Desk | None) -> None:
        """Answer requests one after the other, until cancelled; without a desk nobody can ask."""
        while desk is not None:
            request = await desk.next_request()
            try:
                answer = Answer(True, await self.apply(request))
            except (ValueError, RuntimeError, TimeoutError) as error:
                answer = Answer(False, str(error))
            logger.info("scaling: %s", answer.text)
            await desk.answer(answer)

    async def apply(self, request: ScaleRequest) -> str:
        """Bring the run to these numbers; one line a change. Returns when all newcomers are up and have joined.

        Raises: ValueError with the numbers if a number is below one or beyond the cluster; RuntimeError if a newcomer
        did not come up. Those that did stay.
        """
        changes = self._checked(request)
        lines = []
        for spec, change in changes:
            is_worker = spec is self._specs.worker
            join = self._join_worker if is_worker else self._join_server
            leave = self._leave_worker if is_worker else self._leave_server
            joined = await asyncio.gather(*[join() for _ in range(change)], return_exceptions=True)
            for failure in (outcome for outcome in joined if isinstance(outcome, BaseException)):
                raise failure
            lines += joined
            lines += [await leave() for _ in range(-change)]
        return "\n".join(lines) or "nothing to change"

    def _checked(self, request: ScaleRequest) -> list[tuple[ProcessSpec, int]]:
        """Processes to add (or, negative, to remove), all of it possible."""
        if not self._controller.samples:
            raise ValueError("learner.objective='sft' samples nothing: neither workers nor servers would have work")
        changes = []
        if request.rollout_workers is not None:
            changes.append((self._specs.worker, len(self._workers), request.rollout_workers))
        if request.feature_servers is not None:
            changes.append((self._specs.server, len(self._servers), request.feature_servers))
            if self._specs.verifier is not None:
                raise ValueError("learner.objective='rlvr' scores by verifier servers; feature servers are not scaled")
        for spec, present, wanted in changes:
            _check(spec, present=present, wanted=wanted)
        return [(spec, wanted - present) for spec, present, wanted in changes]

    async def _bring_up(self, spec: ProcessSpec) -> tuple[RemoteObject, dict[str, float]]:
        """A process that is up, and its start-up seconds by stage; one that fails is ended."""
        remote = await self._starter.add(spec)
        try:
            return remote, await remote.startup()
        except (RuntimeError, TimeoutError):
            self._starter.remove(remote)
            raise

    async def _join_worker(self) -> str:
        start = time.perf_counter()
        remote, startup = await self._bring_up(self._specs.worker)
        worker = RolloutRole(remote, policy_version=None)
        self._controller.add_worker(
            worker, lambda stages: logger.info("%s", _timeline(worker.name, start, startup, stages))
        )
        return f"{worker.name} is up after {time.perf_counter() - start:.1f} s ({_seconds(startup)})"

    async def _join_server(self) -> str:
        start = time.perf_counter()
        remote, startup = await self._bring_up(self._specs.server)
        server = FeatureRole(remote)
        await self._whitening.pass_on(server)
        self._controller.add_scorer(server)
        return f"{server.name} is up after {time.perf_counter() - start:.1f} s ({_seconds(startup)})"

    async def _leave_worker(self) -> str:
        start, worker = time.perf_counter(), self._workers[-1]
        await self._controller.remove_worker(worker)
        self._starter.remove(worker.remote)
        return f"{worker.name} has left after {time.perf_counter() - start:.1f} s"

    async def _leave_server(self) -> str:
        start, server = time.perf_counter(), self._servers[-1]
        await self._controller.remove_scorer(server)
        self._starter.remove(server.remote)
        return f"{server.name} has left after {time.perf_counter() - start:.1f} s"


def _check(spec: ProcessSpec, *, present: int, wanted: int) -> None:
    if wanted < 1:
        raise ValueError(
            f"{wanted} {spec.name}s were asked for, there are {present}: a run needs at least one; to end it, "
            "stop the job"
        )
    room = free_places(spec) if wanted > present else 0
    if wanted - present > room:
        raise ValueError(
            f"{wanted} {spec.name}s were asked for, there are {present}, and the cluster has room for {room} more "
            f"({spec.role.num_cpus:g} CPUs and {spec.role.num_gpus:g} GPUs each); ask for at most "
            f"{present + room}, or add nodes"
        )


def _seconds(stages: dict[str, float]) -> str:
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())


def _timeline(name: str, start: float, startup: dict[str, float], stages: dict[str, float]) -> str:
    """Stages of a newcomer from the request to its first trained rollout, each with its own seconds."""
    return (
        f"{name}: first rollout trained on {time.perf_counter() - start:.1f} s after it was asked for: "
        f"{_seconds(startup | stages)}"
    )
