"""Two threads at one engine: which holds the lock, when weights change, and that no thread waits forever.

The engine is a fake that samples one "token" per step and request: the version of the weights it holds.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import pytest

from actors.config import InFlightUpdates
from actors.engine.engine_loop import EngineLoop
from actors.engine.request_batch import EngineRequest
from actors.engine.weight_load import WeightLoad
from actors.rollout import WeightSteps
from actors.weights.manifest import ProbeError, WeightMismatchError

DEADLINE_S = 60.0
"""Nothing here takes a second; a thread that is still waiting after this time waits forever."""
MODES: list[InFlightUpdates] = ["wait", "keep", "abort"]


@dataclass
class Request:
    """Of the fake engine."""

    request_id: str
    prompt: object
    length: int
    tokens: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.length


class FakeEngine:
    """`params` of a request is its length [tokens]; every call is noted, and may run a test's own code."""

    def __init__(self) -> None:
        self.weights = "initial"
        self.version = ""
        self.running: dict[str, Request] = {}
        self.calls: list[str] = []
        self.at_call: dict[str, list[Callable[[], None]]] = {}
        """For the next calls of a method, what to do before each."""
        self.inside: set[int] = set()

    def _note(self, call: str) -> None:
        assert not self.inside, "two threads use the engine at once"
        self.inside.add(threading.get_ident())
        self.calls.append(call)
        try:
            if waiting := self.at_call.get(call.split()[0]):
                waiting.pop(0)()
        finally:
            self.inside.clear()

    def add_request(self, request_id: str, prompt: object, params: object) -> str:
        self._note(f"add {prompt}")
        self.running[f"own-{request_id}"] = Request(request_id=request_id, prompt=prompt, length=params)
        return f"own-{request_id}"

    def step(self) -> list[Request]:
        self._note("step")
        for request in self.running.values():
            request.tokens.append(self.version)
        outputs = list(self.running.values())
        self.running = {name: request for name, request in self.running.items() if not request.finished}
        return outputs[::-1]

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        self._note(f"abort {len(request_ids)}")
        assert internal
        for name in request_ids:
            del self.running[name]

    def install(self, weights: str) -> None:
        self._note("install")
        self.weights = weights

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        assert reset_running_requests
        self._note("reset")
        return True

    def set_weight_version(self, weight_version: str) -> None:
        self.version = weight_version


ENGINES: list[FakeEngine] = []
"""The last one is that of the test."""


@pytest.fixture
def engine() -> FakeEngine:
    ENGINES.append(FakeEngine())
    return ENGINES[-1]


@pytest.fixture
def make_loop(engine: FakeEngine) -> Callable[[InFlightUpdates], EngineLoop]:
    return lambda mode: EngineLoop(engine, in_flight_updates=mode)


def requests(*lengths: int) -> list[EngineRequest]:
    return [EngineRequest(prompt=f"prompt {index}", params=length) for index, length in enumerate(lengths)]


def weights(version: int, *, error: float = 0.0, probe_steps: int = 1) -> WeightLoad:
    """Weights whose probe shows this error; above 1 it is too much."""

    def probe_error_of(outputs: Sequence[Request]) -> ProbeError:
        assert [output.tokens for output in outputs] == [[str(version)] * probe_steps] * 2
        if error > 1:
            raise WeightMismatchError(f"version {version} differs by {error}")
        return ProbeError(largest=error, mean=error)

    probes = [EngineRequest(prompt=f"probe {index}", params=probe_steps) for index in range(2)]
    install = partial(ENGINES[-1].install, f"weights {version}")
    return WeightLoad(policy_version=version, install=install, probes=probes, probe_error_of=probe_error_of)


def sampled(loop: EngineLoop, *lengths: int, **how: object) -> list[list[str]]:
    return sampled_and_seen(loop, *lengths, **how)[0]


def sampled_and_seen(loop: EngineLoop, *lengths: int, **how: object) -> tuple[list[list[str]], WeightSteps]:
    with loop.locked():
        outputs, versions_seen = loop.run(requests(*lengths), **how)
        return [output.tokens for output in outputs], versions_seen


def test_outputs_come_in_the_order_of_the_requests(
    engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop]
) -> None:
    loop = make_loop("wait")
    with loop.locked() as version:
        assert version == 0
        outputs, versions_seen = loop.run(requests(3, 1, 2))
    assert versions_seen == ((0, 0),)
    assert [(output.prompt, output.tokens) for output in outputs] == [
        ("prompt 0", ["0"] * 3),
        ("prompt 1", ["0"]),
        ("prompt 2", ["0"] * 2),
    ]
    assert engine.calls == ["add prompt 0", "add prompt 1", "add prompt 2", "step", "step", "step"]
    assert sampled(loop) == []


