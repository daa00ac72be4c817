"""Calls to a worker in a Ray actor as awaitables: each has a deadline, each error names the process and the method.

What is large passes by reference.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Concatenate, cast

from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from orchestration.cluster.host import Host
from orchestration.cluster.remote import Last, P, Reference, Remote, Result, Summary, T, Worker

logger = logging.getLogger(__name__)

CONCURRENT = "concurrent"
"""Ray's concurrency group for calls that overlap with others; all other calls of an actor wait for each other."""


class RemoteActor(Remote[Worker]):
    """A worker whose Host is a Ray actor."""

    def __init__(self, name: str, actor: ActorHandle[Host], *, timeout_s: float) -> None:
        self.name = name
        self._actor = actor
        self._timeout_s = timeout_s

    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, as soon as the worker is built."""
        return await self._within_deadline("startup", self._actor.startup.remote())

    async def call(self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Result of the method."""
        name = method.__name__
        return await self._within_deadline(name, self._actor.call.remote(name, *args, **kwargs))

    async def call_concurrently(
        self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """As `call`, in the second concurrency group."""
        result = self._submit_concurrent(method.__name__, *args, **kwargs)
        return cast(Result, await self._within_deadline(method.__name__, result))

    def notify(self, method: Callable[Concatenate[Worker, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """As `call_concurrently`, but fire-and-forget."""

        def log_failure(done: Future[object]) -> None:
            error = done.exception()
            if error is not None and not isinstance(error, RayActorError):  # the next call of a dead process reports it
                logger.error("%s failed in %s(): %s", self.name, method.__name__, error)

        self._submit_concurrent(method.__name__, *args, **kwargs).future().add_done_callback(log_failure)

    async def stream(
        self,
        method: Callable[Concatenate[Worker, P], Generator[T, None, Last]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[list[Reference[T]], Last]:
        """References of what the method yields; and what it returns, here."""
        name = method.__name__
        stream = self._actor.stream.options(num_returns="streaming").remote(name, *args, **kwargs)
        *parts, last = await self._within_deadline(name, _all(stream))
        return cast(list[Reference[T]], parts), cast(Last, await self._within_deadline(name, last))

    async def call_each(
        self,
        method: Callable[[Worker, list[T]], Sequence[Result]],
        items: Sequence[T],
        summary: Callable[[Result], Summary],
    ) -> list[tuple[Summary, Reference[Result]]]:
        """(summary, reference) of the result for each item."""
        call_each = self._actor.call_each.options(num_returns=len(items) + 1)
        summaries, *results = call_each.remote(method.__name__, summary, *items)
        return list(zip(await self._within_deadline(method.__name__, summaries), results, strict=True))

    def _submit_concurrent(self, method: str, *args: object, **kwargs: object) -> ObjectRef[object]:
        return self._actor.call.options(concurrency_group=CONCURRENT).remote(method, *args, **kwargs)

    async def _within_deadline(self, method: str, result: Awaitable[T]) -> T:
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


async def _all(stream: ObjectRefGenerator) -> list[ObjectRef[object]]:
    return [reference async for reference in stream]
