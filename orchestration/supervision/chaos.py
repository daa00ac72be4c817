"""Faults on purpose: a seeded schedule of killed, stopped and failing processes, against any run.

Each fault names a process by chance, a moment of its work, and what happens to it: SIGKILL, SIGSTOP (it lives and does
not answer) or an exception in its next call. It strikes when the process is at that moment, or after PATIENCE_S
wherever it is. Every fault is a line in chaos.jsonl, and the end of the run says what they cost. A run that survives
ends as it would have without them, and loses nothing.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestration.cluster.remote import ProcessFailure, Remote
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
HARMS: dict[str, tuple[str, ...]] = dict.fromkeys(MOMENTS, ("SIGKILL", "SIGSTOP", "exception"))
HARMS["learner rank"] = ("SIGKILL", "SIGSTOP")  # what a learner raises is the run's error


class Log(Protocol):
    """Where faults are noted: metrics.JsonLines."""

    def write(self, row: Mapping[str, object]) -> None:
        """Take one row."""


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


def fault_number(index: int, chaos: Chaos, roles: Sequence[str]) -> Fault:
    """The schedule, a function of its arguments alone. `roles`: those of the run, each as likely as the others."""
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

    def __init__(self, chaos: Chaos, log: Log) -> None:
        self._chaos, self._log = chaos, log
        self.struck: list[Fault] = []
        self._next = 0
        self._roles: set[str] = set()

    async def strike(self, processes: Callable[[], Sequence[Remote[object]]]) -> None:
        """Until cancelled. `processes`: those that there are now."""
        while True:
            self._roles |= {_role(remote) for remote in processes()}  # and those of which all are being replaced
            fault = fault_number(self._next, self._chaos, sorted(self._roles))
            self._next += 1
            await asyncio.sleep(fault.after_s)
            await self._strike(fault, processes)

    async def _strike(self, fault: Fault, processes: Callable[[], Sequence[Remote[object]]]) -> None:
        victims = [remote for remote in processes() if _role(remote) == fault.role]
        if not victims:  # all are being replaced
            return
        victim = victims[int(fault.choice * len(victims))]
        methods = MOMENTS[fault.role][fault.moment]
        came = await _moment(victim, methods)
        if victim not in processes():  # it has left, or failed by itself
            return
        in_flight = sorted(victim.in_flight)
        logger.warning("chaos: %s for %s, %s", fault.harm, victim.name, ", ".join(in_flight) or "idle")
        self.struck.append(fault)
        self._log.write(
            {
                "process": victim.name,
                "harm": fault.harm,
                "moment": fault.moment if came else None,
                "in_flight": in_flight,
            }
        )
        try:
            await victim.harm(fault.harm)
        except ProcessFailure as failure:  # it was gone before
            logger.info("chaos: %s", failure)

    def summary(self) -> str:
        """What struck."""
        counts = Counter(f"{fault.harm} of a {fault.role}" for fault in self.struck)
        return f"{len(self.struck)} faults: " + (", ".join(f"{n} {what}" for what, n in counts.most_common()) or "none")


async def _moment(victim: Remote[object], methods: frozenset[str]) -> bool:
    """Wait until the process is at the moment; False if it does not come in time."""

    def is_there() -> bool:
        return bool(methods & victim.in_flight) if methods else not victim.in_flight

    try:
        async with asyncio.timeout(PATIENCE_S):
            while not is_there():
                await asyncio.sleep(POLL_S)
        return True
    except TimeoutError:
        return False


def _role(remote: Remote[object]) -> str:
    return remote.name.rpartition(" ")[0]
