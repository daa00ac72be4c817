"""Faults on purpose: a seeded schedule of killed, stopped and failing processes, against any run.

Each fault names a process by chance, a moment of its work, and what happens to it: SIGKILL, SIGSTOP (it stands still),
an exception in its next call, or that call never ends (it lives, and hangs). It strikes when the process is at that
moment, or after PATIENCE_S wherever it is. Every fault is a row of failures.jsonl, and the end of the run says what
struck. A run that survives ends as it would have without them, and loses nothing.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from orchestration.cluster.remote import ProcessFailure, Remote
from orchestration.supervision.failure_log import FailureLog
from orchestration.supervision_config import Chaos

logger = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""Longest wait for a moment that was drawn [s]."""
POLL_S = 0.01
MOMENTS: dict[str, dict[str, frozenset[str]]] = {
    "rollout worker": {
        "sampling": frozenset({"sample"}),
        "receiving": frozenset({"receive_weights", "hold_weights"}),
        "idle": frozenset(),
    },
    "feature server": {"scoring": frozenset({"score", "set_whitening"}), "idle": frozenset()},
    "verifier server": {"scoring": frozenset({"score"}), "idle": frozenset()},
    "learner rank": {
        "training": frozenset({"train_step"}),
        "publishing": frozenset({"publish", "send_weights"}),
        "saving": frozenset({"copy_state", "write_state"}),
        "evaluating": frozenset({"cross_entropy"}),
        "idle": frozenset(),
    },
}
"""Role -> moment -> methods of which one is being called then."""
HARMS: dict[str, tuple[str, ...]] = dict.fromkeys(MOMENTS, ("SIGKILL", "SIGSTOP", "exception", "hang"))
HARMS["learner rank"] = ("SIGKILL", "SIGSTOP", "hang")  # what a learner raises is the run's error


@dataclass(frozen=True, slots=True)
class Fault:
    """One of the schedule."""

    after_s: float
    """Since the one before [s]."""
    role: str
    moment: str
    harm: str
    choice: float
    """In [0, 1): which process of the role."""


Schedule = Callable[[int, Sequence[str]], Fault | None]
"""(number, roles of the run) -> fault; None after the last."""


def seeded_schedule(chaos: Chaos) -> Schedule:
    """Without end; a function of the seed alone."""
    return partial(_fault_number, chaos)


def _fault_number(chaos: Chaos, index: int, roles: Sequence[str]) -> Fault:
    """Each role is as likely as the others, and so is each of its moments and of what may happen to it."""
    draw = random.Random(f"{chaos.seed} {index}")
    role = draw.choice(sorted(roles))
    return Fault(
        after_s=draw.expovariate(chaos.faults_per_minute / 60),
        role=role,
        moment=draw.choice(list(MOMENTS[role])),
        harm=draw.choice(HARMS[role]),
        choice=draw.random(),
    )


class ChaosMonkey:
    """Strikes the processes of a run, one fault after the other, through all lives of its learner."""

    def __init__(self, schedule: Schedule, log: FailureLog) -> None:
        self._schedule, self._log = schedule, log
        self.struck: list[Fault] = []
        self._next = 0
        self._roles: set[str] = set()

    async def strike(self, processes: Callable[[], Sequence[Remote[object]]]) -> None:
        """Until cancelled. `processes`: those that there are now."""
        while True:
            self._roles |= {_role(remote) for remote in processes()}  # and those of which all are being replaced
            if (fault := self._schedule(self._next, sorted(self._roles))) is None:
                return
            await asyncio.sleep(fault.after_s)  # in the next life of the learner again, if this one ends meanwhile
            await self._strike(fault, processes)

    async def _strike(self, fault: Fault, processes: Callable[[], Sequence[Remote[object]]]) -> None:
        def of_role() -> list[Remote[object]]:
            return [remote for remote in processes() if _role(remote) == fault.role]

        await _within_patience(lambda: bool(of_role()))  # all may be being replaced
        victims = of_role()
        victim = victims[int(fault.choice * len(victims))] if victims else None
        came = victim is not None and await _at_moment(victim, MOMENTS[fault.role][fault.moment])
        self._next += 1
        if victim is None or victim not in processes():  # it has left, or failed by itself
            return
        in_flight = sorted(victim.in_flight)
        logger.warning("chaos: %s for %s, %s", fault.harm, victim.name, ", ".join(in_flight) or "idle")
        self.struck.append(fault)
        self._log.fault(victim.name, harm=fault.harm, moment=fault.moment if came else None, in_flight=in_flight)
        try:
            await victim.harm(fault.harm)
        except ProcessFailure as failure:  # it was gone before
            logger.info("chaos: %s", failure)

    def summary(self) -> str:
        """What struck."""
        counts = Counter(f"{fault.harm} of a {fault.role}" for fault in self.struck)
        return f"{len(self.struck)} faults: " + (", ".join(f"{n} {what}" for what, n in counts.most_common()) or "none")


async def _at_moment(victim: Remote[object], methods: frozenset[str]) -> bool:
    """Wait for a call of these methods, or for none at all if there are none; False if that does not come in time."""
    return await _within_patience(lambda: bool(methods & victim.in_flight) if methods else not victim.in_flight)


async def _within_patience(condition: Callable[[], bool]) -> bool:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(POLL_S)
        return True
    except TimeoutError:
        return False


def _role(remote: Remote[object]) -> str:
    return remote.name.rpartition(" ")[0]
