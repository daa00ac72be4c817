"""The whole run in this process, one call after the other, without Ray: for a debugger, a profiler, or a first look.

Every call is made at once and blocks; references are the values themselves. So nothing overlaps, and a breakpoint in
any role stops them all. One engine and one learner rank share the process and its process group.
"""

import asyncio
import copy
import os
import pickle
import platform
import time
from collections.abc import Callable, Generator, Sequence
from typing import Concatenate, NoReturn, cast

import torch

from orchestration.cluster.host import Host
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import Identity, Last, P, Reference, Remote, Result, Summary, T, Worker
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import PlacementConfig


class LocalObject(Remote[Worker]):
    """A worker of this process: no two calls overlap."""

    def __init__(self, name: str, spec: ProcessSpec[Worker]) -> None:
        self.name = name
        self._host = Host(pickle.dumps(spec.build), time.time())

    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage."""
        return self._host.startup()

    @property
    def in_flight(self) -> frozenset[str]:
        """No one else is there to ask while one is."""
        return frozenset()

    async def harm(self, how: str) -> None:
        """Raises: ValueError always."""
        raise ValueError(f"{how} for this process would end the run")

    async def identity(self) -> Identity:
        """This process."""
        return Identity(platform.node(), os.getpid())

    async def lost(self) -> NoReturn:
        """It lives as long as whoever waits."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("no one ends it")

    async def call(self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Result of the method."""
        return cast(Result, self._host.call(method.__name__, *args, **kwargs))

    async def call_concurrently(
        self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """The same."""
        return await self.call(method, *args, **kwargs)

    def notify(self, method: Callable[Concatenate[Worker, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """The same; raises what the method raises."""
        self._host.call(method.__name__, *args, **kwargs)

    async def stream(
        self,
        method: Callable[Concatenate[Worker, P], Generator[T, None, Last]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[list[Reference[T]], Last]:
        """Copies of what the method yields, as views of memory may change with the next step; and what it returns."""
        *parts, last = [copy.deepcopy(part) for part in self._host.stream(method.__name__, *args, **kwargs)]
        return cast(list[Reference[T]], parts), cast(Last, last)

    async def call_each(
        self,
        method: Callable[[Worker, list[T]], Sequence[Result]],
        items: Sequence[T],
        summary: Callable[[Result], Summary],
    ) -> list[tuple[Summary, Reference[Result]]]:
        """Summary and result for each item."""
        summaries, *results = self._host.call_each(method.__name__, summary, *items)
        return list(zip(cast(list[Summary], summaries), cast(list[Reference[Result]], results), strict=True))


class OneProcess(RoleStarter):
    """All roles of a run in this process."""

    def __init__(self, placement: PlacementConfig) -> None:
        """Raises: ValueError if a role is to have several processes."""
        self._roles = {name: getattr(placement, name) for name in ("rollout", "feature", "verifier", "learner")}
        for name, role in self._roles.items():
            if role.count > 1:
                raise ValueError(
                    f"placement.one_process=True runs one of each role, got placement.{name}.count={role.count}; set "
                    "it to 1, or leave out one_process"
                )

    def control(self, folder: str) -> None:
        """No process can be added here."""

    def put(self, value: T) -> Reference[T]:
        """The value."""
        return cast(Reference[T], value)

    async def fetch(self, reference: Reference[T]) -> T:
        """The value."""
        return cast(T, reference)

    def close(self) -> None:
        """Nothing: engine and learner share a process group, which vLLM leaves when the process ends."""

    def start(self, spec: ProcessSpec[T]) -> list[Remote[T]]:
        """The one worker of a role."""
        environment = dict(spec.environment)
        if any(role.num_gpus for role in self._roles.values()):
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # it would hide the device from the roles that have one
        os.environ.update(environment)  # before engines are imported, which read it
        torch.set_num_threads(spec.role.threads)  # torch itself is imported already; other threads, other bits
        return [LocalObject(f"{spec.name} 0", spec)]

    async def add(self, spec: ProcessSpec[T]) -> Remote[T]:
        """Raises: ValueError always."""
        raise ValueError(f"a run in one process (placement.one_process=True) has no room for one more {spec.name}")

    def remove(self, remote: Remote[object]) -> None:
        """Raises: ValueError always."""
        raise ValueError(f"a run in one process (placement.one_process=True) needs its only {remote.name}")