@pytest.mark.parametrize("mode", MODES)
def test_an_idle_engine_takes_weights_at_once(
    mode: InFlightUpdates, engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop]
) -> None:
    loop = make_loop(mode)
    loop.load(load := weights(4, error=0.5, probe_steps=2))
    assert engine.calls == ["install", "reset", "add probe 0", "add probe 1", "step", "step"]
    assert (loop.policy_version, load.probe_error.largest) == (4, 0.5)
    assert load.pause_s > 0 and load.probe_s > 0
    assert sampled(loop, 2) == [["4", "4"]]
    loop.load(weights(3))  # older ones too
    assert (loop.policy_version, engine.weights, sampled(loop, 1)) == (3, "weights 3", [["3"]])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-4)


@dataclass
class Race:
    """One thread samples; when it takes its third step, another loads weights, and the step waits for that."""

    loop: EngineLoop
    engine: FakeEngine
    pool: ThreadPoolExecutor
    loading: Future | None = None

    def load_at_step(self, step: int, load: WeightLoad) -> None:
        def load_weights() -> None:
            self.loading = self.pool.submit(self.loop.load, load)
            until(lambda: self.loop._lock.load is load)

        self.engine.at_call["step"] = [lambda: None] * (step - 1) + [load_weights]

    def end(self) -> WeightMismatchError | None:
        """What the thread that loads weights raised."""
        return self.loading.exception(DEADLINE_S)


@pytest.fixture
def make_race(engine: FakeEngine) -> Callable[[InFlightUpdates], Race]:
    def make(mode: InFlightUpdates) -> Race:
        return Race(EngineLoop(engine, in_flight_updates=mode), engine, ThreadPoolExecutor(1))

    return make


@pytest.mark.parametrize(
    ("mode", "expected", "versions_seen"),
    [
        ("wait", [["0"] * 5, ["0"] * 2, ["0"] * 4], ((0, 0),)),
        ("keep", [["0"] * 3 + ["7"] * 2, ["0"] * 2, ["0"] * 3 + ["7"]], ((0, 0), (3, 7))),
        ("abort", [["7"] * 5, ["7"] * 2, ["7"] * 4], ((0, 7),)),
    ],
)
def test_what_new_weights_do_to_a_request(
    mode: InFlightUpdates,
    expected: list[list[str]],
    versions_seen: WeightSteps,
    make_race: Callable[[InFlightUpdates], Race],
) -> None:
    race = make_race(mode)
    race.load_at_step(3, weights(7))
    assert sampled_and_seen(race.loop, 5, 2, 4) == (expected, versions_seen)
    assert race.end() is None
    assert (race.loop.policy_version, race.engine.running) == (7, {})
    assert sampled(race.loop, 2) == [["7", "7"]]


def test_the_order_of_events(make_race: Callable[[InFlightUpdates], Race]) -> None:
    adds, probes = ["add prompt 0", "add prompt 1"], ["add probe 0", "add probe 1"]
    expected = {
        "wait": [*adds, "step", "step", "step", "install", "reset", *probes, "step"],
        "keep": [*adds, "step", "step", "install", "reset", *probes, "step"],
        "abort": [*adds, "step", "step", "abort 1", "install", "reset", *probes, "step", *adds, *["step"] * 3],
    }
    for mode in MODES:
        race = make_race(mode)
        race.engine.calls.clear()
        race.load_at_step(2, weights(7))
        sampled(race.loop, 3, 1)
        assert race.end() is None
        assert race.engine.calls == expected[mode]


def test_a_request_restarts_once(make_race: Callable[[InFlightUpdates], Race]) -> None:
    """Updates that come faster than a request is sampled do not keep it from finishing."""
    race = make_race("abort")
    race.load_at_step(2, weights(7))
    at_step = race.engine.at_call["step"]
    race.load_at_step(3, weights(8))  # of the request's second start, after one step of the first update's probes
    race.engine.at_call["step"] = [*at_step, lambda: None, *race.engine.at_call["step"]]
    assert sampled(race.loop, 5, 2) == [["7"] * 5, ["7"] * 2]
    assert race.end() is None
    assert race.loop.policy_version == 8 and sampled(race.loop, 1) == [["8"]]


