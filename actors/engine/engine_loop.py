"""Whose turn it is at an in-process engine: requests of one thread, and new weights that another thread brings.

At any moment one thread at most drives the engine: it adds requests, steps, and takes what is finished. Weights change
between two steps, by the hand of the thread that drives:

    idle   -- run: add, step until all is finished ----------------> idle
    idle   -- load: install, step until the probes are finished ---> idle
    in run -- between two steps, unless in_flight_updates = wait --> in run, with new weights
    in run -- at steps that are planned: a replay -----------------> in run, with the weights of the plan

Guarantees: no request begins while weights wait to be loaded or have not been judged; weights that fail leave the
engine quarantined, and a request they met, or that was running when they failed, raises and returns nothing. A thread
waits only for the one that drives, whose turn ends even when it fails.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from actors.config import InFlightUpdates
from actors.rollout import WeightSteps
from actors.weights.manifest import WeightMismatchError


@runtime_checkable
class Finished(Protocol):
    """What the engine tells of a request."""

    request_id: str
    finished: bool


@runtime_checkable
class Engine(Protocol):
    """The verbs of vLLM's `LLMEngine` that are used here."""

    def add_request(self, request_id: str, prompt: object, params: object) -> str: ...

    def step(self) -> list[Finished]: ...

    def abort_request(self, request_ids: list[str], internal: bool) -> None: ...

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool: ...

    def set_weight_version(self, weight_version: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt and how it is to be completed, in the engine's own types."""

    prompt: object
    params: object


@dataclass(slots=True, kw_only=True, eq=False)
class WeightLoad:
    """Verified weights on their way into the engine; the thread that drives notes what became of them."""

    policy_version: int
    install: Callable[[], None]
    """Puts them into the engine; called between two steps by the thread that drives."""
    probes: Sequence[EngineRequest]
    """Texts that the new weights are judged by."""
    judge: Callable[[list], float]
    """From the finished probes to their error [nats]. Raises: WeightMismatchError where it is too large."""
    prepare_s: float
    """Time that was spent on them before, while the engine went on [s]."""
    pause_s: float = field(init=False)
    """Time in which the engine could not step: weights and caches [s]."""
    probe_s: float = field(init=False)
    """From there to the verdict [s]; requests that go on share these steps."""
    probe_error: float = field(init=False)
    """What `judge` returned [nats]."""
    failure: WeightMismatchError | None = None
    """What `judge` raised."""
    judged: bool = False
    installed_at: float = field(init=False)
    """On the clock of time.perf_counter [s]."""

    def __post_init__(self) -> None:
        if not self.probes:
            raise ValueError(
                f"weights of version {self.policy_version} came without probe texts, so nothing can tell whether the "
                "engine computes with them; publish at least one text"
            )


class EngineLoop:
    """Drives an engine for one thread that samples and one that brings weights."""

    def __init__(self, engine: Engine, *, in_flight_updates: InFlightUpdates) -> None:
        """The engine holds the initial checkpoint, which is policy version 0."""
        self._engine = engine
        self._in_flight_updates = in_flight_updates
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_locked = False
        self._load: WeightLoad | None = None  # the one slot for weights that wait or are being judged
        self._policy_version: int | None = 0
        engine.set_weight_version("0")

    @property
    def policy_version(self) -> int | None:
        """Version of the newest weights that were judged good; None: quarantined."""
        return self._policy_version

    def quarantine(self) -> None:
        """Let nobody sample until weights are loaded and judged good; a running request raises at its next step."""
        with self._changed:
            self._policy_version = None

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The right to `run`, and the version that a request begins with; waits until nobody drives or brings weights.

        Raises: RuntimeError if the engine is quarantined.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_locked and self._load is None)
            policy_version = self._policy_version
            if policy_version is None:
                raise RuntimeError(
                    "this worker's last weight update failed its checks; it samples again after a good one"
                )
            self._is_locked = True
        try:
            yield policy_version
        finally:
            self._unlock()

    def run(
        self,
        requests: Sequence[EngineRequest],
        *,
        admits: Callable[[int, int], bool] = lambda step, version: True,
        planned: Iterable[WeightLoad] = (),
    ) -> tuple[list, WeightSteps]:
        """Final outputs, in the order of the requests, and the weights that these met; the caller holds the turn.

        Weights that `admits` refuses before an engine step, counted from 0, wait for a later one, or until the requests
        are finished, whatever in_flight_updates is; so do those that come after a restart, or updates faster than
        requests would keep these from ever finishing. `planned` are brought by this thread, one after the other.

        Raises: WeightMismatchError if weights failed their checks meanwhile.
        """
        batch, probes = _Batch(self._engine, self._numbers), _Batch(self._engine, self._numbers)
        coming, met, step, restarted = iter(planned), [(0, self._policy_version)], 0, False
        with ExitStack() as at_end:
            at_end.callback(batch.abort)
            at_end.callback(probes.abort)
            batch.add(requests)
            while batch.is_open or probes.is_open:
                load = self._load or self._offer_next(coming, at_end)
                if load is not None and not (probes.is_open or restarted) and admits(step, load.policy_version):
                    if self._in_flight_updates == "keep":
                        self._install(load)
                        probes.add(load.probes)
                        met.append((step, load.policy_version))
                    elif self._in_flight_updates == "abort":
                        self._begin_anew(load, requests, batch)
                        met, restarted = [(0, load.policy_version)], True
                self._step(batch, probes)
                step += 1
                if probes.is_finished:
                    self._judge(load, probes.take_outputs())
                self._require_verified()
            return batch.take_outputs(), tuple(met)

    def load(self, load: WeightLoad) -> None:
        """Bring these weights into the engine, as soon as the thread that drives it lets them in, and judge them.

        Raises: WeightMismatchError if they fail; the engine is then quarantined, as it is after any other failure.
        """
        self._offer(load)
        try:
            if self._is_left_to_this_thread(load):
                try:
                    self._load_alone(load)
                finally:
                    self._unlock()
        finally:
            self._withdraw(load)
        if load.failure is not None:
            raise load.failure

    def _offer(self, load: WeightLoad) -> None:
        with self._changed:
            assert self._load is None, "one thread at a time brings weights"
            self._load = load  # which ends nobody's wait

    def _is_left_to_this_thread(self, load: WeightLoad) -> bool:
        """Wait for the thread that drives: False once it has judged the weights, True (and the turn) if it is done."""
        with self._changed:
            self._changed.wait_for(lambda: load.judged or not self._is_locked)
            self._is_locked |= not load.judged
            return not load.judged

    def _withdraw(self, load: WeightLoad) -> None:
        with self._changed:
            if self._load is load:
                self._load = None
            if not load.judged:  # the engine may hold part of them
                self._policy_version = None
            self._changed.notify_all()

    def _unlock(self) -> None:
        with self._changed:
            self._is_locked = False
            self._changed.notify_all()

    def _offer_next(self, coming: Iterator[WeightLoad], at_end: ExitStack) -> WeightLoad | None:
        load = next(coming, None)
        if load is not None:
            at_end.callback(self._withdraw, load)
            self._offer(load)
        return load

    def _begin_anew(self, load: WeightLoad, requests: Sequence[EngineRequest], batch: "_Batch") -> None:
        batch.abort()
        self._load_alone(load)
        self._require_verified()
        batch.add(requests)

    def _install(self, load: WeightLoad) -> None:
        """Replace the weights and forget what the old ones computed: cached prefixes, and keys and values in use.

        Requests in the middle of their completions compute theirs anew at the next step, from all their tokens so far.
        """
        start = time.perf_counter()
        load.install()
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise WeightMismatchError(
                f"after loading version {load.policy_version} the engine refused to drop its prefix cache, which holds "
                "keys and values of the old weights; is another thread stepping it?"
            )
        self._engine.set_weight_version(str(load.policy_version))
        load.installed_at = time.perf_counter()
        load.pause_s = load.installed_at - start

    def _load_alone(self, load: WeightLoad) -> None:
        self._install(load)
        probes = _Batch(self._engine, self._numbers)
        try:
            probes.add(load.probes)
            while probes.is_open:
                self._step(probes)
            self._judge(load, probes.take_outputs())
        finally:
            probes.abort()

    def _judge(self, load: WeightLoad, outputs: list) -> None:
        try:
            load.probe_error = load.judge(outputs)
        except WeightMismatchError as error:
            load.failure = error
        load.probe_s = time.perf_counter() - load.installed_at
        with self._changed:
            load.judged = True
            self._load = None
            self._policy_version = None if load.failure is not None else load.policy_version
            self._changed.notify_all()

    def _step(self, *batches: "_Batch") -> None:
        for output in self._engine.step():
            for batch in batches:
                batch.collect(output)

    def _require_verified(self) -> None:
        if self._policy_version is None:
            raise WeightMismatchError(
                "weights that arrived during this request failed their checks (the update says how); its completions "
                "are dropped, and this worker samples again after a good update"
            )


class _Batch:
    """Requests that were added together, and their final outputs."""

    def __init__(self, engine: Engine, numbers: Iterator[int]) -> None:
        self._engine, self._numbers = engine, numbers
        self._names: list[str] = []
        self._open: dict[str, str] = {}  # our name of a request -> the engine's own
        self._outputs: dict[str, Finished] = {}

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
            name = str(next(self._numbers))
            self._names.append(name)
            self._open[name] = self._engine.add_request(name, request.prompt, request.params)

    def collect(self, output: Finished) -> None:
        """Keep the final output of one of these requests; any other passes."""
        if output.finished and self._open.pop(output.request_id, None) is not None:
            self._outputs[output.request_id] = output

    def take_outputs(self) -> list:
        """In the order of the requests; the batch is empty afterwards."""
        names, self._names = self._names, []
        return [self._outputs.pop(name) for name in names]

    def abort(self) -> None:
        """Let the engine forget the requests that are not finished, and forget those that are."""
        if self._open:
            self._engine.abort_request(list(self._open.values()), internal=True)
        self._names, self._open, self._outputs = [], {}, {}
