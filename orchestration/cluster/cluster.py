"""The only file that says `ray.remote`: places the three roles, starts them, and turns calls into awaitables.

Workers are plain classes; a `Host` actor builds one inside its process, by import path, so that the driver never
imports an engine. Every call has a deadline. Payloads pass by reference: `call_each` returns a small summary and an
object reference for each result.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.cluster.control import NAMESPACE, Answer, ControlActor, ScaleRequest
from orchestration.cluster.role_starter import ProcessSpec, RoleStarter, build
from orchestration.config import PlacementConfig

CONCURRENT = "beside"
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

    def call_parts(self, method: str, *args: object) -> Iterator[object]:
        """What the method yields, one after the other."""
        yield from getattr(self._object, method)(*args)

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

    async def call_concurrently(self, method: str, *args: object, **kwargs: object) -> object:
        """As `call`, in a thread of its own: it need not wait until another call has ended."""
        return await self._within_deadline(method, self._beside(method, *args, **kwargs))

    def notify(self, method: str, *args: object) -> None:
        """As `call_concurrently`, for a method that cannot fail: nobody waits for it, and its result is nobody's."""
        self._beside(method, *args)

    async def call_parts(self, method: str, *args: object) -> tuple[list[ray.ObjectRef], object]:
        """For a method that yields: all but the last as references, each in the store before the next is made; the
        last one here."""
        stream = self._actor.call_parts.options(num_returns="streaming").remote(method, *args)
        *parts, last = await self._within_deadline(method, _all(stream))
        return parts, await self._within_deadline(method, last)

    async def call_on(self, method: str, items: Sequence[object]) -> object:
        """Result of the method on a list of items, each a value or a reference."""
        return await self._within_deadline(method, self._actor.call_on.remote(method, *items))

    async def call_each(self, method: str, items: Sequence[object]) -> list[tuple[object, ray.ObjectRef]]:
        """(summary, reference) of the result for each item."""
        summaries, *results = self._actor.call_each.options(num_returns=len(items) + 1).remote(method, *items)
        return list(zip(await self._within_deadline(method, summaries), results, strict=True))

    def _beside(self, method: str, *args: object, **kwargs: object) -> ray.ObjectRef:
        return self._actor.call.options(concurrency_group=CONCURRENT).remote(method, *args, **kwargs)

    async def _within_deadline(self, method: str, result: Awaitable[object]) -> object:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await result
        except RayTaskError:
            raise  # the method's own error, which may be a TimeoutError too
        except TimeoutError as error:
            raise TimeoutError(
                f"{self.name} did not answer {method}() within {self._timeout_s:g} s; see its log in Ray's session "
                "folder, or raise asynchrony.request_timeout_s"
            ) from error
        except RayActorError as error:
            raise RuntimeError(f"{self.name} died during {method}(): {error}") from error


async def _all(stream: ray.ObjectRefGenerator) -> list[ray.ObjectRef]:
    return [reference async for reference in stream]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """One process to place."""

    role: str
    number: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """What the process is called."""
        return f"{self.role} {self.number}"

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
        Reservation(role=name, number=index, cpus=role.num_cpus, gpus=role.num_gpus)
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a process runs: a bundle of the run's own reservation, or a reservation for this process alone."""

    group: PlacementGroup
    bundle: int