def test_a_probe_that_outlasts_the_request_is_waited_for(make_race: Callable[[InFlightUpdates], Race]) -> None:
    race = make_race("keep")
    race.load_at_step(2, weights(7, probe_steps=6))
    assert sampled(race.loop, 3) == [["0", "0", "7"]]
    assert race.loop.policy_version == 7
    assert race.engine.calls.count("step") == 2 + 6
    assert race.end() is None


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_weights_that_a_request_refuses_wait_for_its_end(
    mode: InFlightUpdates, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    race = make_race(mode)
    race.load_at_step(2, weights(7))
    assert sampled(race.loop, 4, admits=lambda step, version: version < 7) == [["0"] * 4]
    assert race.end() is None
    assert race.loop.policy_version == 7


def test_planned_weights_are_loaded_at_the_steps_of_the_run(make_race: Callable[[InFlightUpdates], Race]) -> None:
    """The engine cannot tell a replay from the run: the same calls in the same order."""
    race = make_race("keep")
    race.load_at_step(3, weights(7, probe_steps=2))
    live = sampled_and_seen(race.loop, 9, 2, 5)
    calls = list(race.engine.calls)
    race.loop.load(weights(0))
    race.engine.calls.clear()
    planned = [weights(7, probe_steps=2)]
    replayed = sampled_and_seen(race.loop, 9, 2, 5, admits=lambda *at: at == (3, 7), planned=planned)
    assert replayed == live == ([["0"] * 3 + ["7"] * 6, ["0"] * 2, ["0"] * 3 + ["7"] * 2], ((0, 0), (3, 7)))
    assert race.engine.calls == calls
    assert race.loop.policy_version == 7


def test_several_planned_weights_are_loaded_in_order(
    make_loop: Callable[[InFlightUpdates], EngineLoop],
) -> None:
    loop, plan = make_loop("keep"), ((0, 4), (2, 9), (3, 5))
    made = (weights(version) for _, version in plan)
    assert sampled_and_seen(loop, 5, admits=lambda *at: at in plan, planned=made) == (
        [["4", "4", "9", "5", "5"]],
        ((0, 0), *plan),
    )


def test_planned_weights_whose_step_never_comes_are_not_seen(
    engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop]
) -> None:
    """The versions seen show that they are missing; sampling is refused until good ones are loaded."""
    loop = make_loop("keep")
    found = sampled_and_seen(loop, 2, admits=lambda *at: at == (5, 7), planned=[weights(7)])
    assert found == ([["0", "0"]], ((0, 0),))
    assert engine.weights == "initial" and loop._lock.load is None
    assert_quarantined(loop)


