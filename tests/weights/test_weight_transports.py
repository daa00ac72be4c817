"""Weights sent from one process to another: equal bytes by every transport, every failure named at the other end."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from actors.config import WeightTransport
from actors.weights.channel import RECEIVER, Channels, Rendezvous
from actors.weights.ipc import MappedPart
from actors.weights.manifest import WeightMismatchError
from actors.weights.parts import Part, in_parts, open_parts
from actors.weights.sent import GlooTransport
from actors.weights.shared_memory import SHARED_FOLDER, allocate, share
from actors.weights.transport import PackedTensors, Transport
from actors.weights.transports import TRANSPORTS
from orchestration.config import RunConfig
from orchestration.roles.rendezvous import RendezvousStore

SIZES = (5, 100, 1, 40, 40, 40, 0, 7)
DEADLINE_S = 2.0
"""Of channels whose other member hangs."""
PATIENCE_S = 30.0
"""Of all others, on however busy a machine."""

processes = get_context("forkserver")
# Imported once for all of them.
processes.set_forkserver_preload(["pytest", "actors.weights.transports"])


class Process:
    """Another process, which performs tasks one after the other."""

    def __init__(self) -> None:
        self._pipe, end = processes.Pipe()
        self._process = processes.Process(target=obey, args=(end,), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        end.close()

    def begin(self, task: Callable, *args: object) -> None:
        """Let it start; the task finds its process's own state in its first argument."""
        self._pipe.send((task, args))

    def result(self, timeout_s: float = 2 * PATIENCE_S) -> object:
        """What the task returned or raised. Raises: EOFError if the process died of it."""
        assert self._pipe.poll(timeout_s), f"no answer within {timeout_s} s"
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def do(self, task: Callable, *args: object) -> object:
        self.begin(task, *args)
        return self.result()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class StoppableTransport(GlooTransport):
    """Stops before it sends part `at`, as `stop` says; empty: it does not."""

    stop, at = "", 0

    def kept(self, policy_version: int) -> Iterator[PackedTensors]:
        for index, part in enumerate(super().kept(policy_version)):
            if index == self.at:
                halt(self.stop)
            yield part


class State:
    """What a process has between two tasks."""

    def __init__(self) -> None:
        self.transport: Transport | None = None
        self.channels: Channels | None = None


def obey(pipe) -> None:
    torch.set_num_threads(1)
    state = State()
    while True:
        task, args = pipe.recv()
        try:
            pipe.send(task(state, *args))
        except (RuntimeError, OSError, ValueError) as error:
            pipe.send(error)


def tensors_of(version: int, scale: int = 1) -> list[torch.Tensor]:
    draw = np.random.default_rng(version)
    return [torch.from_numpy(draw.integers(0, 256, scale * size, dtype=np.uint8)) for size in SIZES]


def expected(version: int) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors_of(version)]


def publish(state: State, transport: str, version: int, folder: str | None = None, scale: int = 1) -> list[Part]:
    """As the learner does; when it has travelled, the tensors change as in a step."""
    tensors = tensors_of(version, scale)
    if state.transport is None:
        transport_class = StoppableTransport if transport == "gloo" else TRANSPORTS[transport]
        state.transport = transport_class(device=torch.device("cpu"), folder=folder)
    state.transport.start(version)
    parts = [state.transport.ship(part)[0] for part in in_parts(tensors, part_bytes=50 * scale)]
    assert len(parts) > 1
    travelled = pickle.loads(pickle.dumps(parts))
    for tensor in tensors:
        tensor += 1
    return travelled


def discard(state: State, version: int) -> None:
    state.transport.discard(version)


def discard_all(state: State) -> None:
    state.transport.discard_all()


def send(state: State, version: int, rendezvous: Rendezvous, stop: str = "", at: int = 0) -> None:
    """As LearnerWorker.send_weights, but stops before part `at`, as `stop` says."""
    assert isinstance(state.transport, StoppableTransport)
    state.transport.stop, state.transport.at = stop, at
    state.transport.send(version, rendezvous)


def receive(state: State, parts: list[Part], rendezvous: Rendezvous | None = None, stop: str = "") -> list[bytes]:
    """As RolloutWorker.receive_weights, but stops after the first part, as `stop` says."""
    if rendezvous is None:
        return [buffer.tobytes() for buffer in open_parts(parts)]
    state.channels = state.channels or Channels(RECEIVER)
    with state.channels.at(rendezvous) as channel:
        first = open_parts(parts[:1], channel.receive)
        halt(stop)
        return [buffer.tobytes() for buffer in [*first, *open_parts(parts[1:], channel.receive)]]


