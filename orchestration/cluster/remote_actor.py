"""Calls to a worker in a Ray actor as awaitables: each has a deadline, each error names the process and the method.

A process is lost when Ray says that it died, when it does not answer PULSE_S seconds long, be it at work or idle, or
when a call takes longer than its deadline (deadlines.py): then it lives, and hangs. What is large passes by reference.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Concatenate, NoReturn, cast

from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from orchestration.cluster.deadlines import Deadlines
from orchestration.cluster.host import Host
from orchestration.cluster.remote import Identity, Last, P, ProcessLost, Reference, Remote, Result, Summary, T, Worker

logger = logging.getLogger(__name__)

CONCURRENT = "concurrent"
"""Ray's concurrency group for calls that overlap with others; all other calls of an actor wait for each other."""
PULSE = "pulse"
"""That of the calls that ask whether the process lives."""
PULSE_EVERY_S = 1.0
PULSE_S = 8.0
"""Longest wait for the answer of a living process, whatever else it does [s]."""


class RemoteActor(Remote[Worker]):
    """A worker whose Host is a Ray actor."""

    def __init__(self, name: str, actor: ActorHandle[Host], *, deadlines: Deadlines) -> None:
        """`deadlines`: shared by the processes of the role."""
        self.name = name
        self._actor = actor
        self._deadlines = deadlines
        self._pulse: asyncio.Task[NoReturn] | None = None
        self._in_flight: Counter[str] = Counter()

    @property
    def in_flight(self) -> frozenset[str]:
        """Methods that are being called now."""
        return frozenset(+self._in_flight)

    async def harm(self, how: str) -> None:
        """Returns at once; a process that is killed or stopped says nothing."""
        harmed = self._actor.harm.options(concurrency_group=PULSE).remote(how)
        reply = asyncio.ensure_future(harmed)
        reply.add_done_callback(_note_end)
        await asyncio.wait([reply], timeout=0.1 if how.startswith("SIG") else PULSE_S)

    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, as soon as the worker is built."""
        return await self._answer("startup", self._actor.startup.remote(), watched=False)

    async def identity(self) -> Identity:
        """Where it is."""
        return await self._answer("identity", self._actor.identity.options(concurrency_group=PULSE).remote())

    async def lost(self) -> NoReturn:
        """Waits as long as the process answers."""
        await asyncio.shield(self._beating())
        raise AssertionError("a pulse ends by an error")

    async def call(self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Result of the method."""
        name = method.__name__
        return await self._answer(name, self._actor.call.remote(name, *args, **kwargs))

    async def call_concurrently(
        self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """As `call`, in the second concurrency group."""
        result = self._submit_concurrent(method.__name__, *args, **kwargs)
        return cast(Result, await self._answer(method.__name__, result))

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
        *parts, last = await self._answer(name, _all(stream))
        return cast(list[Reference[T]], parts), cast(Last, await self._answer(name, last))

    async def call_each(
        self,
        method: Callable[[Worker, list[T]], Sequence[Result]],
        items: Sequence[T],
        summary: Callable[[Result], Summary],
    ) -> list[tuple[Summary, Reference[Result]]]:
        """(summary, reference) of the result for each item."""
        call_each = self._actor.call_each.options(num_returns=len(items) + 1)
        summaries, *results = call_each.remote(method.__name__, summary, *items)
        return list(zip(await self._answer(method.__name__, summaries, items=len(items)), results, strict=True))

    def forget(self) -> None:
        """It was ended: nothing is to be heard from it."""
        if self._pulse is not None:
            self._pulse.cancel()

    def _submit_concurrent(self, method: str, *args: object, **kwargs: object) -> ObjectRef[object]:
        return self._actor.call.options(concurrency_group=CONCURRENT).remote(method, *args, **kwargs)

    async def _answer(self, method: str, result: Awaitable[T], *, items: int = 1, watched: bool = True) -> T:
        loop = asyncio.get_running_loop()
        start, deadline_s = loop.time(), self._deadlines.of(method, items=items)
        self._in_flight[method] += 1
        reply, pulse = asyncio.ensure_future(result), self._beating() if watched else None
        reply.add_done_callback(_note_end)
        try:
            await asyncio.wait(
                [reply] if pulse is None else [reply, pulse], timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            if reply.done():
                value = reply.result()
                self._deadlines.note(method, loop.time() - start, items=items)
                return value
            if pulse is not None and pulse.done():
                how = f"{self.name} was ended" if pulse.cancelled() else str(pulse.exception())
                raise ProcessLost(self.name, f"{how} (during {method}())")
        except RayTaskError as error:
            raise error.cause from error  # the method's own
        except RayError as error:
            raise ProcessLost(self.name, f"{self.name} died: {_first_line(error)} (during {method}())") from error
        finally:
            reply.cancel()
            self._in_flight[method] -= 1
        raise ProcessLost(
            self.name,
            f"{self.name} did not answer {method}() within {deadline_s:g} s; see its log in Ray's session folder. A "
            "call may take as long as asynchrony.request_timeout_s, but not much longer than those before it",
        )

    def _beating(self) -> asyncio.Task[NoReturn]:
        """The task that ends, by an error, when the process does not answer."""
        loop = asyncio.get_running_loop()
        if self._pulse is None or self._pulse.get_loop() is not loop or self._pulse.cancelled():
            self._pulse = loop.create_task(self._beat())
            self._pulse.add_done_callback(_note_end)
        return self._pulse

    async def _beat(self) -> NoReturn:
        pulse = self._actor.pulse.options(concurrency_group=PULSE)
        try:
            await self._actor.startup.remote()  # which has a deadline of its own
            while True:
                async with asyncio.timeout(PULSE_S):
                    await pulse.remote()
                await asyncio.sleep(PULSE_EVERY_S)
        except TimeoutError as error:
            raise ProcessLost(self.name, f"{self.name} gave no sign of life for {PULSE_S:g} s") from error
        except RayError as error:
            raise ProcessLost(self.name, f"{self.name} died: {_first_line(error)}") from error


def _note_end(task: asyncio.Future[Any]) -> None:
    """Whoever waits for it hears of its error; where no one does any more, it is not news."""
    if not task.cancelled():
        task.exception()


def _first_line(error: RayError) -> str:
    """Ray's explanations are pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    detail = next((line.partition("Worker exit detail: ")[2] for line in lines if "Worker exit detail: " in line), "")
    return detail.partition(". Some common")[0] or (lines[0] if lines else type(error).__name__)


async def _all(stream: ObjectRefGenerator) -> list[ObjectRef[object]]:
    return [reference async for reference in stream]
