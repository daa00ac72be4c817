"""Real DeepSpeed engines that stop and go on, on one and two ranks: the bits of a run that never stopped."""

import json
import math
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from actors.rollout import Rollout
from actors.weights.manifest import WeightManifest
from actors.weights.parts import Part, open_parts
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.training_state import Progress, TrainingState
from learner.worker import LearnerWorker

engine = pytest.mark.engine

CONFIG = LearnerConfig(
    documents_per_step=4,
    micro_batch_documents=1,
    whitening="none",
    cross_entropy_coef=0.3,
    max_importance_weight=1.5,
    learning_rate=3e-4,
    num_steps=6,
    warmup_frac=0.8,  # 5 steps: the run stops inside the warm-up
    weight_decay=0.1,
)
STAGES_AND_DTYPES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")]
STOP, END = 3, 6
"""Steps before the state is copied, and in all."""
DEADLINE_S = 240
TOLERANCE = 2e-6
PROBE_IDS = [[5, 0, 9, 33, 2, 7], [1, 2, 3]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that goes on from the state in `source`; or one that writes it on the way, and then one that goes on."""

    name: str
    zero_stage: int
    dtype: str = "float32"
    model: str = "llama"
    source: str | None = None
    """Another job's name, of another process."""
    keeps_small: bool = True
    """ZeRO-3 leaves small parameters whole between two steps; all are small here."""


@dataclass(frozen=True, kw_only=True)
class End:
    """What a run computed after the stop."""

    metrics: list[dict[str, float]]
    manifest: WeightManifest | None
    buffers: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw."""

    resumed: End
    uninterrupted: End | None = None
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one rank."""

    models: Path
    states: Path
    rank: int
    num_ranks: int
    port: int


def started(job: Job, place: Place, *, seed: int = 0) -> LearnerWorker:
    worker = LearnerWorker(
        model=str(place.models / job.model),
        config=CONFIG.model_copy(update={"zero_stage": job.zero_stage}),
        dtype=job.dtype,
        max_tokens=64,
        temperature=0.7,
        probe_tolerance=100.0,
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as patch:
        if not job.keeps_small:
            original = LearnerEngine._deepspeed_config

            def with_no_small_ones(engine: LearnerEngine, dtype: str) -> dict[str, object]:
                config = original(engine, dtype)
                return config | {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

            patch.setattr(LearnerEngine, "_deepspeed_config", with_no_small_ones)
        rank = {"rank": place.rank, "world_size": place.num_ranks}
        worker.connect(**rank, address="127.0.0.1", port=place.port, timeout_s=60)
    return worker


def train(worker: LearnerWorker, scored: list[ScoredRollout], *, start: int, end: int) -> list[dict[str, float]]:
    steps = [worker.train_step(*scored, lags=[step] * len(scored)) for step in range(start, end)]
    return [{name: value for name, value in metrics.items() if name != "time/train_s"} for metrics in steps]


def published(worker: LearnerWorker) -> tuple[WeightManifest | None, list[np.ndarray]]:
    def parts_and_manifest() -> Iterator[Part | WeightManifest | None]:
        yield (yield from worker.publish(PROBE_IDS, part_bytes=4096))

    *parts, manifest = parts_and_manifest()
    return manifest, [buffer.copy() for buffer in open_parts(parts)]


def ended(worker: LearnerWorker, scored: list[ScoredRollout], *, start: int = STOP) -> End:
    metrics = train(worker, scored, start=start, end=END)
    manifest, buffers = published(worker)
    return End(metrics=metrics, manifest=manifest, buffers=buffers)


def write(worker: LearnerWorker, place: Place, name: str) -> None:
    worker.copy_state()
    worker.write_state(str(place.states / name))
    (place.states / name / f"written-{place.rank}").touch()


def run_through(job: Job, place: Place, scored: list[ScoredRollout]) -> End:
    """All steps in one go; the state is copied after the third and written after the fourth."""
    worker = started(job, place)
    published(worker)
    train(worker, scored, start=0, end=STOP)
    for name, buffer in worker._policy.causal_lm.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(0.25)
    with_negative_zero(worker)
    worker.copy_state()
    fourth = train(worker, scored, start=STOP, end=STOP + 1)
    worker.write_state(str(place.states / job.name))
    (place.states / job.name / f"written-{place.rank}").touch()
    end = ended(worker, scored, start=STOP + 1)
    return replace(end, metrics=fourth + end.metrics)


def with_negative_zero(worker: LearnerWorker) -> None:
    """A number that an addition of zeros would change, in the mean gradient of the first parameter."""
    state = worker._engine.optimizer_state()
    start, part = state.numbers(next(iter(state.shapes)), "exp_avg")
    if start == 0 and len(part):
        part[0] = -0.0


def wait_until_written(folder: Path, *, num_ranks: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not all((folder / f"written-{rank}").exists() for rank in range(num_ranks)):
        assert time.monotonic() < deadline, f"nobody has written {folder}"
        time.sleep(0.05)


def run_rank(jobs: list[Job], place: Place, scored: list[ScoredRollout]) -> dict[str, Outcome]:
    """Body of a learner process."""
    torch.set_num_threads(1)
    outcomes = {}
    for job in jobs:
        uninterrupted = None if job.source else run_through(job, place, scored)
        source = place.states / (job.source or job.name)
        wait_until_written(source, num_ranks=3 - place.num_ranks if job.source else place.num_ranks)
        worker = started(job, place, seed=1)
        train(worker, scored, start=0, end=1)  # all of which is to be replaced
        refusals = refused(worker, source, place) if job.name == REFUSING else {}
        worker.restore_state(str(source))
        write(worker, place, f"{job.name} again")
        resumed = ended(worker, scored)
        outcomes[job.name] = Outcome(resumed=resumed, uninterrupted=uninterrupted, refusals=refusals)
    return outcomes


REFUSING = "alone, ZeRO 2, float32"
NORM = "weight/model.norm.weight"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "shape": lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}),
    "dtype": lambda tensors: tensors.update({NORM: tensors[NORM].double()}),
    "lacking": lambda tensors: tensors.pop(NORM),
    "surplus": lambda tensors: tensors.update({"weight/other": torch.zeros(2)}),
    "steps": lambda tensors: tensors["step/model.norm.weight"].add_(1),
}


def refused(worker: LearnerWorker, source: Path, place: Place) -> dict[str, str]:
    """What restoring from copies says that do not fit; the worker is as it was after each."""
    with pytest.raises(RuntimeError, match="call copy_state first"):
        worker.write_state(str(place.states / "nothing"))
    before = published(worker)[1]
    errors = {}
    for kind in (*DAMAGE, "missing", "broken"):
        folder = place.states / f"damaged {kind}"
        shutil.copytree(source, folder)
        file = folder / "learner" / "rank-00000.safetensors"
        if kind == "missing":
            file.unlink()
        elif kind == "broken":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
            DAMAGE[kind](tensors)
            save_file(tensors, file)
        with pytest.raises(ValueError) as error:
            worker.restore_state(str(folder))
        errors[kind] = str(error.value)
        assert all(map(np.array_equal, before, published(worker)[1]))
    return errors


def odd_llama() -> PreTrainedModel:
    """Some parameters have an odd number of elements, so that two ranks hold unequal parts of them."""
    config = LlamaConfig(hidden_size=33, head_dim=8, intermediate_size=41, num_attention_heads=3, num_key_value_heads=1)
    return random_model(config, tie_word_embeddings=True)


def with_router() -> PreTrainedModel:
    """A mixture of experts whose router's bias is a buffer."""
    config = Glm4MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    return random_model(config)


def random_model(config: LlamaConfig | Glm4MoeConfig, **settings: object) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    common = {"vocab_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2, "max_position_embeddings": 256}
    config.update(common | {"bos_token_id": 0, "eos_token_id": 0} | settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float()


@pytest.fixture(scope="module")
def scored(make_rollout: Callable[..., Rollout]) -> list[ScoredRollout]:
    rollouts = [
        make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1, 2], [3, 4, 1]], horizon=4, seed=1),
        make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 5, 3]], horizon=5, seed=2),
        make_rollout(num_tokens=7, anchors=[3, 4], lengths=[[1, 1, 2], [2, 2, 2]], horizon=2, seed=3),
        make_rollout(num_tokens=10, anchors=[5], lengths=[[3, 2, 1]], horizon=3, seed=4),
    ]
    return [scored_at_random(rollout) for rollout in rollouts]


