"""Requests to change the number of processes of a running job, and their answers."""

import asyncio
import logging
from typing import Protocol

from orchestration.cluster.control import Answer, ControlLostError, ScaleRequest
from orchestration.supervision.staff import Staff, StaffedServers, StaffedWorkers

logger = logging.getLogger(__name__)


class Control(Protocol):
    """Where requests arrive: cluster.control.DriverControl."""

    async def next_request(self) -> ScaleRequest:
        """The next one, as soon as it is submitted."""

    async def answer(self, answer: Answer) -> None:
        """Its outcome."""


class Scaling:
    """Applies scale requests to a running controller."""

    def __init__(self, staff: Staff, *, samples: bool) -> None:
        """`samples`: documents are sampled and scored before they are trained on."""
        self._staff, self._samples = staff, samples

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
            role.wanted = wanted
            joins = [role.join() for _ in range(wanted - role.count - role.num_coming)]
            for outcome in await asyncio.gather(*joins, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    role.wanted = role.count + role.num_coming
                    raise outcome
                lines.append(outcome)
            while role.count > wanted:  # fewer leave if some fail meanwhile
                lines.append(await role.leave())
        return "\n".join(lines) or "nothing to change"

    def _possible(self, request: ScaleRequest) -> list[tuple[StaffedWorkers | StaffedServers, int]]:
        """Roles and the wanted number of each, all of it possible."""
        if not self._samples:
            raise ValueError("learner.objective='sft' samples nothing: neither workers nor servers would have work")
        if request.feature_servers is not None and self._staff.scored_by_verifiers:
            raise ValueError("learner.objective='rlvr' scores by verifier servers; feature servers are not scaled")
        asked = [(self._staff.workers, request.rollout_workers), (self._staff.servers, request.feature_servers)]
        changes = [(role, wanted) for role, wanted in asked if wanted is not None]
        for role, wanted in changes:
            role.require_possible(wanted)
        return changes
