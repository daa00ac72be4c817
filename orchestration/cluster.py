"""The only file that says `ray.remote`: places the three roles, starts them, and turns calls into awaitables.

Workers are plain classes; a `Host` actor builds one inside its process, by import path, so that the driver never
imports an engine. Every call has a deadline. Payloads pass by reference: `call_each` returns a small summary and an
object reference for each result.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.config import PlacementConfig, RoleConfig
from orchestration.role_starter import RoleStarter, build

BESIDE = "beside"
"""Ray's concurrency group for calls that go on beside others; all other calls of an actor wait for each other."""

PLACEMENT_TIMEOUT_S = 30.0
"""How long the reservation of all processes may take once the cluster is known to be large enough [s]."""


class Host:
    """A Ray actor's body: owns one plain object and calls its methods, one at a time."""

    def __init__(self, target: str, kwargs: dict[str, object], launched_at: float) -> None:
        started = time.time()
        self._object, imports_s = build(target, kwargs)
        self._startup_s = {"process": started - launched_at, "imports": imports_s}

    def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, the object's own `startup_s` included; returns once it is built."""
        own = dict(self._object.startup_s)
        return self._startup_s | {"imports": self._startup_s["imports"] + own.pop("imports", 0.0)} | own

    def call(self, method: str, *args: object, **kwargs: object) -> object:
        """The method's result."""
        return getattr(self._object, method)(*args, **kwargs)

    def call_on(self, method: str, *items: object) -> object:
        """The result of the method on a list of items; items that were references have arrived by then."""
        return getattr(self._object, method)(list(items))

    def call_each(self, method: str, *items: object) -> tuple[object, ...]:
        """A list of the results' summaries, then each result as an object of its own in the store."""
        results = self.call_on(method, *items)
        return ([result.summary() for result in results], *results)