def scored_at_random(rollout: Rollout) -> ScoredRollout:
    generator = torch.Generator().manual_seed(rollout.ticket_id)
    groups, n = rollout.completion_lengths.shape
    completions = torch.randn(groups, n, 6, generator=generator, dtype=torch.float64)
    ground_truth = torch.randn(groups, 6, generator=generator, dtype=torch.float64)
    return ScoredRollout(rollout=rollout, raw=gram_statistics(completions, ground_truth), whitened=None, score_s=0.0)


def own_jobs(who: str) -> list[Job]:
    jobs = [
        Job(name=f"{who}, ZeRO {stage}, {dtype}", zero_stage=stage, dtype=dtype) for stage, dtype in STAGES_AND_DTYPES
    ]
    return [*jobs, Job(name=f"{who}, ZeRO 3, none kept", zero_stage=3, keeps_small=False)]


ALONE = [*own_jobs("alone"), Job(name="alone, router", zero_stage=2, model="glm4_moe")]
PAIR = own_jobs("pair")
CROSSED = ["ZeRO 1, bfloat16", "ZeRO 2, float32", "ZeRO 3, float32", "ZeRO 3, bfloat16", "ZeRO 3, none kept"]


def crossed(who: str, *, other: str) -> list[Job]:
    """Those that go on from the other process's states."""
    settings = [(job, job.name.partition(", ")[2]) for job in own_jobs(who)]
    again = [
        replace(job, name=f"{job.name} from {other}", source=f"{other}, {setting}")
        for job, setting in settings
        if setting in CROSSED
    ]
    return [*again, Job(name=f"{who}, ZeRO 0 from {other}", zero_stage=0, source=f"{other}, ZeRO 3, float32")]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory,
    states: Path,
    tokenizer: PreTrainedTokenizerFast,
    scored: list[ScoredRollout],
) -> Iterator[dict[str, Future[dict[str, Outcome]]]]:
    """Three learner processes at work: `alone` on its own, `rank 0` and `rank 1` together."""
    models = tmp_path_factory.mktemp("models")
    for name, model in (("llama", odd_llama()), ("glm4_moe", with_router())):
        model.save_pretrained(models / name)
        tokenizer.save_pretrained(models / name)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1")):
            environment.setenv(name, value)
        with ProcessPoolExecutor(max_workers=3, mp_context=get_context("spawn")) as pool:
            place = Place(models=models, states=states, rank=0, num_ranks=1, port=free_port())
            futures = {"alone": pool.submit(run_rank, [*ALONE, *crossed("alone", other="pair")], place, scored)}
            pair_jobs = [*PAIR, *crossed("pair", other="alone")]
            pair = replace(place, num_ranks=2, port=free_port())
            for rank in (0, 1):
                share = scored[2 * rank : 2 * rank + 2]
                futures[f"rank {rank}"] = pool.submit(run_rank, pair_jobs, replace(pair, rank=rank), share)
            yield futures


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outcome(processes: dict[str, Future[dict[str, Outcome]]], job: str, *, rank: int = 0) -> Outcome:
    process = "alone" if job.startswith("alone") else f"rank {rank}"
    return processes[process].result(timeout=DEADLINE_S)[job]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(chain.from_iterable(load_file(path).items() for path in (folder / "learner").glob("rank-*")))


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """But for the random state, of which there is one for each rank."""
    return {
        name: tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(tensor.numpy())
        for name, tensor in tensors.items()
        if not name.startswith("rng/")
    }


