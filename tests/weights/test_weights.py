"""Published weights on their way into an engine: bytes that changed, engines that disagree, and quarantine."""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from actors import worker
from actors.config import RolloutConfig
from actors.weights.manifest import (
    Probe,
    ProbeError,
    WeightManifest,
    WeightMismatchError,
    agreed_probe_error,
    as_bytes,
    checksum,
    probe_error,
    verified_tensors,
)
from actors.weights.object_store import ArrayPart
from actors.worker import RolloutWorker

PROBE = Probe(
    token_ids=[[1, 2, 3], [4, 5]],
    logprobs=[np.array([-1, -2], dtype=np.float32), np.array([-3], dtype=np.float32)],
)
Published = tuple[WeightManifest, list[np.ndarray]]


def publish(tensors: dict[str, torch.Tensor], *, policy_version: int = 4) -> Published:
    buffers = [as_bytes(tensor).copy() for tensor in tensors.values()]
    manifest = WeightManifest(
        policy_version=policy_version,
        names=list(tensors),
        dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        shapes=[tuple(tensor.shape) for tensor in tensors.values()],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=PROBE,
    )
    return manifest, buffers


def as_parts(published: Published) -> tuple[WeightManifest, ArrayPart]:
    """As a worker takes them: the manifest and all in one part."""
    manifest, buffers = published
    return manifest, ArrayPart(buffers)


def some_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 5, generator=generator).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40]).to(dtype)
    return {"matrix": matrix, "transposed": matrix.T, "special": special, "scalar": torch.ones((), dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    sent = some_tensors(dtype)
    manifest, buffers = publish(sent)
    for buffer in buffers:
        buffer.flags.writeable = False  # as Ray hands them out
    arrived = verified_tensors(manifest, buffers)
    assert [name for name, _ in arrived] == list(sent)
    for name, tensor in arrived:
        assert tensor.dtype == dtype
        assert tensor.shape == sent[name].shape
        assert (
            tensor.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(sent[name].contiguous().reshape(-1).view(torch.uint8))
        )
    assert manifest.num_bytes == sum(buffer.size for buffer in buffers)
    assert manifest.num_bytes == (15 + 15 + 6 + 1) * torch.empty((), dtype=dtype).element_size()


def test_tensors_are_the_bytes_that_were_checked_and_read_only_memory_is_accepted() -> None:
    manifest, buffers = publish(some_tensors(torch.float32))
    for buffer in buffers:
        buffer.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        arrived = verified_tensors(manifest, buffers)
    assert [tensor.data_ptr() for _, tensor in arrived] == [buffer.ctypes.data for buffer in buffers]
    alive = [weakref.ref(buffer) for buffer in buffers]
    del buffer, buffers
    assert all(reference() is not None for reference in alive), "the tensors must keep the memory"


def test_bytes_follow_a_tensors_rows_and_not_its_memory() -> None:
    base = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    for view in (base.T, base[:, 1:3], base[::2], base[1], base[:1].expand(3, 4)):
        assert as_bytes(view).tobytes() == np.array(view.tolist(), dtype=np.int16).tobytes()
    parameter = torch.nn.Parameter(torch.ones(2))
    assert as_bytes(parameter).tobytes() == np.ones(2, dtype=np.float32).tobytes()


@pytest.mark.parametrize("name", ["matrix", "special", "scalar"])
@pytest.mark.parametrize("damage", ["flipped bit", "cut", "longer", "zeroed"])
def test_a_damaged_tensor_is_named(name: str, damage: str) -> None:
    manifest, buffers = publish(some_tensors(torch.float32))
    index = manifest.names.index(name)
    buffer = buffers[index]
    if damage == "flipped bit":
        buffer[-1] ^= 1
    elif damage == "cut":
        buffers[index] = buffer[:-4]
    elif damage == "longer":
        buffers[index] = np.append(buffer, np.uint8(0))
    else:
        buffer[:] = 0
    with pytest.raises(WeightMismatchError, match=f"version 4: tensor '{name}'.*checksum"):
        verified_tensors(manifest, buffers)


def test_a_missing_tensor_is_named() -> None:
    manifest, buffers = publish(some_tensors(torch.float32))
    del buffers[1]
    with pytest.raises(WeightMismatchError, match="4 tensors were published, 3 arrived; missing: transposed"):
        verified_tensors(manifest, buffers)


def test_tensors_in_another_order_are_refused() -> None:
    manifest, buffers = publish(some_tensors(torch.float32))
    with pytest.raises(WeightMismatchError, match="'matrix'"):
        verified_tensors(manifest, [buffers[1], buffers[0], *buffers[2:]])


@pytest.mark.parametrize(
    ("engine", "error"),
    [
        ([[-1.0, -2.0], [-3.0]], 0.0),
        ([[-1.0, -2.5], [-3.0]], 0.5),
        ([[-1.0, -2.0], [-2.75]], 0.25),
        ([[-1.25, -2.0], [-3.5]], 0.5),
    ],
)
def test_probe_error_is_the_largest_difference(engine: list[list[float]], error: float) -> None:
    assert probe_error(PROBE, [np.array(row, dtype=np.float32) for row in engine]).largest == error


@pytest.mark.parametrize("engine", [[[-1.0, np.nan], [-3.0]], [[-1.0, -2.0], [np.nan]]])
def test_a_probe_that_is_not_a_number_is_never_a_small_error(engine: list[list[float]]) -> None:
    error = probe_error(PROBE, [np.array(row, dtype=np.float32) for row in engine])
    assert np.isnan(error.largest) and np.isnan(error.mean)
    assert not error.is_within(ProbeError(largest=np.inf, mean=np.inf))


class FakeSampler:
    """Takes any weights and scores every probe as the test says."""

    scores: ClassVar[list[list[float]]]

    def __init__(self, model_path: str, config: RolloutConfig, **settings: object) -> None:
        self.loaded: list[list[str]] = []
        self.num_quarantines = 0
        self.while_loading: Callable[[], object] = lambda: None
        self.startup_s: dict[str, float] = {}

    def load(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], *, allowed: ProbeError
    ) -> SimpleNamespace:
        self.loaded.append([name for name, _ in tensors])
        self.while_loading()
        scores = [np.array(row, dtype=np.float32) for row in self.scores]
        error = agreed_probe_error(manifest, scores, allowed=allowed)
        return SimpleNamespace(pause_s=0.5, probe_s=0.25, probe_error=error)

    def score_tokens(self, token_ids: list[list[int]]) -> list[np.ndarray]:
        assert token_ids == PROBE.token_ids
        return [np.array(row, dtype=np.float32) for row in self.scores]

    def quarantine(self) -> None:
        self.num_quarantines += 1


@pytest.fixture
def make_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RolloutWorker]:
    """A RolloutWorker whose engine is a FakeSampler that agrees with the learner."""
    monkeypatch.setattr(worker, "Sampler", FakeSampler)
    monkeypatch.setattr(FakeSampler, "scores", [row.tolist() for row in PROBE.logprobs], raising=False)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()

    def make(*, dtype: str = "float32", probe_tolerance: float | None = None) -> RolloutWorker:
        config = RolloutConfig(probe_tolerance=probe_tolerance)
        return RolloutWorker(model=str(tmp_path), config=config, dtype=dtype, max_tokens=16)

    return make


