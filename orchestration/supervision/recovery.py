"""Another process in the place of each that failed: how soon, and how often.

In the place of one that has done something another is started at once. If that one fails before it has done anything,
the next waits a second, then two, and so on up to MAX_WAIT_S. A role may have so many replacements in an hour; after
that the run goes on with whoever is left, and ends with the reason when the last one is gone.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from orchestration.cluster.remote import ProcessFailure
from orchestration.roles.protocols import Member
from orchestration.supervision.failure_log import FailureLog
from orchestration.supervision.staff import AnyStaffedRole, Staff

logger = logging.getLogger(__name__)

MAX_WAIT_S = 60.0
HOUR_S = 3600.0


class Allowance:
    """How many replacements a role may have."""

    def __init__(self, max_per_hour: int) -> None:
        self._max_per_hour = max_per_hour
        self._times: deque[float] = deque()
        self._num_fruitless = 0

    def wait_s(self, now: float, *, was_of_use: bool) -> float | None:
        """How long to wait for the next one [s]; None: it may have no more. `was_of_use`: the failed one had done
        something."""
        while self._times and now - self._times[0] >= HOUR_S:
            self._times.popleft()
        if len(self._times) >= self._max_per_hour:
            return None
        self._times.append(now)
        self._num_fruitless = 0 if was_of_use else self._num_fruitless + 1
        return min(MAX_WAIT_S, 2.0 ** (self._num_fruitless - 1)) if self._num_fruitless > 0 else 0.0


class Recovery:
    """What is done about a worker or server that failed."""

    def __init__(
        self,
        staff: Staff,
        *,
        max_per_hour: int,
        log: FailureLog,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._staff, self._max_per_hour, self._log, self._sleep = staff, max_per_hour, log, sleep
        self._allowances: dict[str, Allowance] = {}
        self.failures: list[str] = []
        """All of them, in order: the first tells most."""

    async def replace(self, member: Member, failure: ProcessFailure) -> None:
        """Returns when another process works in its place, or none may.

        Raises: RuntimeError with the first and the last failure if no process of the role is left.
        """
        role = self._staff.role_of(member)
        if role is None:  # it was leaving
            return
        logger.warning("%s; what it had is done by others", failure)
        self._note(member.name, failure)
        role.drop(member)
        await self._start_another(role, was_of_use=member.num_done > 0)
        self._log.replaced(member.name)

    async def fill_vacancies(self) -> None:
        """Start those that are missing: their replacement was starting when the learner was lost."""
        vacancies = [role for role in self._staff.all for _ in range(role.wanted - role.count)]
        await asyncio.gather(*[self._start_another(role, was_of_use=True) for role in vacancies])

    async def _start_another(self, role: AnyStaffedRole, *, was_of_use: bool) -> None:
        while (wait_s := self._wait_s(role, was_of_use=was_of_use)) is not None:
            with role.coming():
                await self._sleep(wait_s)
            if role.count + role.num_coming >= role.wanted:  # fewer were requested meanwhile, or others started
                return
            try:
                logger.info("in its place: %s", await role.join())
                return
            except (RuntimeError, ValueError) as error:
                logger.warning("a %s did not come up: %s", role.spec.name, error)
                self._note(role.spec.name, error)
                was_of_use = False
        role.wanted -= 1
        self._require_someone(role)

    def _note(self, process: str, error: Exception) -> None:
        self.failures.append(str(error))
        self._log.failed(process, error=str(error))

    def _wait_s(self, role: AnyStaffedRole, *, was_of_use: bool) -> float | None:
        allowance = self._allowances.setdefault(role.spec.name, Allowance(self._max_per_hour))
        return allowance.wait_s(asyncio.get_running_loop().time(), was_of_use=was_of_use)

    def _require_someone(self, role: AnyStaffedRole) -> None:
        name = role.spec.name
        if role.count + role.num_coming > 0:
            logger.error(
                "no more replacements within this hour (recovery.max_replacements=%d): the run goes on with %d %s(s)",
                self._max_per_hour, role.count, name,
            )  # fmt: skip
            return
        raise RuntimeError(
            f"no {name} is left, and recovery.max_replacements={self._max_per_hour} within an hour are used up. The "
            f"first failure was: {self.failures[0]}. The last: {self.failures[-1]}"
        )
