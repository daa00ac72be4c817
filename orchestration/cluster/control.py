"""Where requests to scale a running job are handed in: a small named Ray actor beside the driver.

The command `scale.py` submits a request and waits for the answer; the driver takes requests one after the other and
answers each. Both sides give up by a deadline, so a driver that died leaves nobody waiting.
"""

import asyncio
from dataclasses import dataclass

NAMESPACE = "async-ebft"
"""Ray namespace of the control actors of all runs; each has the name of its run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """How many processes of a role there shall be; None: as many as there are."""

    rollout_workers: int | None = None
    feature_servers: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    accepted: bool
    text: str
    """One line a change, or the reason of the refusal."""


class ControlActor:
    """The actor's body; every method is a coroutine, so that all may wait at the same time."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[tuple[ScaleRequest, asyncio.Future[Answer]]] = asyncio.Queue()
        self._current: asyncio.Future[Answer] | None = None

    async def submit(self, request: ScaleRequest) -> Answer:
        """Hand in a request; returns its answer."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._requests.put((request, answer))
        return await answer

    async def next_request(self) -> ScaleRequest:
        """For the driver: the next request, as soon as there is one."""
        request, self._current = await self._requests.get()
        return request

    async def answer(self, answer: Answer) -> None:
        """For the driver: what became of the request it took last."""
        self._current.set_result(answer)
