"""The only file that uses `ray.remote`: reserves places for the processes of a run, starts them, and ends them.

Each worker is a plain class; a `Host` actor builds one inside its process.
"""

import asyncio
import pickle
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.cluster.control import NAMESPACE, ControlActor, DriverControl, control_name
from orchestration.cluster.deadlines import Deadlines
from orchestration.cluster.host import Host
from orchestration.cluster.placement import Reservation, check_fits, reservations
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import Reference, Remote, T
from orchestration.cluster.remote_actor import CONCURRENT, PULSE, RemoteActor
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import PlacementConfig

PLACEMENT_TIMEOUT_S = 30.0
"""How long the reservation of all processes may take once the cluster is known to be large enough [s]."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a process runs: a bundle of the run's own reservation, or a reservation for this process alone."""

    group: PlacementGroup
    bundle: int


class Cluster(RoleStarter):
    """All processes of one run; `close` ends every one of them."""

    def __init__(self, placement: PlacementConfig, *, timeout_s: float, with_verifiers: bool = False) -> None:
        """Reserve the resources of the whole run at once.

        Raises: ValueError if the cluster is too small, TimeoutError if other jobs hold what is needed.
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
        self._deadlines: dict[str, Deadlines] = {}
        self._actors: dict[RemoteActor[object], tuple[ActorHandle[Host], str, _Place]] = {}

    def start(self, spec: ProcessSpec[T]) -> list[Remote[T]]:
        """All processes of one role, in the places reserved for them."""
        return [self._launch(spec, self._places[spec.name].pop(0)) for _ in range(spec.role.count)]

    async def add(self, spec: ProcessSpec[T]) -> Remote[T]:
        """One more process: in a place that another one left, or in a new one.

        Raises: ValueError, with the numbers, if the cluster has no room for it.
        """
        places = self._places.get(spec.name)
        return self._launch(spec, places.pop(0) if places else await _reserve(spec))

    def remove(self, remote: Remote[object]) -> None:
        """End one process and release its resources."""
        assert isinstance(remote, RemoteActor)
        actor, name, place = self._actors.pop(remote)
        remote.forget()
        ray.kill(actor)
        if place.group is self._group:
            self._places[name].append(place)
        else:
            remove_placement_group(place.group)

    def control(self, folder: str) -> DriverControl:
        """Where requests to scale this run arrive: at a control actor that is named after its folder.

        Ray starts it anew if its process dies; if it was killed on purpose, the run goes on without.
        Raises: ValueError if a run in this folder has one; that of a driver that was killed goes within moments.
        """
        options = {"name": control_name(folder), "namespace": NAMESPACE, "num_cpus": 0}
        options |= {"max_restarts": -1, "max_task_retries": -1}
        actor_class = ray.remote(ControlActor).options(**options)
        deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
        while True:
            try:
                return DriverControl(cast(ActorHandle[ControlActor], actor_class.remote()))
            except ValueError:  # the name is taken
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def put(self, value: T) -> Reference[T]:
        """A reference to a value."""
        return cast(Reference[T], ray.put(value))

    async def fetch(self, reference: Reference[T]) -> T:
        """The value of a reference, brought to this process.

        Raises: RuntimeError if it is lost, TimeoutError if it does not come.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await cast(Awaitable[T], reference)
        except RayError as error:
            raise RuntimeError(f"what a process had kept is lost, with its node: {type(error).__name__}") from error

    def close(self) -> None:
        """End every process of the run and release its resources."""
        for remote in list(self._actors):
            self.remove(remote)
        remove_placement_group(self._group)

    def _launch(self, spec: ProcessSpec[T], place: _Place) -> RemoteActor[T]:
        # Named after the worker's class, so that Ray's dashboard and its errors show which role it is.
        host_class = type(spec.worker_class, (Host,), {})
        actor_class = ray.remote(concurrency_groups={CONCURRENT: 2, PULSE: 1})(host_class)  # pyrefly: ignore[unexpected-keyword]
        options = actor_class.options(
            num_cpus=spec.role.num_cpus,
            num_gpus=spec.role.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                place.group, placement_group_bundle_index=place.bundle
            ),
            runtime_env={"env_vars": spec.environment},
        )
        actor = cast(ActorHandle[Host], options.remote(pickle.dumps(spec.build), time.time()))
        number = self._num_started.get(spec.name, 0)
        self._num_started[spec.name] = number + 1
        deadlines = self._deadlines.setdefault(spec.name, Deadlines(self._timeout_s))
        remote: RemoteActor[T] = RemoteActor(f"{spec.name} {number}", actor, deadlines=deadlines)
        self._actors[remote] = (actor, spec.name, place)
        return remote


async def _reserve(spec: ProcessSpec[object]) -> _Place:
    """A reservation for one process alone.

    Raises: ValueError, with the numbers, if no node has room for it in time.
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


def free_places(spec: ProcessSpec[object]) -> int:
    """How many more processes of this role the cluster's free resources would hold, all nodes taken together."""
    bundle = Reservation(role=spec.name, number=0, cpus=spec.role.num_cpus, gpus=spec.role.num_gpus).bundle
    free = _free()
    return int(min(free.get(resource, 0.0) / amount + 1e-9 for resource, amount in bundle.items()))


def _free() -> dict[str, float]:
    return {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
