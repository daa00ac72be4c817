"""How requests to scale a running job reach it: through a control actor, a small named Ray actor next to the driver.

The command `scale.py` submits a request and waits for the answer; the driver takes requests one after the other and
answers each. Whoever may join the cluster may submit: what arrives is checked here, and the loss of the actor costs the
run its scaling and nothing else.
"""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

NAMESPACE = "async-ebft"
"""Ray namespace of the control actors of all runs."""


class ControlLostError(Exception):
    """The control actor is gone, or does not do what it should."""


def control_name(folder: str) -> str:
    """Name of the control actor of the run in this folder of this machine; no two runs share it."""
    return f"{socket.gethostname()}:{folder}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """Wanted number of processes of each role; None: unchanged."""

    rollout_workers: int | None = None
    feature_servers: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a request."""

    accepted: bool
    text: str
    """One line per change, or the reason for the refusal."""


class ControlActor:
    """The actor's body; every method is a coroutine, so that all may wait at the same time."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[tuple[ScaleRequest, asyncio.Future[Answer]]] = asyncio.Queue()
        self._current: asyncio.Future[Answer] | None = None

    async def submit(self, request: object) -> Answer:
        """Submit a request; returns its answer, a refusal at once if it is none."""
        wrong = reason_to_refuse(request)
        if wrong is not None:
            return Answer(False, wrong)
        assert isinstance(request, ScaleRequest)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._requests.put((request, answer))
        return await answer

    async def next_request(self) -> ScaleRequest:
        """For the driver: the next request, as soon as there is one."""
        request, self._current = await self._requests.get()
        return request

    async def answer(self, answer: Answer) -> None:
        """For the driver: the outcome of the request it took last; forgotten if this actor was started anew since."""
        if self._current is not None and not self._current.done():
            self._current.set_result(answer)


def reason_to_refuse(request: object) -> str | None:
    """Why this is no request; None if it is one."""
    if not isinstance(request, ScaleRequest):
        return f"a request must be a ScaleRequest, got {type(request).__name__}; use orchestration/scale.py"
    for field in fields(request):
        value = getattr(request, field.name, None)
        if value is not None and type(value) is not int:
            return f"{field.name}={value!r} must be a whole number"
    return None


class DriverControl:
    """The driver's side of a ControlActor in a Ray actor of its own."""

    def __init__(self, actor: ActorHandle[ControlActor]) -> None:
        self._actor = actor

    async def next_request(self) -> ScaleRequest:
        """The next request, as soon as one is submitted. Raises: ControlLostError."""
        with _loss_named():
            return await self._actor.next_request.remote()

    async def answer(self, answer: Answer) -> None:
        """The outcome of the request that was taken last. Raises: ControlLostError."""
        with _loss_named():
            await self._actor.answer.remote(answer)


@contextmanager
def _loss_named() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        raise ControlLostError(str(error).splitlines()[0]) from error


def submit_scale_request(request: ScaleRequest, *, address: str, run: str | None) -> Answer:
    """Submit a request to the control actor of a running job, from any process that can join its cluster.

    It waits as long as it takes: who calls it ends the wait.
    Raises: ConnectionError if the run or its cluster ends; ValueError as `chosen_run`.
    """
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        active = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
        control = ray.get_actor(chosen_run(run, sorted(active)), namespace=NAMESPACE)
        return cast(Answer, ray.get(control.submit.remote(request)))
    except RayActorError as error:
        raise ConnectionError(f"the run ended before it answered: {error}") from error
    finally:
        ray.shutdown()


def chosen_run(run: str | None, active: Sequence[str]) -> str:
    """The active run of this folder, or of this folder's last name; without either, the only one.

    Raises: ValueError, with all that are active, if not exactly one is meant.
    """
    meant = [name for name in active if run is None or run in _names(name)]
    if len(meant) == 1:
        return meant[0]
    there_are = ", ".join(active) or "none"
    if run is None or meant:
        raise ValueError(f"{len(meant)} runs are active ({there_are}); name one with --run, by its folder")
    raise ValueError(f"no run {run!r} is active in this cluster; there are: {there_are}")


def _names(name: str) -> tuple[str, str, str]:
    folder = name.partition(":")[2]
    return name, folder, PurePath(folder).name
