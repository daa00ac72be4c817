"""The whole run in this process, one call after the other, without Ray: for a debugger, a profiler, or a first look.

Every call is made at once and blocks; references are the values themselves. So nothing overlaps, and a breakpoint in
any role stops them all. One engine and one learner rank share the process and its process group.
"""

import copy
import os
from collections.abc import Sequence

import torch

from orchestration.cluster.role_starter import ProcessSpec, RoleStarter, build
from orchestration.config import PlacementConfig


class LocalObject:
    """The verbs of cluster.RemoteObject on an object of this process."""

    def __init__(self, name: str, target: str, kwargs: dict[str, object]) -> None:
        self.name = name
        self._object, self._imports_s = build(target, kwargs)

    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage."""
        return {"imports": self._imports_s} | self._object.startup_s

    async def call(self, method: str, *args: object, **kwargs: object) -> object:
        """Result of the method."""
        return getattr(self._object, method)(*args, **kwargs)

    async def call_concurrently(self, method: str, *args: object) -> object:
        """The same: nothing goes on beside anything here."""
        return await self.call(method, *args)

    async def call_parts(self, method: str, *args: object) -> tuple[list[object], object]:
        """For a method that yields: copies of all but the last, and the last."""
        *parts, last = [copy.deepcopy(part) for part in await self.call(method, *args)]
        return parts, last

    async def call_on(self, method: str, items: Sequence[object]) -> object:
        """Result of the method on a list of items."""
        return await self.call(method, list(items))

    async def call_each(self, method: str, items: Sequence[object]) -> list[tuple[object, object]]:
        """(summary, result) for each item."""
        return [(result.summary(), result) for result in await self.call(method, list(items))]


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

    def control(self, run: str) -> None:
        """No process can be added here."""

    def put(self, value: object) -> object:
        """The value."""
        return value

    async def fetch(self, reference: object) -> object:
        """The value."""
        return reference

    def close(self) -> None:
        """Nothing: engine and learner share a process group, which vLLM leaves when the process ends."""

    def start(self, spec: ProcessSpec) -> list[LocalObject]:
        """The one object of a role."""
        environment = dict(spec.environment)
        if any(role.num_gpus for role in self._roles.values()):
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # it would hide the device from the roles that have one
        os.environ.update(environment)  # before the class is imported: engines read it then
        torch.set_num_threads(spec.role.threads)  # torch itself is imported already; other threads, other bits
        return [LocalObject(f"{spec.name} 0", spec.target, spec.kwargs)]

    async def add(self, spec: ProcessSpec) -> LocalObject:
        """Raises: ValueError always."""
        raise ValueError(f"a run in one process (placement.one_process=True) has no room for one more {spec.name}")

    def remove(self, remote: LocalObject) -> None:
        """Raises: ValueError always."""
        raise ValueError(f"a run in one process (placement.one_process=True) needs its only {remote.name}")
