"""Requests given to an engine together, and their final outputs in the same order.

The engine reports on all requests at once. Each batch picks out its own by their names, which no two requests of an
engine share, so that a batch of prompts and one of probe texts can share the engine's steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Finished(Protocol):
    """What the engine reports about a request."""

    request_id: str
    finished: bool


Output = TypeVar("Output", bound=Finished)
Output_co = TypeVar("Output_co", bound=Finished, covariant=True)


@runtime_checkable
class Engine(Protocol[Output_co]):
    """The methods of vLLM's `LLMEngine` that are used here."""

    def add_request(self, request_id: str, prompt: object, params: object) -> str: ...

    def step(self) -> Sequence[Output_co]: ...

    def abort_request(self, request_ids: list[str], internal: bool) -> None: ...

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool: ...

    def set_weight_version(self, weight_version: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt and how it is to be completed, in the engine's own types."""

    prompt: object
    params: object


class RequestBatch(Generic[Output]):
    """As a context it aborts, at its end, the requests that the engine has not finished."""

    def __init__(self, engine: Engine[Output], names: Iterator[str]) -> None:
        """`names` are shared by all batches of the engine and never repeat."""
        self._engine, self._unused_names = engine, names
        self._names: list[str] = []
        self._open: dict[str, str] = {}  # our name of a request -> the engine's own
        self._outputs: dict[str, Output] = {}

    def __enter__(self) -> "RequestBatch[Output]":
        return self

    def __exit__(self, *failure: object) -> None:
        self.abort()

    @property
    def is_open(self) -> bool:
        """Whether the engine has yet to finish a request."""
        return bool(self._open)

    @property
    def is_finished(self) -> bool:
        """Whether outputs of all requests wait to be taken."""
        return bool(self._names) and not self._open

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand the requests to the engine, in order."""
        self._names = []
        for request in requests:
            name = next(self._unused_names)
            self._names.append(name)
            self._open[name] = self._engine.add_request(name, request.prompt, request.params)

    def collect(self, output: Output) -> None:
        """Keep the final output of one of these requests; ignore any other."""
        if output.finished and self._open.pop(output.request_id, None) is not None:
            self._outputs[output.request_id] = output

    def take_outputs(self) -> list[Output]:
        """In the order of the requests; the batch is empty afterwards."""
        names = self._names
        self._names = []
        return [self._outputs.pop(name) for name in names]

    def abort(self) -> None:
        """Abort the unfinished requests in the engine, and discard the outputs of the finished ones."""
        if self._open:
            self._engine.abort_request(list(self._open.values()), internal=True)
        self._names = []
        self._open = {}
        self._outputs = {}