class RemoteObject:
    """Awaitable view of one Host: names the process and the wait in every error."""

    def __init__(self, name: str, actor: ray.actor.ActorHandle, *, timeout_s: float) -> None:
        self.name = name
        self._actor = actor
        self._timeout_s = timeout_s

    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, as soon as the object is built."""
        return await self._within_deadline("startup", self._actor.startup.remote())

    async def call(self, method: str, *args: object, **kwargs: object) -> object:
        """Result of the method.

        Raises: TimeoutError past the deadline, RuntimeError if the process died, the method's own error otherwise.
        """
        return await self._within_deadline(method, self._actor.call.remote(method, *args, **kwargs))

    async def call_beside(self, method: str, *args: object) -> object:
        """As `call`, in a thread of its own: it need not wait until another call has ended."""
        call = self._actor.call.options(concurrency_group=BESIDE)
        return await self._within_deadline(method, call.remote(method, *args))

    async def call_split(self, method: str, *args: object) -> tuple[object, ray.ObjectRef]:
        """For a method that returns a pair: the first part here, the second as a reference."""
        first, second = self._actor.call.options(num_returns=2).remote(method, *args)
        return await self._within_deadline(method, first), second

    async def call_on(self, method: str, items: Sequence[object]) -> object:
        """Result of the method on a list of items, each a value or a reference."""
        return await self._within_deadline(method, self._actor.call_on.remote(method, *items))

    async def call_each(self, method: str, items: Sequence[object]) -> list[tuple[object, ray.ObjectRef]]:
        """(summary, reference) of the result for each item."""
        summaries, *results = self._actor.call_each.options(num_returns=len(items) + 1).remote(method, *items)
        return list(zip(await self._within_deadline(method, summaries), results, strict=True))

    async def _within_deadline(self, method: str, reference: ray.ObjectRef) -> object:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await reference
        except RayTaskError:
            raise  # the method's own error, which may be a TimeoutError too
        except TimeoutError as error:
            raise TimeoutError(
                f"{self.name} did not answer {method}() within {self._timeout_s:g} s; see its log in Ray's session "
                "folder, or raise asynchrony.request_timeout_s"
            ) from error
        except RayActorError as error:
            raise RuntimeError(f"{self.name} died during {method}(): {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """One process to place."""

    name: str
    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def reservations(placement: PlacementConfig, *, with_verifiers: bool = False) -> list[Reservation]:
    """Every process of the run, role by role."""
    roles = [
        ("rollout worker", placement.rollout),
        ("feature server", placement.feature),
        ("learner rank", placement.learner),
    ]
    if with_verifiers:
        roles.append(("verifier server", placement.verifier))
    return [
        Reservation(name=f"{name} {index}", cpus=role.num_cpus, gpus=role.num_gpus)
        for name, role in roles
        for index in range(role.count)
    ]


def check_fits(wanted: Sequence[Reservation], nodes: Sequence[dict[str, float]]) -> None:
    """Refuse what these nodes (resources each has in all) could never hold.

    Raises: ValueError with the numbers asked for and there, and the keys to change.
    """
    remedy = "lower placement.*.count, num_cpus or num_gpus, or add nodes"
    for resource in ("CPU", "GPU"):
        shares = {w.name: w.bundle.get(resource, 0.0) for w in wanted}
        largest, total = max(shares, key=shares.__getitem__), sum(shares.values())
        there = sum(n.get(resource, 0.0) for n in nodes)
        biggest = max((n.get(resource, 0.0) for n in nodes), default=0.0)
        if total > there + 1e-9:
            raise ValueError(
                f"the {len(wanted)} processes of this run reserve {total:g} {resource}s, the cluster of {len(nodes)} "
                f"node(s) has {there:g}: {remedy}"
            )
        if shares[largest] > biggest + 1e-9:
            raise ValueError(
                f"{largest} reserves {shares[largest]:g} {resource}s on one node, the largest has {biggest:g}: {remedy}"
            )


class Cluster(RoleStarter):
    """All processes of one run; `close` ends every one of them."""

    def __init__(self, placement: PlacementConfig, *, timeout_s: float, with_verifiers: bool = False) -> None:
        """Reserve the resources of the whole run at once.

        Raises: ValueError if the cluster is too small, TimeoutError if others hold what is needed.
        """
        super().__init__(placement)
        self._timeout_s = timeout_s
        self._wanted = reservations(placement, with_verifiers=with_verifiers)
        check_fits(self._wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self._group: PlacementGroup = placement_group([w.bundle for w in self._wanted], strategy=placement.strategy)
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            remove_placement_group(self._group)
            raise TimeoutError(
                f"no room for {[w.bundle for w in self._wanted]} with strategy {placement.strategy} after "
                f"{PLACEMENT_TIMEOUT_S:g} s; free now: {free}. Wait for other jobs, or change placement.*"
            )
        self._actors: list[ray.actor.ActorHandle] = []

    def put(self, value: object) -> ray.ObjectRef:
        """A reference to a value."""
        return ray.put(value)

    async def fetch(self, reference: ray.ObjectRef) -> object:
        """The value of a reference, brought to this process."""
        return await reference

    def close(self) -> None:
        """End every process of the run and give its resources back."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _host(
        self, name: str, role: RoleConfig, target: str, kwargs: dict[str, object], environment: dict[str, str]
    ) -> list[RemoteObject]:
        # Named after the worker's class, so that Ray's dashboard and its errors show which role it is.
        host_class = type(target.split(":")[1], (Host,), {})
        remote_class = ray.remote(concurrency_groups={BESIDE: 1})(host_class)
        started = []
        for index in range(role.count):
            label = f"{name} {index}"
            place = next(i for i, wanted in enumerate(self._wanted) if wanted.name == label)
            actor = remote_class.options(
                num_cpus=role.num_cpus,
                num_gpus=role.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place),
                runtime_env={"env_vars": environment},
            ).remote(target, kwargs, time.time())
            self._actors.append(actor)
            started.append(RemoteObject(label, actor, timeout_s=self._timeout_s))
        return started