def halt(how: str) -> None:
    if how == "raise":
        raise OSError("the other disk is full")
    if how == "die":
        os._exit(1)
    if how == "hang":
        time.sleep(1.5 * DEADLINE_S)


@pytest.fixture
def start() -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def one_more() -> Process:
        started.append(Process())
        return started[-1]

    yield one_more
    for process in started:
        process.end()


@pytest.fixture
def rendezvous_store(request: pytest.FixtureRequest) -> RendezvousStore:
    hangs = hasattr(request.node, "callspec") and request.node.callspec.params.get("stop") == "hang"
    return RendezvousStore("gloo", timeout_s=DEADLINE_S if hangs else PATIENCE_S)


def transfer(learner: Process, worker: Process, version: int, parts: list[Part], rendezvous: Rendezvous) -> list[bytes]:
    worker.begin(receive, parts, rendezvous)
    learner.do(send, version, rendezvous)
    return worker.result()


def in_shared_memory(process: Process) -> list[str]:
    return [name for name in os.listdir(SHARED_FOLDER) if name.startswith(f"torch_{process.pid}_")]


@pytest.mark.parametrize("transport", ["object_store", "files", "ipc", "gloo"])
def test_every_transport_gives_the_bytes_of_its_version(
    transport: str, start: Callable[[], Process], rendezvous_store: RendezvousStore, tmp_path: Path
) -> None:
    learner, workers = start(), [start(), start()]
    published = {v: learner.do(publish, transport, v, str(tmp_path)) for v in (3, 4)}
    for version in (4, 3):
        for index, worker in enumerate(workers):
            if transport == "gloo":
                rendezvous = rendezvous_store.of(f"rollout worker {index}")
                assert transfer(learner, worker, version, published[version], rendezvous) == expected(version)
            else:
                assert worker.do(receive, published[version]) == expected(version)


def test_runs_that_share_a_folder_do_not_meet_and_leave_nothing(start: Callable[[], Process], tmp_path: Path) -> None:
    first, second, worker = start(), start(), start()
    parts = first.do(publish, "files", 1, str(tmp_path))
    others = second.do(publish, "files", 1, str(tmp_path), 2)
    assert worker.do(receive, parts) == expected(1)
    assert worker.do(receive, others) == [tensor.numpy().tobytes() for tensor in tensors_of(1, scale=2)]
    second.do(discard, 1)
    second.do(publish, "files", 2, str(tmp_path), 2)
    second.do(discard_all)
    assert worker.do(receive, parts) == expected(1), "another run has ended"
    first.do(discard_all)
    first.do(discard, 1)  # may be overtaken: the learner is not waited for when one version is discarded
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_free_when_it_is_discarded(start: Callable[[], Process]) -> None:
    learner, worker = start(), start()
    parts = {version: learner.do(publish, "ipc", version) for version in (1, 2)}
    assert len(in_shared_memory(learner)) == len(parts[1]) + len(parts[2])
    for _ in range(3):
        worker.do(receive, parts[1])
    mapped = parts[2][0].memory.map()
    for version in (1, 2):
        learner.do(discard, version)
    assert in_shared_memory(learner) == [], "a worker that is killed while it maps them would leave them forever"
    assert mapped.numpy().tobytes() == b"".join(expected(2))[: mapped.nbytes], "what is mapped stays"
    del mapped
    with pytest.raises(WeightMismatchError, match=f"process {learner.pid} .* its owner has freed it"):
        worker.do(receive, parts[1])


def test_memory_of_a_learner_that_died_is_refused(start: Callable[[], Process]) -> None:
    learner, worker = start(), start()
    parts = learner.do(publish, "ipc", 1)
    worker.do(receive, parts)
    learner.end()
    with pytest.raises(WeightMismatchError, match=f"memory of process {learner.pid} .* has ended"):
        worker.do(receive, parts)
    worker.end()
    deadline = time.monotonic() + 60
    while in_shared_memory(learner) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert in_shared_memory(learner) == []


def test_memory_of_another_node_or_device_is_refused() -> None:
    memory = share(allocate(4, torch.device("cpu")))
    for changes, text in (
        ({"node": "elsewhere"}, r"on elsewhere.*needs learner and rollout workers on one node.*gloo"),
        ({"device": "cuda:9", "device_id": "GPU-1"}, r"cuda:9 is not GPU-1.*on one GPU.*nccl"),
    ):
        with pytest.raises(WeightMismatchError, match=text):
            open_parts([MappedPart(replace(memory, **changes), [4])])


def test_more_than_the_shared_memory_holds_is_refused() -> None:
    with pytest.raises(OSError, match=rf"/dev/shm has \d+ bytes free, {2**60} .*--shm-size.*weight_transport"):
        allocate(2**60, torch.device("cpu"))