@engine
@pytest.mark.parametrize("job", [job.name for job in (*ALONE, *PAIR)])
def test_a_run_that_stopped_gives_the_bits_of_one_that_did_not(
    job: str, processes: dict[str, Future[dict[str, Outcome]]], states: Path
) -> None:
    """On each rank; the step between copy and writing is in neither what was written nor what it led to."""
    ranks = (0, 1) if job.startswith("pair") else (0,)
    for found in (outcome(processes, job, rank=rank) for rank in ranks):
        assert found.uninterrupted is not None
        assert found.resumed.metrics == found.uninterrupted.metrics
        assert all(map(np.array_equal, found.resumed.buffers, found.uninterrupted.buffers))
    manifest, expected = (
        end.manifest for end in (outcome(processes, job).resumed, outcome(processes, job).uninterrupted)
    )
    assert manifest.digest == expected.digest and manifest.policy_version == expected.policy_version == END
    assert all(map(np.array_equal, manifest.initial_probe.logprobs, expected.initial_probe.logprobs))
    assert not all(map(np.array_equal, manifest.initial_probe.logprobs, manifest.probe.logprobs))
    for rank in ranks:
        again = states / f"{job} again" / "learner"
        for name in (f"rank-{rank:05}.safetensors", "state.json"):
            assert (states / job / "learner" / name).read_bytes() == (again / name).read_bytes()


@engine
def test_control_the_step_is_shorter_inside_the_warm_up(processes: dict[str, Future[dict[str, Outcome]]]) -> None:
    rates = [metrics["optim/learning_rate"] for metrics in outcome(processes, REFUSING).resumed.metrics]
    assert rates == pytest.approx([3e-4 * step / 6 for step in (4, 5, 6)])


CROSSINGS = [*crossed("alone", other="pair"), *crossed("pair", other="alone")]


