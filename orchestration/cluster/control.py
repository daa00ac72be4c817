"""How requests to scale a running job reach it: through a control actor, a small named Ray actor next to the driver.

The command `scale.py` submits a request and waits for the answer; the driver takes requests one after the other and
answers each. Both sides give up at a deadline, so nothing waits for a driver that died.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

NAMESPACE = "async-ebft"
"""Ray namespace of the control actors of all runs; each has the name of its run's folder."""


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

    async def submit(self, request: ScaleRequest) -> Answer:
        """Submit a request; returns its answer."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._requests.put((request, answer))
        return await answer

    async def next_request(self) -> ScaleRequest:
        """For the driver: the next request, as soon as there is one."""
        request, self._current = await self._requests.get()
        return request

    async def answer(self, answer: Answer) -> None:
        """For the driver: the outcome of the request it took last."""
        assert self._current is not None, "answers follow requests"
        self._current.set_result(answer)


class DriverControl:
    """The driver's side of a ControlActor in a Ray actor of its own."""

    def __init__(self, actor: ActorHandle[ControlActor]) -> None:
        self._actor = actor

    async def next_request(self) -> ScaleRequest:
        """The next request, as soon as one is submitted."""
        return await self._actor.next_request.remote()

    async def answer(self, answer: Answer) -> None:
        """The outcome of the request that was taken last."""
        await self._actor.answer.remote(answer)


def submit_scale_request(request: ScaleRequest, *, run: str | None, timeout_s: float) -> Answer:
    """Submit a request to the control actor of a running job, from any process that can join its cluster.

    Raises: ConnectionError without a cluster; ValueError if there is no such run, or more than one and none is named;
    TimeoutError if no answer comes.
    """
    ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    try:
        runs = sorted(a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE)
        if run is None and len(runs) != 1:
            raise ValueError(f"{len(runs)} runs are active ({', '.join(runs) or 'none'}); name one with --run")
        if run is not None and run not in runs:
            raise ValueError(f"no run {run!r} is active in this cluster; there are: {', '.join(runs) or 'none'}")
        control = ray.get_actor(run or runs[0], namespace=NAMESPACE)
        return cast(Answer, ray.get(control.submit.remote(request), timeout=timeout_s))
    except GetTimeoutError as error:
        raise TimeoutError(
            f"no answer within {timeout_s:g} s (--timeout-s); the run's log says what it is doing"
        ) from error
    except RayActorError as error:
        raise ConnectionError(f"the run ended before it answered: {error}") from error
    finally:
        ray.shutdown()