@pytest.mark.parametrize(
    ("stop", "at", "error", "text"),
    [
        ("raise", 0, ConnectionError, "the learner failed: OSError: the other disk is full"),
        ("raise", 2, ConnectionError, "the learner failed: OSError: the other disk is full"),
        ("die", 2, ConnectionError, "the learner died, or the network"),
        ("hang", 2, TimeoutError, "the learner did not take part within 2 s"),
    ],
)
def test_a_learner_that_stops_is_named_and_the_next_channel_works(
    stop: str,
    at: int,
    error: type[Exception],
    text: str,
    start: Callable[[], Process],
    rendezvous_store: RendezvousStore,
) -> None:
    learner, worker, name = start(), start(), "rollout worker 0"
    parts = learner.do(publish, "gloo", 1)
    assert transfer(learner, worker, 1, parts, rendezvous_store.of(name)) == expected(1)
    learner.begin(send, 1, rendezvous_store.of(name), stop, at)
    with pytest.raises(error, match=f"gloo channel 1 of {name}: {text}"):
        worker.do(receive, parts, rendezvous_store.of(name))
    with pytest.raises((OSError, EOFError)):
        learner.result()
    rendezvous_store.renew(name)
    if stop == "die":
        learner = start()
        parts = learner.do(publish, "gloo", 1)
    assert transfer(learner, worker, 1, parts, rendezvous_store.of(name)) == expected(1)


@pytest.mark.parametrize(
    ("stop", "error", "text"),
    [
        ("raise", ConnectionError, "the rollout worker failed: OSError: the other disk is full"),
        ("die", ConnectionError, "the rollout worker died, or the network"),
        ("hang", TimeoutError, "the rollout worker did not take part within 2 s"),
    ],
)
def test_a_worker_that_stops_is_named_and_others_join_later(
    stop: str, error: type[Exception], text: str, start: Callable[[], Process], rendezvous_store: RendezvousStore
) -> None:
    learner, worker = start(), start()
    parts = learner.do(publish, "gloo", 1, None, 100_000)  # more than the network's own buffers take
    worker.begin(receive, parts, rendezvous_store.of("rollout worker 0"), stop)
    with pytest.raises(error, match=f"gloo channel 1 of rollout worker 0: {text}"):
        learner.do(send, 1, rendezvous_store.of("rollout worker 0"))
    joining = start()
    parts = learner.do(publish, "gloo", 2)
    assert transfer(learner, joining, 2, parts, rendezvous_store.of("rollout worker 1")) == expected(2)


def test_a_version_that_is_not_kept_is_named_on_both_sides(
    start: Callable[[], Process], rendezvous_store: RendezvousStore
) -> None:
    learner, worker = start(), start()
    parts, text = learner.do(publish, "gloo", 1), r"weights of version 9 were asked for, the learner keeps \[1\]"
    worker.begin(receive, parts, rendezvous_store.of("rollout worker 0"))
    with pytest.raises(RuntimeError, match=text):
        learner.do(send, 9, rendezvous_store.of("rollout worker 0"))
    with pytest.raises(ConnectionError, match=f"the learner failed: RuntimeError: {text}"):
        worker.result()


@pytest.mark.parametrize("absent", ["learner", "rollout worker"])
def test_a_member_that_does_not_connect_is_named(absent: str, start: Callable[[], Process]) -> None:
    rendezvous_store, present = RendezvousStore("gloo", timeout_s=0.5), start()
    present.do(publish, "gloo", 1)
    task = partial(send, version=1) if absent == "rollout worker" else partial(receive, parts=[])
    with pytest.raises(TimeoutError, match=f"the {absent} did not connect within 0.5 s"):
        present.do(perform, task, rendezvous_store.of("rollout worker 0"))


def perform(state: State, task: Callable, rendezvous: Rendezvous) -> object:
    return task(state, rendezvous=rendezvous)


@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_a_run_in_one_process_takes_the_transports_that_keep_nothing(name: str, tmp_path: Path) -> None:
    folder = {"weight_folder": str(tmp_path)} if name == "files" else {}
    gpus = {"num_gpus": 1.0 if name == "nccl" else 0.0}
    placement = {"one_process": True, "learner": gpus, "rollout": gpus}
    settings = {"asynchrony": {"weight_transport": name} | folder, "placement": placement}
    with pytest.raises(ValueError, match="has only one") if TRANSPORTS[name].keeps_weights else nullcontext():
        RunConfig.model_validate(settings)


def test_every_transport_that_can_be_configured_has_its_class() -> None:
    assert set(get_args(WeightTransport)) == set(TRANSPORTS)
