"""Steps an in-process engine for two threads: one samples requests, the other loads new weights.

At any moment at most one thread holds the engine lock (`engine_lock.py`): it adds requests, steps, and takes what is
finished. Weights change between two steps, installed by the thread that holds the lock:

    idle   -- run: add, step until all is finished ----------------> idle
    idle   -- load: install, step until the probes are finished ---> idle
    in run -- between two steps, unless in_flight_updates = wait --> in run, with new weights
    in run -- at planned steps: a replay --------------------------> in run, with the weights of the plan

Guarantees: no request begins while weights wait to be loaded or have not been checked; weights that fail their check
leave the engine quarantined, and a request that has seen them, or that was running when they failed, raises and returns
nothing. A thread waits only for the one that holds the lock, which releases it even when it fails.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Generic

from actors.config import InFlightUpdates
from actors.engine.engine_lock import EngineLock
from actors.engine.request_batch import Engine, EngineRequest, Output, RequestBatch
from actors.engine.weight_load import WeightLoad
from actors.rollout import WeightSteps
from actors.weights.manifest import WeightMismatchError


class EngineLoop(Generic[Output]):
    """`locked` and `run` are called by the thread that samples, `load` by the one that loads weights."""

    def __init__(self, engine: Engine[Output], *, in_flight_updates: InFlightUpdates) -> None:
        """The engine holds the initial checkpoint, which is policy version 0."""
        self._engine = engine
        self._in_flight_updates = in_flight_updates
        self._request_names = map(str, itertools.count())
        self._lock: EngineLock[Output] = EngineLock(policy_version=0)
        engine.set_weight_version("0")

    @property
    def policy_version(self) -> int | None:
        """Version of the newest weights that passed their check; None: quarantined."""
        return self._lock.policy_version

    def quarantine(self) -> None:
        """Refuse to sample until weights pass their check; a running request raises at its next step."""
        self._lock.quarantine()

    def locked(self) -> AbstractContextManager[int]:
        """The right to `run`, and the version that a request begins with.

        Waits until no thread holds the engine lock and no weights wait to be loaded.

        Raises: RuntimeError if the engine is quarantined.
        """
        return self._lock.held_to_sample()

    def run(
        self,
        requests: Sequence[EngineRequest],
        *,
        admits: Callable[[int, int], bool] = lambda step, version: True,
        planned: Iterable[WeightLoad[Output]] = (),
    ) -> tuple[list[Output], WeightSteps]:
        """Final outputs, in the order of the requests, and the versions seen; the caller holds the engine lock.

        Weights that `admits` refuses before an engine step (counted from 0) wait for a later one, or until the requests
        are finished, whatever in_flight_updates is. So do those that arrive after a restart: updates faster than
        requests would otherwise keep these from ever finishing. This thread loads the `planned` ones in order.

        Raises: WeightMismatchError if weights failed their check meanwhile.
        """
        with self._batch() as batch, self._batch() as probes, self._planned(planned) as offer_next:
            run = _Run(requests, batch, probes, versions_seen=[(0, self._require_checked())])
            batch.add(requests)
            while batch.is_open or probes.is_open:
                load = self._lock.load or offer_next()
                if load is not None and run.may_change_weights and admits(run.num_steps, load.policy_version):
                    self._change_weights(run, load)
                self._step(batch, probes)
                run.num_steps += 1
                if load is not None and probes.is_finished:
                    self._check(load, probes)
                self._require_checked()
            return batch.take_outputs(), tuple(run.versions_seen)

    def load(self, load: WeightLoad[Output]) -> None:
        """Load these weights into the engine, as soon as the thread that samples allows it, and check them.

        Raises: WeightMismatchError if they fail; the engine is then quarantined, as it is after any other failure.
        """
        with self._lock.offered(load), self._lock.held_to_load(load) as is_left_to_us:
            if is_left_to_us:
                self._load_alone(load)
        if load.failure is not None:
            raise load.failure

    def _change_weights(self, run: "_Run[Output]", load: WeightLoad[Output]) -> None:
        if self._in_flight_updates == "keep":
            self._load_during(run, load)
        elif self._in_flight_updates == "abort":
            self._restart(run, load)

    def _load_during(self, run: "_Run[Output]", load: WeightLoad[Output]) -> None:
        """Install the weights under the running requests, which share their next steps with the probes."""
        load.install_into(self._engine)
        run.probes.add(load.probes)
        run.versions_seen.append((run.num_steps, load.policy_version))

    def _restart(self, run: "_Run[Output]", load: WeightLoad[Output]) -> None:
        """Drop what was sampled, load the weights, and restart all requests: once per run."""
        run.batch.abort()
        self._load_alone(load)
        self._require_checked()
        run.batch.add(run.requests)
        run.versions_seen = [(0, load.policy_version)]
        run.has_restarted = True

    def _load_alone(self, load: WeightLoad[Output]) -> None:
        """Install the weights and sample their probes; the engine has no other request."""
        load.install_into(self._engine)
        with self._batch() as probes:
            probes.add(load.probes)
            while probes.is_open:
                self._step(probes)
            self._check(load, probes)

    def _check(self, load: WeightLoad[Output], probes: RequestBatch[Output]) -> None:
        load.check(probes.take_outputs())
        self._lock.settle(load)

    def _step(self, *batches: RequestBatch[Output]) -> None:
        for output in self._engine.step():
            for batch in batches:
                batch.collect(output)

    def _require_checked(self) -> int:
        """The version that may be sampled with; it may have been quarantined since `locked`."""
        version = self._lock.policy_version
        if version is None:
            raise WeightMismatchError(
                "weights that arrived during this request failed their checks (the update says how); its completions "
                "are dropped, and this worker samples again after a good update"
            )
        return version

    def _batch(self) -> RequestBatch[Output]:
        return RequestBatch(self._engine, self._request_names)

    @contextmanager
    def _planned(self, loads: Iterable[WeightLoad[Output]]) -> Iterator[Callable[[], WeightLoad[Output] | None]]:
        """A function that offers the next of these loads, None after the last; the slot of the lock must be empty."""
        coming = iter(loads)
        with ExitStack() as offers:

            def offer_next() -> WeightLoad[Output] | None:
                load = next(coming, None)
                if load is not None:
                    offers.enter_context(self._lock.offered(load))
                return load

            yield offer_next


@dataclass(slots=True, eq=False)
class _Run(Generic[Output]):
    """Requests that are sampled together, and their progress."""

    requests: Sequence[EngineRequest]
    batch: RequestBatch[Output]
    probes: RequestBatch[Output]
    """Of the weights that came in last, until they are checked."""
    versions_seen: list[tuple[int, int]] = field(kw_only=True)
    """As `WeightSteps`."""
    num_steps: int = 0
    """Engine steps since the run began."""
    has_restarted: bool = False

    @property
    def may_change_weights(self) -> bool:
        """Whether the last weights are checked, and the requests have not been restarted for them."""
        return not (self.probes.is_open or self.has_restarted)
