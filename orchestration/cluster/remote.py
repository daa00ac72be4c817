"""One process as its callers see it: the methods of the worker in it, typed, each with a wait in between.

A method is named by the function itself, `remote.call(LearnerWorker.cross_entropy, documents)`, so that a type checker
compares arguments and result with its signature. The receiver is found by the function's name (`host.Host`), so a fake
with methods of these names will do. Knows nothing of Ray.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, Generic, NoReturn, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Result = TypeVar("Result")
Last = TypeVar("Last")
Summary = TypeVar("Summary")
Worker = TypeVar("Worker", covariant=True)


class Reference(Generic[T_co]):
    """Something in the object store: it travels between processes without passing through this one.

    A type only: with Ray it is an `ObjectRef`, in one process the thing itself.
    """


def arriving(reference: Reference[T]) -> T:
    """The reference as an argument of a call, where its value arrives in its place (but not inside of an object)."""
    return cast(T, reference)


class ProcessFailure(RuntimeError):
    """A process could not do what it was asked for. The message names both."""

    def __init__(self, process: str, text: str) -> None:
        super().__init__(text)
        self.process = process
        """Its name."""


class ProcessLost(ProcessFailure):
    """It died, or it does not answer: nothing can be asked of it any more."""


@contextmanager
def failing(process: str) -> Iterator[None]:
    """Inside, whatever a call to this process raises is a failure of the process, however it came about."""
    try:
        yield
    except ProcessFailure:
        raise
    except Exception as error:
        raise ProcessFailure(process, f"{process} failed: {error}") from error


@dataclass(frozen=True, slots=True)
class Identity:
    """Where a process is."""

    node: str
    """Name of the machine."""
    pid: int


class Remote(ABC, Generic[Worker]):
    """A worker in a process of its own, or of this one. Calls wait for each other unless documented otherwise.

    Raises, in every method: ProcessLost if the process died or does not answer (it names the process and the method),
    the method's own error otherwise.
    """

    name: str
    """Such as `rollout worker 0`."""

    @property
    @abstractmethod
    def in_flight(self) -> frozenset[str]:
        """Methods that are being called now."""

    @abstractmethod
    async def harm(self, how: str) -> None:
        """Make it fail on purpose: SIGKILL, SIGSTOP, `exception` in its next call, or `hang` there."""

    @abstractmethod
    async def identity(self) -> Identity:
        """Where it is."""

    @abstractmethod
    async def lost(self) -> NoReturn:
        """Waits, as long as the process lives and answers, whether it has work or not."""

    @abstractmethod
    async def startup(self) -> dict[str, float]:
        """Start-up seconds by stage, as soon as the worker is built."""

    @abstractmethod
    async def call(self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Result of the method."""

    @abstractmethod
    async def call_concurrently(
        self, method: Callable[Concatenate[Worker, P], Result], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """As `call`, in a thread of its own: it need not wait until another call has ended."""

    @abstractmethod
    def notify(self, method: Callable[Concatenate[Worker, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """As `call_concurrently`, but fire-and-forget; an error of the method is logged."""

    @abstractmethod
    async def stream(
        self,
        method: Callable[Concatenate[Worker, P], Generator[T, None, Last]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[list[Reference[T]], Last]:
        """What the method yields, as references, each in the store before the next is made; and what it returns."""

    @abstractmethod
    async def call_each(
        self,
        method: Callable[[Worker, list[T]], Sequence[Result]],
        items: Sequence[T],
        summary: Callable[[Result], Summary],
    ) -> list[tuple[Summary, Reference[Result]]]:
        """For a method with one result for each item: the results' summaries, and references to the results."""