def test_planned_weights_that_fail_end_the_request_and_quarantine(
    engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop]
) -> None:
    loop = make_loop("keep")
    with pytest.raises(WeightMismatchError, match="during this request failed their checks"):
        sampled(loop, 4, admits=lambda *at: at == (2, 7), planned=[weights(7, error=2.0)])
    assert engine.running == {} and loop._lock.load is None
    assert_quarantined(loop)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_comes_during_an_update_begins_after_it(
    mode: InFlightUpdates, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    """Loading takes place in the other thread; this one arrives while tensors are being installed."""
    race = make_race(mode)
    arrived, second = threading.Event(), ThreadPoolExecutor(1)

    def arrive() -> None:
        sampling.append(second.submit(lambda: (arrived.set(), sampled(race.loop, 2))[1]))
        assert arrived.wait(DEADLINE_S)

    sampling: list[Future] = []
    race.engine.at_call["install"] = [arrive]
    race.loop.load(weights(7))
    assert sampling[0].result(DEADLINE_S) == [["7", "7"]]
    assert race.engine.calls[-3:] == ["add prompt 0", "step", "step"]


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_a_failed_probe_raises_in_both_threads_and_quarantines(
    mode: InFlightUpdates, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    race = make_race(mode)
    race.load_at_step(2, weights(7, error=2.0))
    with pytest.raises(WeightMismatchError, match="during this request failed their checks"):
        sampled(race.loop, 4, 1)
    assert str(race.end()) == "version 7 differs by 2.0"
    assert race.engine.running == {}
    assert not any(call.startswith("add prompt") for call in race.engine.calls[race.engine.calls.index("install") :])
    assert_quarantined(race.loop)


def test_a_request_that_finished_under_old_weights_is_kept_when_new_ones_fail(
    make_race: Callable[[InFlightUpdates], Race],
) -> None:
    race = make_race("wait")
    race.load_at_step(2, weights(7, error=2.0))
    assert sampled(race.loop, 4) == [["0"] * 4]
    assert str(race.end()) == "version 7 differs by 2.0"
    assert_quarantined(race.loop)


def assert_quarantined(loop: EngineLoop) -> None:
    assert loop.policy_version is None
    with pytest.raises(RuntimeError, match="last weight update failed its checks; it samples again after a good one"):
        sampled(loop, 1)
    loop.load(weights(9))
    assert sampled(loop, 1) == [["9"]]


@pytest.mark.parametrize("mode", MODES)
def test_quarantine_ends_a_running_request_at_its_next_step(
    mode: InFlightUpdates, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    race = make_race(mode)
    race.engine.at_call["step"] = [lambda: None, race.loop.quarantine]
    with pytest.raises(WeightMismatchError, match="during this request failed their checks"):
        sampled(race.loop, 9, 9)
    assert race.engine.calls == ["add prompt 0", "add prompt 1", "step", "step", "abort 2"]
    assert race.engine.running == {}
    assert_quarantined(race.loop)


def fail() -> None:
    raise ConnectionError("the device is gone")


def test_a_request_that_waits_for_an_update_that_fails_is_refused(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, waiting = EngineLoop(engine, in_flight_updates="wait"), []
    withdraw = loop._lock._withdraw

    def arrive_and_fail() -> None:
        waiting.append(pool.submit(sampled, loop, 1))
        until(lambda: loop._lock._changed._waiters)
        fail()

    def withdraw_late(load: WeightLoad) -> None:
        """Once the request has seen that the lock is free and that the weights are still in the slot."""
        until(lambda: loop._lock._changed._waiters)
        withdraw(load)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(loop._lock, "_withdraw", withdraw_late)
        engine.at_call["install"] = [arrive_and_fail]
        with pytest.raises(ConnectionError):
            loop.load(weights(7))
        with pytest.raises(RuntimeError, match="last weight update failed its checks"):
            waiting[0].result(DEADLINE_S)
    assert_quarantined(loop)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_fails_leaves_the_update_to_the_loading_thread(
    mode: InFlightUpdates, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    """In `keep` and `abort` it fails when the weights are in the engine and not checked."""
    race = make_race(mode)
    race.load_at_step(2, weights(7))
    race.engine.at_call["step"].append(fail)
    with pytest.raises(ConnectionError):
        sampled(race.loop, 4, 4)
    assert race.end() is None
    # Those of the request, and of the probes where they were in the engine.
    assert race.engine.calls.count("abort 2") == (1 if mode == "wait" else 2)
    assert (race.loop.policy_version, race.engine.running) == (7, {})
    assert sampled(race.loop, 1) == [["7"]]


@pytest.mark.parametrize("verb", ["install", "reset", "add", "step"])
@pytest.mark.parametrize("mode", MODES)
def test_an_update_that_fails_quarantines(
    mode: InFlightUpdates, verb: str, make_race: Callable[[InFlightUpdates], Race]
) -> None:
    """No thread knows then what the engine holds."""
    race = make_race(mode)
    race.engine.at_call[verb] = [fail]
    with pytest.raises(ConnectionError):
        race.loop.load(weights(7))
    assert race.engine.running == {}
    assert_quarantined(race.loop)


def test_an_engine_that_keeps_its_cache_is_refused(
    engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop("keep")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda reset_running_requests: False)
        with pytest.raises(WeightMismatchError, match="after loading version 7 the engine refused to drop its prefix"):
            loop.load(weights(7))
    assert_quarantined(loop)


def test_weights_without_probes_are_refused() -> None:
    with pytest.raises(ValueError, match="weights of version 3 came without probe texts"):
        WeightLoad(
            policy_version=3,
            install=lambda: None,
            probes=[],
            probe_error_of=lambda _: ProbeError(largest=0.0, mean=0.0),
        )


@pytest.mark.parametrize("mode", MODES)
def test_any_timing_gives_whole_versions_and_ends(
    mode: InFlightUpdates, engine: FakeEngine, make_loop: Callable[[InFlightUpdates], EngineLoop]
) -> None:
    """Three hundred updates, of which one in ten fails, against as many requests as fit between them."""
    loop, done = make_loop(mode), threading.Event()

    def load_weights() -> int:
        num_failed = 0
        for version in range(1, 301):
            try:
                loop.load(weights(version, error=2.0 if version % 10 == 0 else 0.0))
            except WeightMismatchError:
                num_failed += 1
        loop.load(weights(301))
        done.set()
        return num_failed

    def sample() -> list[list[str]]:
        outputs = []
        while not done.is_set():
            with contextlib.suppress(RuntimeError):  # quarantined, or has seen weights that failed
                outputs += sampled(loop, 3, 2)
        return outputs + sampled(loop, 3, 2)

    with ThreadPoolExecutor(2) as pool:
        loading, sampling = pool.submit(load_weights), pool.submit(sample)
        assert loading.result(DEADLINE_S) == 30
        outputs = sampling.result(DEADLINE_S)
    assert engine.running == {}
    assert outputs[-2:] == [["301"] * 3, ["301"] * 2]
    for tokens in outputs:
        found = [int(version) for version in tokens]
        assert found == sorted(found)
        assert mode == "keep" or len(set(found)) == 1
        assert all(version % 10 != 0 or version == 0 for version in found)