def test_a_receipt_reports_what_the_update_took(make_worker: Callable[..., RolloutWorker]) -> None:
    rollout_worker = make_worker()
    receipt = rollout_worker.receive_weights(*as_parts(publish(some_tensors(torch.float32), policy_version=4)))
    assert (receipt.policy_version, receipt.pause_s, receipt.probe_s, receipt.probe_error) == (4, 0.5, 0.25, 0)
    assert receipt.verify_s > 0
    assert rollout_worker._sampler.loaded == [["matrix", "transposed", "special", "scalar"]]
    assert rollout_worker._sampler.num_quarantines == 0


@pytest.mark.parametrize("scores", [[[-1.0, -2.0], [-3.002]], [[-1.0, -2.0], [np.nan]], [[np.nan, -2.0], [-3.0]]])
def test_a_worker_whose_engine_disagrees_is_quarantined(
    scores: list[list[float]], make_worker: Callable[..., RolloutWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout_worker = make_worker()
    monkeypatch.setattr(FakeSampler, "scores", scores)
    with pytest.raises(WeightMismatchError, match=r"version 4 .* nats .* 0\.001 .*probe_tolerance"):
        rollout_worker.receive_weights(*as_parts(publish({}, policy_version=4)))
    assert rollout_worker._sampler.num_quarantines == 1


def test_damaged_weights_never_reach_the_engine(make_worker: Callable[..., RolloutWorker]) -> None:
    rollout_worker = make_worker()
    manifest, buffers = publish(some_tensors(torch.float32))
    buffers[2][0] ^= 1
    with pytest.raises(WeightMismatchError, match="'special'"):
        rollout_worker.receive_weights(manifest, ArrayPart(buffers))
    assert rollout_worker._sampler.loaded == []
    assert rollout_worker._sampler.num_quarantines == 1


def test_weights_that_arrive_during_an_update_are_refused_without_any_effect(
    make_worker: Callable[..., RolloutWorker],
) -> None:
    rollout_worker = make_worker()
    second = publish(some_tensors(torch.float32), policy_version=5)

    def send_the_second() -> None:
        with pytest.raises(RuntimeError, match="version 5 arrived while others were being received; wait for the rec"):
            rollout_worker.receive_weights(*as_parts(second))

    rollout_worker._sampler.while_loading = send_the_second
    assert rollout_worker.receive_weights(*as_parts(publish({}, policy_version=4))).policy_version == 4
    rollout_worker._sampler.while_loading = lambda: None
    assert rollout_worker.receive_weights(*as_parts(second)).policy_version == 5
    assert len(rollout_worker._sampler.loaded) == 2
    assert rollout_worker._sampler.num_quarantines == 0


def test_an_update_that_failed_leaves_room_for_the_next(make_worker: Callable[..., RolloutWorker]) -> None:
    rollout_worker = make_worker()
    manifest, buffers = publish(some_tensors(torch.float32))
    with pytest.raises(WeightMismatchError):
        rollout_worker.receive_weights(manifest, ArrayPart(buffers[1:]))
    assert rollout_worker.receive_weights(manifest, ArrayPart(buffers)).policy_version == 4


def test_other_threads_run_while_tensors_are_built() -> None:
    """The engine's thread must not stand still for the time of a large copy: checksums are computed without the
    interpreter's lock, and nothing is copied. No thread is made to hand the lock on here, so that another one runs
    only while it is free."""
    manifest, buffers = publish({"large": torch.zeros(50_000_000)})
    begin, ran = threading.Event(), []
    other = threading.Thread(target=lambda: (begin.wait(), ran.append(True)))
    other.start()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        begin.set()
        for _ in range(1000):  # a busy machine may need more than one to get round to the other thread
            found = checksum(buffers[0])
            if ran:
                break
        ran_meanwhile = bool(ran)
    finally:
        sys.setswitchinterval(interval_s)
    other.join()
    assert ran_meanwhile
    assert found == manifest.checksums[0]
    ((_, tensor),) = verified_tensors(manifest, buffers)
    assert tensor.data_ptr() == buffers[0].ctypes.data


@pytest.mark.parametrize(
    ("dtype", "configured", "allowed"),
    [("float32", None, 1e-3), ("bfloat16", None, 0.25), ("bfloat16", 0.01, 0.01), ("float32", 0.5, 0.5)],
)
def test_tolerance_follows_the_dtype_unless_it_is_configured(
    dtype: str,
    configured: float | None,
    allowed: float,
    make_worker: Callable[..., RolloutWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout_worker = make_worker(dtype=dtype, probe_tolerance=configured)
    monkeypatch.setattr(FakeSampler, "scores", [[-1.0, -2.0], [-3.0 - 0.7 * allowed]])
    assert rollout_worker.receive_weights(*as_parts(publish({}))).probe_error == pytest.approx(0.7 * allowed, rel=0.01)
    monkeypatch.setattr(FakeSampler, "scores", [[-1.0, -2.0], [-3.0 - 1.1 * allowed]])
    with pytest.raises(WeightMismatchError):
        rollout_worker.receive_weights(*as_parts(publish({})))


def shifted(nats: float) -> list[list[float]]:
    """The probe's scores, all off by as much."""
    return [[value - nats for value in row] for row in PROBE.logprobs]


def from_version_0(published: Published) -> tuple[WeightManifest, ArrayPart]:
    """With the probe of version 0, which is also that of the others here."""
    manifest, buffers = published
    return replace(manifest, initial_probe=PROBE), ArrayPart(buffers)


@pytest.mark.parametrize(
    ("at_start", "stale", "refused"),
    [
        (0.01, 0.035, False),
        (0.01, 0.21, True),  # a quarter of a nat was allowed once, whatever the rounding
        (0.0, 0.0099, False),  # the floor of the mean
        (0.0, 0.0101, True),
        (0.05, 0.062, False),  # the limit of the dtype
        (0.05, 0.063, True),
    ],
)
def test_tolerance_is_calibrated_where_engine_and_learner_hold_the_same_files(
    at_start: float,
    stale: float,
    refused: bool,
    make_worker: Callable[..., RolloutWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout_worker = make_worker(dtype="bfloat16")
    monkeypatch.setattr(FakeSampler, "scores", shifted(at_start))
    rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=0)))
    monkeypatch.setattr(FakeSampler, "scores", shifted(stale))
    if refused:
        with pytest.raises(WeightMismatchError, match=r"version 1 .* nats at most and .* in the mean.*calibrated"):
            rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=1)))
    else:
        rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=1)))


def test_the_mean_is_judged_as_well_as_the_largest_difference(
    make_worker: Callable[..., RolloutWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token off by 0.04 is rounding in bfloat16; all of them are not."""
    rollout_worker = make_worker(dtype="bfloat16")
    monkeypatch.setattr(FakeSampler, "scores", shifted(0.001))
    rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=0)))
    monkeypatch.setattr(FakeSampler, "scores", [[-1.0, -2.0], [-3.025]])
    rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=1)))
    monkeypatch.setattr(FakeSampler, "scores", shifted(0.025))
    with pytest.raises(WeightMismatchError, match="version 2"):
        rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=2)))


def test_an_engine_that_read_other_files_than_the_learner_never_samples(
    make_worker: Callable[..., RolloutWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that joins later: the first version that it is sent may be any."""
    rollout_worker = make_worker()
    monkeypatch.setattr(FakeSampler, "scores", shifted(0.5))
    with pytest.raises(WeightMismatchError, match=r"before any update .* 0\.5 nats .* read other weights"):
        rollout_worker.receive_weights(*from_version_0(publish({}, policy_version=5)))
    assert rollout_worker._sampler.loaded == []
    assert rollout_worker._sampler.num_quarantines == 1