@engine
@pytest.mark.parametrize("job", CROSSINGS, ids=lambda job: job.name)
def test_another_number_of_ranks_starts_from_the_same_bits(
    job: Job, processes: dict[str, Future[dict[str, Outcome]]], states: Path
) -> None:
    """Of weights, moments, steps and buffers, right after the load."""
    outcome(processes, job.name)
    outcome(processes, job.source)
    found, expected = bits(tensors_of(states / f"{job.name} again")), bits(tensors_of(states / job.source))
    assert found == expected


@engine
@pytest.mark.parametrize("job", [job for job in CROSSINGS if job.dtype == "float32"], ids=lambda job: job.name)
def test_another_number_of_ranks_goes_on_to_the_same_weights(
    job: Job, processes: dict[str, Future[dict[str, Outcome]]]
) -> None:
    """But for the order of additions."""
    found, expected = outcome(processes, job.name).resumed, outcome(processes, job.source).uninterrupted
    for own, other in zip(found.buffers, expected.buffers, strict=True):
        own, other = own.view(np.float32), other.view(np.float32)
        assert np.abs(own - other).max() < TOLERANCE
    norms = [[metrics["optim/grad_norm"] for metrics in end.metrics] for end in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@engine
@pytest.mark.parametrize("who", ["alone", "pair"])
def test_files_hold_whole_parameters_and_do_not_depend_on_how_they_are_sharded(
    who: str, processes: dict[str, Future[dict[str, Outcome]]], states: Path
) -> None:
    for job in ALONE if who == "alone" else PAIR:
        outcome(processes, job.name)
    model, (first, *_) = odd_llama(), [name for name, _ in odd_llama().named_parameters()]
    for stage, dtype in STAGES_AND_DTYPES:
        folder = states / f"{who}, ZeRO {stage}, {dtype}"
        tensors = tensors_of(folder)
        for name, parameter in model.named_parameters():
            held = [tensors[f"{number}/{name}"] for number in ("weight", "exp_avg", "exp_avg_sq")]
            assert {(tensor.dtype, tensor.shape) for tensor in held} == {(torch.float32, parameter.shape)}
            assert int(tensors[f"step/{name}"]) == STOP and all(float(tensor.abs().sum()) > 0 for tensor in held)
        assert math.copysign(1, float(tensors[f"exp_avg/{first}"].flatten()[0])) == -1
        sizes = [path.stat().st_size for path in (folder / "learner").glob("rank-*")]
        assert len(sizes) == (1 if who == "alone" else 2) and max(sizes) < 1.5 * min(sizes)
        assert json.loads((folder / "learner" / "state.json").read_text())["policy_version"] == STOP


@engine
def test_saved_buffers_are_restored(processes: dict[str, Future[dict[str, Outcome]]], states: Path) -> None:
    outcome(processes, "alone, router")
    (bias,) = [tensor for name, tensor in tensors_of(states / "alone, router").items() if name.startswith("buffer/")]
    assert bias.tolist() == [0.25] * 4


@engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_stage_takes_the_same_steps(
    stage: int, dtype: str, processes: dict[str, Future[dict[str, Outcome]]], states: Path
) -> None:
    """Without ZeRO, in bfloat16, DeepSpeed takes one more at the start; the weights in float32 show it."""
    names = [f"alone, ZeRO {one}, {dtype}" for one in (stage, 2)]
    found, expected = [(outcome(processes, name), tensors_of(states / name))[1] for name in names]
    for name in (name for name in expected if name.startswith(("weight/", "exp_avg/", "step/"))):
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=1e-5, atol=3e-7)


REFUSALS = {
    "shape": f"tensor {NORM} is float32 (32,), in the model it is float32 (33,); resume with the model of the run",
    "dtype": f"tensor {NORM} is float64 (33,), in the model it is float32 (33,)",
    "lacking": f"lacks tensor {NORM}, float32 (33,)",
    "surplus": "tensor weight/other is float32 (2,), in the model it is not there",
    "steps": "they were stepped [3, 4] times), which learner.zero_stage=0 alone keeps apart",
    "missing": "rank-00000.safetensors is missing; resume from another checkpoint",
    "broken": "rank-00000.safetensors cannot be read: ",
}


@engine
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_changed(
    kind: str, processes: dict[str, Future[dict[str, Outcome]]], states: Path
) -> None:
    error = outcome(processes, REFUSING).refusals[kind]
    assert REFUSALS[kind] in error and str(states / f"damaged {kind}" / "learner") in error


def test_a_disk_that_fills_up_is_an_oserror(tmp_path: Path) -> None:
    progress = Progress(policy_version=3, initial_probe=None, agreement=(1.0, False, 0.0, 0))
    state = TrainingState(rank=0, num_ranks=1, progress=progress, tensors={"weight/one": torch.ones(10_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            state.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state.write(tmp_path)
    assert load_file(tmp_path / "rank-00000.safetensors")["weight/one"].sum() == 10_000