class Cluster(RoleStarter):
    """All processes of one run; `close` ends every one of them."""

    def __init__(self, placement: PlacementConfig, *, timeout_s: float, with_verifiers: bool = False) -> None:
        """Reserve the resources of the whole run at once.

        Raises: ValueError if the cluster is too small, TimeoutError if others hold what is needed.
        """
        self._timeout_s = timeout_s
        wanted = reservations(placement, with_verifiers=with_verifiers)
        check_fits(wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self._group = placement_group([w.bundle for w in wanted], strategy=placement.strategy)
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            remove_placement_group(self._group)
            raise TimeoutError(
                f"no room for {[w.bundle for w in wanted]} with strategy {placement.strategy} after "
                f"{PLACEMENT_TIMEOUT_S:g} s; free now: {_free()}. Wait for other jobs, or change placement.*"
            )
        self._places: dict[str, list[_Place]] = {}
        """Free places of the run's reservation, by role."""
        for index, one in enumerate(wanted):
            self._places.setdefault(one.role, []).append(_Place(self._group, index))
        self._num_started: dict[str, int] = {}
        self._actors: dict[RemoteObject, tuple[ray.actor.ActorHandle, str, _Place]] = {}

    def start(self, spec: ProcessSpec) -> list[RemoteObject]:
        """All processes of one role, in the places reserved for them."""
        return [self._launch(spec, self._places[spec.name].pop(0)) for _ in range(spec.role.count)]

    async def add(self, spec: ProcessSpec) -> RemoteObject:
        """One more process: in a place that another one left, or in a new one.

        Raises: ValueError, with the numbers, if the cluster has no room for it.
        """
        places = self._places.get(spec.name)
        return self._launch(spec, places.pop(0) if places else await _reserve(spec))

    def remove(self, remote: RemoteObject) -> None:
        """End one process and give its resources back."""
        actor, name, place = self._actors.pop(remote)
        ray.kill(actor)
        if place.group is self._group:
            self._places[name].append(place)
        else:
            remove_placement_group(place.group)

    def control(self, run: str) -> "DriverControl":
        """Where requests to scale this run are handed in."""
        return DriverControl(run)

    def put(self, value: object) -> ray.ObjectRef:
        """A reference to a value."""
        return ray.put(value)

    async def fetch(self, reference: ray.ObjectRef) -> object:
        """The value of a reference, brought to this process."""
        return await reference

    def close(self) -> None:
        """End every process of the run and give its resources back."""
        for remote in list(self._actors):
            self.remove(remote)
        remove_placement_group(self._group)

    def _launch(self, spec: ProcessSpec, place: _Place) -> RemoteObject:
        # Named after the worker's class, so that Ray's dashboard and its errors show which role it is.
        host_class = type(spec.target.split(":")[1], (Host,), {})
        actor = (
            ray.remote(concurrency_groups={CONCURRENT: 1})(host_class)
            .options(
                num_cpus=spec.role.num_cpus,
                num_gpus=spec.role.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    place.group, placement_group_bundle_index=place.bundle
                ),
                runtime_env={"env_vars": spec.environment},
            )
            .remote(spec.target, spec.kwargs, time.time())
        )
        number = self._num_started.get(spec.name, 0)
        self._num_started[spec.name] = number + 1
        remote = RemoteObject(f"{spec.name} {number}", actor, timeout_s=self._timeout_s)
        self._actors[remote] = (actor, spec.name, place)
        return remote


class DriverControl:
    """The driver's side of a ControlActor in a Ray actor of its own."""

    def __init__(self, run: str) -> None:
        """Start the control actor of the run with this name.

        Raises: ValueError if a run of this name has one.
        """
        options = {"name": run, "namespace": NAMESPACE, "num_cpus": 0}
        self._actor = ray.remote(ControlActor).options(**options).remote()

    async def next_request(self) -> ScaleRequest:
        """The next request, as soon as somebody hands one in."""
        return await self._actor.next_request.remote()

    async def answer(self, answer: Answer) -> None:
        """What became of the request that was taken last."""
        await self._actor.answer.remote(answer)


def submit_scale_request(request: ScaleRequest, *, run: str | None, timeout_s: float) -> Answer:
    """Hand a request to the control actor of a running job, from any process that can join its cluster.

    Raises: ConnectionError without a cluster; ValueError if there is no such run, or more than one and none is named;
    TimeoutError if no answer comes.
    """
    ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    try:
        runs = sorted(a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE)
        if run is None and len(runs) != 1:
            raise ValueError(f"{len(runs)} runs are going on ({', '.join(runs) or 'none'}); name one with --run")
        if run is not None and run not in runs:
            raise ValueError(f"no run {run!r} is going on in this cluster; there are: {', '.join(runs) or 'none'}")
        control = ray.get_actor(run or runs[0], namespace=NAMESPACE)
        return ray.get(control.submit.remote(request), timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(
            f"no answer within {timeout_s:g} s (--timeout-s); the run's log says what it is doing"
        ) from error
    except RayActorError as error:
        raise ConnectionError(f"the run ended before it answered: {error}") from error
    finally:
        ray.shutdown()


async def _reserve(spec: ProcessSpec) -> _Place:
    """A reservation for one process alone.

    Raises: ValueError, with the numbers, if nobody gives it room in time.
    """
    bundle = Reservation(role=spec.name, number=0, cpus=spec.role.num_cpus, gpus=spec.role.num_gpus).bundle
    group = placement_group([bundle])
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            await group.ready()
    except TimeoutError as error:
        remove_placement_group(group)
        raise ValueError(
            f"no node has room for one more {spec.name} ({bundle}) within {PLACEMENT_TIMEOUT_S:g} s; free now: "
            f"{_free()}"
        ) from error
    return _Place(group, 0)


def free_places(spec: ProcessSpec) -> int:
    """How many more processes of this role the cluster's free resources would hold, all nodes taken together."""
    bundle = Reservation(role=spec.name, number=0, cpus=spec.role.num_cpus, gpus=spec.role.num_gpus).bundle
    free = _free()
    return int(min(free.get(resource, 0.0) / amount + 1e-9 for resource, amount in bundle.items()))


def _free() -> dict[str, float]:
    return {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
