"""Real DeepSpeed engines, on one and two ranks, against a plain AdamW loop with the loss written out."""

import copy
import math
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.rollout import Document, Rollout
from actors.weights.manifest import WeightManifest, WeightMismatchError, checksum, verified_tensors
from actors.weights.parts import Part, open_parts
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout
from learner.batch import Example, make_micro_batches
from learner.config import LearnerConfig
from learner.engine import StepNotApplied
from learner.rewards import compute_rewards
from learner.worker import LearnerWorker

pytestmark = pytest.mark.engine

TEMPERATURE = 0.7
NUM_STEPS = 3
TOLERANCE = 2e-6
PROBE_IDS = [[5, 0, 9, 33, 2, 7], [1, 2, 3]]
EBFT = LearnerConfig(
    documents_per_step=4,
    micro_batch_documents=1,
    whitening="none",
    cross_entropy_coef=0.3,
    max_importance_weight=1.5,
    learning_rate=3e-4,
    num_steps=3,
    warmup_frac=0.5,  # 2 steps
    weight_decay=0.1,
    max_grad_norm=55.0,  # some steps' gradients are longer, some are not
)
CAREFUL = EBFT.model_copy(update={"ess_learning_rate": True})
SFT = EBFT.model_copy(update={"objective": "sft"})
CHUNK_TOKENS = 4
DEADLINE_S = 240
STAGES_AND_DTYPES = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some steps of one engine; `scored` is the rank's share of each step."""

    config: LearnerConfig
    scored: list[Example]
    num_steps: int = NUM_STEPS
    broken: list[ScoredRollout] | None = None
    """Share of one more step, which is to fail."""
    probe_tolerance: float | None = 100.0
    """Of log-probs at lag 0; the rollouts here are those of a neighbor of the policy."""
    poisoned: bool = False
    """Some of that step's gradient is NaN on this rank."""
    dtype: str = "float32"
    chunk_tokens: int | None = None
    """Positions whose logits stand in memory at once; None: the usual number, more than any document here has."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw."""

    metrics: list[dict[str, float]]
    manifest: WeightManifest | None
    buffers: list[np.ndarray] | None
    cross_entropy: list[float]
    error: str | None = None
    is_skipped: bool = False
    """Whether that was the error of a step that leaves the engine as it was."""
    buffers_after_error: list[np.ndarray] | None = None
    buffers_at_end: list[np.ndarray] | None = None
    """After more steps, up to NUM_STEPS in all without the broken one."""


def lags(scored: list[Example], *, at: int) -> list[int]:
    """Those of documents without completions are ignored."""
    return [0 if isinstance(one, Document) else at - one.rollout.min_policy_version for one in scored]


def published(worker: LearnerWorker) -> tuple[WeightManifest | None, list[np.ndarray] | None]:
    """What a rank publishes, in parts that are smaller than most tensors, copied out of its memory."""

    def parts_and_manifest() -> Iterator[Part | WeightManifest | None]:
        yield (yield from worker.publish(PROBE_IDS, part_bytes=4096))

    *parts, manifest = parts_and_manifest()
    assert len(parts) > 1 or manifest is None
    return manifest, None if manifest is None else [buffer.copy() for buffer in open_parts(parts)]


def run_rank(model: str, jobs: list[Job], *, rank: int, world_size: int, port: int) -> list[Outcome]:
    """Body of a learner process: one worker for each job, one after the other."""
    torch.set_num_threads(1)
    outcomes = []
    for job in jobs:
        worker = LearnerWorker(
            model=model,
            config=job.config,
            dtype=job.dtype,
            max_tokens=64,
            temperature=TEMPERATURE,
            probe_tolerance=job.probe_tolerance,
            seed=0,
        )
        if job.chunk_tokens is not None:
            worker._policy._chunk_tokens = job.chunk_tokens
        worker.connect(rank=rank, world_size=world_size, address="127.0.0.1", port=port, timeout_s=60)
        metrics = [worker.train_step(*job.scored, lags=lags(job.scored, at=v)) for v in range(job.num_steps)]
        manifest, buffers = published(worker)
        documents = [one if isinstance(one, Document) else one.rollout.document for one in job.scored]
        outcome = Outcome(
            metrics=metrics, manifest=manifest, buffers=buffers, cross_entropy=worker.cross_entropy(documents)
        )
        if job.poisoned:
            poison = next(worker._engine.policy.parameters()).register_hook(lambda gradient: gradient * math.nan)
        if job.broken is not None:
            try:
                worker.train_step(*job.broken, lags=lags(job.broken, at=job.num_steps))
            except (StepNotApplied, WeightMismatchError) as error:
                outcome = replace(
                    outcome,
                    error=str(error),
                    is_skipped=isinstance(error, StepNotApplied),
                    buffers_after_error=published(worker)[1],
                )
        if job.poisoned:
            poison.remove()
        if outcome.is_skipped:
            metrics += [worker.train_step(*job.scored, lags=lags(job.scored, at=v)) for v in range(1, NUM_STEPS)]
            outcome = replace(outcome, buffers_at_end=published(worker)[1])
        outcomes.append(outcome)
    return outcomes


@pytest.fixture(scope="module")
def model(make_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_causal_lm("llama", tied=True)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A checkpoint whose padding token is its EOS, token 0, as many have it; a padding row would get no gradient."""
    folder = tmp_path_factory.mktemp("policy")
    saved = copy.deepcopy(model)
    saved.config.pad_token_id = 0
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(make_rollout: Callable[..., Rollout], model: PreTrainedModel) -> list[ScoredRollout]:
    """Four documents of unequal length, sampled by a neighbor of the initial policy; token 0 occurs in the first."""
    rollouts = [
        make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1, 2], [3, 4, 1]], horizon=4, seed=1),
        make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 5, 3]], horizon=5, seed=2, num_prompt_tokens=6),
        make_rollout(num_tokens=7, anchors=[3, 4], lengths=[[1, 1, 2], [2, 2, 2]], horizon=2, seed=3),
        make_rollout(num_tokens=10, anchors=[5], lengths=[[3, 2, 1]], horizon=3, seed=4),
    ]
    rollouts[0].document.token_ids[[1, 7]] = 0
    return [score_at_random(with_behavior_near(model, rollout), seed) for seed, rollout in enumerate(rollouts)]


def with_behavior_near(model: PreTrainedModel, rollout: Rollout, *, noise: float = 0.4) -> Rollout:
    """Sampled by a policy whose log-probs differ from the model's by at most `noise` nats."""
    random = np.random.default_rng(rollout.ticket_id)
    behavior = np.zeros(rollout.behavior_logprobs.shape, dtype=np.float32)
    with torch.no_grad():
        for group, j, logprobs in completion_logprobs(model, rollout):
            off_by = random.uniform(-noise, noise, len(logprobs))
            behavior[group, j, : len(logprobs)] = np.minimum(logprobs.numpy() + off_by, 0)
    return replace(rollout, behavior_logprobs=behavior)


def score_at_random(rollout: Rollout, seed: int) -> ScoredRollout:
    generator = torch.Generator().manual_seed(seed)
    groups, n = rollout.completion_lengths.shape
    completions = torch.randn(groups, n, 6, generator=generator, dtype=torch.float64)
    ground_truth = torch.randn(groups, 6, generator=generator, dtype=torch.float64)
    return ScoredRollout(rollout=rollout, raw=gram_statistics(completions, ground_truth), whitened=None, score_s=0.0)


def completion_logprobs(model: PreTrainedModel, rollout: Rollout) -> Iterator[tuple[int, int, Tensor]]:
    """(group, completion, its tokens' log-probs at the sampling temperature), each from a sequence of its own."""
    ids = rollout.document.token_ids.tolist()
    for group, anchor in enumerate(rollout.document.anchors.tolist()):
        for j, length in enumerate(rollout.completion_lengths[group].tolist()):
            completion = rollout.completion_ids[group, j, :length].tolist()
            logits = model(input_ids=torch.tensor([ids[:anchor] + completion])).logits[0]
            rows = (logits[anchor - 1 : anchor + length - 1] / TEMPERATURE).log_softmax(-1)
            yield group, j, rows[range(length), completion]


def document_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    ids = torch.from_numpy(rollout.document.token_ids)
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    own = logprobs[range(len(ids) - 1), ids[1:]]
    return own[max(1, rollout.document.num_prompt_tokens) - 1 :]


def slow_loss(model: PreTrainedModel, scored: list[ScoredRollout], config: LearnerConfig) -> tuple[Tensor, list[float]]:
    """The step's loss and the ratios p_learner / p_behavior of its completions, not truncated."""
    documents = torch.cat([document_logprobs(model, one.rollout) for one in scored])
    if not config.samples:
        return -documents.mean(), []
    sampled, all_ratios, num_sampled = torch.zeros(()), [], 0
    for one in scored:
        tokens = list(completion_logprobs(model, one.rollout))
        ratios = torch.zeros(one.rollout.completion_lengths.shape, dtype=torch.float64)
        for group, j, logprobs in tokens:
            behavior = one.rollout.behavior_logprobs[group, j, : len(logprobs)]
            ratios[group, j] = math.exp(float(logprobs.detach().double().sum()) - float(behavior.sum()))
        truncated = ratios.clamp(max=config.max_importance_weight)
        all_ratios += ratios.flatten().tolist()
        advantage = compute_rewards(one, config, truncated).advantage
        for group, j, logprobs in tokens:
            sampled = sampled - float(truncated[group, j] * advantage[group, j]) * logprobs.sum()
            num_sampled += len(logprobs)
    return config.cross_entropy_coef * -documents.mean() + sampled / num_sampled, all_ratios


def effective_frac(weights: list[float]) -> float:
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The plain loop's parameters after the last step, and what it saw on the way."""

    model: PreTrainedModel
    grad_norms: list[float]
    learning_rates: list[float]
    ratios: list[list[float]]
    weights: list[list[float]]
    """The ratios, truncated."""
    cross_entropy: list[float]
    """Of each step's documents, before the step."""


def plain_adamw(model: PreTrainedModel, scored: list[ScoredRollout], config: LearnerConfig) -> Reference:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.adam_betas, weight_decay=config.weight_decay)
    seen = Reference(model=model, grad_norms=[], learning_rates=[], ratios=[], weights=[], cross_entropy=[])
    for step in range(NUM_STEPS):
        rate = config.learning_rate * min(1.0, (step + 1) / (math.ceil(config.warmup_frac * NUM_STEPS) + 1))
        optimizer.zero_grad()
        loss, ratios = slow_loss(model, scored, config)
        if config.ess_learning_rate:
            rate *= math.sqrt(effective_frac(ratios))
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            cross_entropy = -torch.cat([document_logprobs(model, one.rollout) for one in scored]).mean()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, config.max_grad_norm / (norm + 1e-6))
        optimizer.step()
        seen.grad_norms.append(norm)
        seen.learning_rates.append(rate)
        seen.ratios.append(ratios)
        seen.weights.append([min(ratio, config.max_importance_weight) for ratio in ratios])
        seen.cross_entropy.append(float(cross_entropy))
    return seen


@pytest.fixture(scope="module")
def bare(scored: list[ScoredRollout]) -> list[Document]:
    return [one.rollout.document for one in scored]


@pytest.fixture(scope="module")
def ebft_reference(model: PreTrainedModel, scored: list[ScoredRollout]) -> Reference:
    return plain_adamw(model, scored, EBFT)


@pytest.fixture(scope="module")
def sft_reference(model: PreTrainedModel, scored: list[ScoredRollout]) -> Reference:
    return plain_adamw(model, scored, SFT)


@pytest.fixture(scope="module")
def processes(
    folder: Path, model: PreTrainedModel, scored: list[ScoredRollout], bare: list[Document]
) -> Iterator[dict[str, Future[list[Outcome]]]]:
    """Three learner processes at work: `alone` on its own, `rank 0` and `rank 1` together."""
    jobs = [Job(config=staged(EBFT, stage), scored=scored) for stage in (0, 1, 2, 3)]
    jobs.append(Job(config=SFT, scored=bare))
    jobs.append(Job(config=CAREFUL, scored=scored))
    broken = Job(config=EBFT, scored=scored, num_steps=1, broken=scored)
    for stage, dtype in STAGES_AND_DTYPES:
        one = replace(broken, config=staged(EBFT, stage), dtype=dtype)
        jobs.append(replace(one, poisoned=True))
        jobs.append(replace(one, broken=[*scored[:3], with_nan(scored[3])]))
        jobs.append(replace(one, num_steps=NUM_STEPS, broken=None))

    def share(rank: int) -> list[Job]:
        own = slice(2 * rank, 2 * rank + 2)
        shares = [Job(config=staged(EBFT, stage), scored=scored[own]) for stage in (2, 3)]
        shares += [Job(config=SFT, scored=bare[own]), Job(config=CAREFUL, scored=scored[own])]
        poisoned = Job(config=EBFT, scored=scored[own], num_steps=1, broken=scored[own], poisoned=rank == 1)
        shares += [replace(poisoned, config=staged(EBFT, stage)) for stage in (2, 3)]
        shares.append(Job(config=staged(EBFT, 3), scored=scored[own], chunk_tokens=CHUNK_TOKENS))
        broken = Job(config=EBFT, scored=scored[own], num_steps=1, broken=scored[own])
        shares.append(replace(broken, broken=[with_nan(one) for one in scored[own]]) if rank else broken)
        rollouts = [with_behavior_near(model, one.rollout, noise=0.4 if rank else 0.0) for one in scored[own]]
        disagreeing = [replace(one, rollout=rollout) for one, rollout in zip(scored[own], rollouts, strict=True)]
        return [*shares, replace(broken, num_steps=0, broken=disagreeing, probe_tolerance=None)]

    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1")):
            environment.setenv(name, value)
        with ProcessPoolExecutor(max_workers=3, mp_context=get_context("spawn")) as pool:
            alone, together = free_port(), free_port()
            futures = {"alone": pool.submit(run_rank, str(folder), jobs, rank=0, world_size=1, port=alone)}
            for rank in (0, 1):
                futures[f"rank {rank}"] = pool.submit(
                    run_rank, str(folder), share(rank), rank=rank, world_size=2, port=together
                )
            yield futures


def staged(config: LearnerConfig, zero_stage: int) -> LearnerConfig:
    return config.model_copy(update={"zero_stage": zero_stage})


def with_nan(scored: ScoredRollout) -> ScoredRollout:
    return replace(scored, raw=replace(scored.raw, ground_truth_products=scored.raw.ground_truth_products * math.nan))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outcome(processes: dict[str, Future[list[Outcome]]], process: str, job: int) -> Outcome:
    return processes[process].result(timeout=DEADLINE_S)[job]


def largest_difference(found: Outcome, reference: PreTrainedModel) -> float:
    expected = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    tensors = verified_tensors(found.manifest, found.buffers)
    return max(float((tensor - expected[name]).abs().max()) for name, tensor in tensors)


EBFT_OUTCOMES = [("alone", 0), ("alone", 1), ("alone", 2), ("alone", 3), ("rank 0", 0), ("rank 0", 1), ("rank 0", 6)]
EBFT_NAMES = [
    "1 rank, ZeRO 0",
    "1 rank, ZeRO 1",
    "1 rank, ZeRO 2",
    "1 rank, ZeRO 3",
    "2 ranks, ZeRO 2",
    "2 ranks, ZeRO 3",
    "2 ranks, ZeRO 3, logits in unequal numbers of chunks",
]


@pytest.mark.parametrize(("process", "job"), EBFT_OUTCOMES, ids=EBFT_NAMES)
def test_three_steps_equal_a_plain_adamw_loop(
    process: str,
    job: int,
    processes: dict[str, Future[list[Outcome]]],
    ebft_reference: Reference,
    model: PreTrainedModel,
) -> None:
    found = outcome(processes, process, job)
    assert largest_difference(found, ebft_reference.model) < TOLERANCE
    assert largest_difference(found, model) > 5e-4
    assert min(ebft_reference.grad_norms) < EBFT.max_grad_norm < max(ebft_reference.grad_norms)
    assert min(map(min, ebft_reference.weights)) < 0.8 and max(map(max, ebft_reference.weights)) == 1.5
    norms = [metrics["optim/grad_norm"] for metrics in found.metrics]
    assert norms == pytest.approx(ebft_reference.grad_norms, rel=1e-4)
    rates = [metrics["optim/learning_rate"] for metrics in found.metrics]
    assert rates == pytest.approx(ebft_reference.learning_rates)


@pytest.mark.parametrize(("process", "job"), [("alone", 5), ("rank 0", 3)], ids=["1 rank", "2 ranks"])
def test_few_effective_samples_shorten_the_step(
    process: str,
    job: int,
    processes: dict[str, Future[list[Outcome]]],
    ebft_reference: Reference,
    model: PreTrainedModel,
    scored: list[ScoredRollout],
) -> None:
    """By the root of the effective sample fraction of all completions of the step, on whatever rank they are."""
    found, reference = outcome(processes, process, job), plain_adamw(model, scored, CAREFUL)
    assert largest_difference(found, reference.model) < TOLERANCE
    assert largest_difference(found, ebft_reference.model) > TOLERANCE
    rates = [metrics["optim/learning_rate"] for metrics in found.metrics]
    assert rates == pytest.approx(reference.learning_rates)
    assert all(rate < 0.99 * usual for rate, usual in zip(rates, ebft_reference.learning_rates, strict=True))


@pytest.mark.parametrize(
    "other",
    [
        {"max_grad_norm": 1e9},
        {"max_grad_norm": 1.0},
        {"max_importance_weight": 1e9},
        {"cross_entropy_coef": 0.25},
        {"reward_weights": "none"},
        {"diversity_coef": 0.9},
        {"weight_decay": 0.0},
        {"warmup_frac": 1.0},
        {"adam_betas": (0.5, 0.5)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_control_each_setting_moves_the_plain_loop_out_of_tolerance(
    other: dict[str, object],
    processes: dict[str, Future[list[Outcome]]],
    model: PreTrainedModel,
    scored: list[ScoredRollout],
) -> None:
    reference = plain_adamw(model, scored, EBFT.model_copy(update=other))
    assert largest_difference(outcome(processes, "alone", 2), reference.model) > TOLERANCE


@pytest.mark.parametrize(("process", "job"), EBFT_OUTCOMES, ids=EBFT_NAMES)
def test_metrics_are_those_of_the_whole_step(
    process: str,
    job: int,
    processes: dict[str, Future[list[Outcome]]],
    ebft_reference: Reference,
    scored: list[ScoredRollout],
) -> None:
    found = outcome(processes, process, job).metrics
    for step, metrics in enumerate(found):
        weights = torch.tensor(ebft_reference.weights[step], dtype=torch.float64)
        shapes = [one.rollout.completion_lengths.shape for one in scored]
        parts = weights.split([groups * n for groups, n in shapes])
        group_rewards = [
            compute_rewards(one, EBFT, part.reshape(shape))
            for one, part, shape in zip(scored, parts, shapes, strict=True)
        ]
        rewards = torch.cat([one.reward.flatten() for one in group_rewards])
        expected = {
            "lag/mean": step,
            "lag/max": step,
            "loss/cross_entropy": ebft_reference.cross_entropy[step],
            "reward/total/mean": float(rewards.mean()),
            "off_policy/weight/mean": float(weights.mean()),
            "off_policy/weight/max": float(weights.max()),
            "off_policy/truncated_frac": float((weights == 1.5).float().mean()),
            "off_policy/ess_frac": effective_frac(ebft_reference.ratios[step]),
            "off_policy/ess_truncated_frac": effective_frac(ebft_reference.weights[step]),
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert all(map(math.isfinite, metrics.values()))


def test_control_ranks_need_unequal_numbers_of_chunks(scored: list[ScoredRollout]) -> None:
    """Of sampled tokens and of document tokens, in one micro-batch or another."""
    packed = [batch.packed for batch in make_micro_batches(scored, documents=1)]
    for predictions in ([p.completion_tokens for p in packed], [p.document_tokens for p in packed]):
        chunks = [-(-len(one.target) // CHUNK_TOKENS) for one in predictions]
        assert chunks[:2] != chunks[2:] and min(chunks) < max(chunks) - 1


def test_both_ranks_report_the_same_step(processes: dict[str, Future[list[Outcome]]]) -> None:
    for job in (0, 1, 2, 6):
        first, second = outcome(processes, "rank 0", job), outcome(processes, "rank 1", job)
        for own, other in zip(first.metrics, second.metrics, strict=True):
            assert set(own) == set(other)
            assert {k: v for k, v in own.items() if k != "time/train_s"} == pytest.approx(
                {k: v for k, v in other.items() if k != "time/train_s"}
            )
        assert second.manifest is None and second.buffers is None


@pytest.mark.parametrize(("process", "job"), [("alone", 4), ("rank 0", 2)], ids=["1 rank", "2 ranks"])
def test_without_policy_gradient_it_is_supervised_fine_tuning(
    process: str,
    job: int,
    processes: dict[str, Future[list[Outcome]]],
    sft_reference: Reference,
    ebft_reference: Reference,
) -> None:
    found = outcome(processes, process, job)
    assert largest_difference(found, sft_reference.model) < TOLERANCE
    assert largest_difference(found, ebft_reference.model) > 1e-4
    losses = [metrics["loss/cross_entropy"] for metrics in found.metrics]
    assert losses == pytest.approx(sft_reference.cross_entropy, rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert not any(name.startswith(("off_policy/", "reward/")) for name in found.metrics[0])


@pytest.mark.parametrize(("process", "job"), EBFT_OUTCOMES, ids=EBFT_NAMES)
def test_publication_holds_each_parameter_once_and_a_probe(
    process: str, job: int, processes: dict[str, Future[list[Outcome]]], model: PreTrainedModel
) -> None:
    found = outcome(processes, process, job)
    manifest = found.manifest
    assert manifest.policy_version == NUM_STEPS
    assert manifest.names == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in manifest.names and "lm_head.weight" in model.state_dict()
    assert manifest.shapes == [tuple(parameter.shape) for parameter in model.parameters()]
    assert set(manifest.dtypes) == {"float32"}
    assert manifest.checksums == [checksum(buffer) for buffer in found.buffers]
    assert manifest.num_bytes == sum(buffer.size for buffer in found.buffers)
    published = copy.deepcopy(model)
    published.load_state_dict(dict(verified_tensors(manifest, found.buffers)), strict=False)
    published.tie_weights()
    for ids, logprobs in zip(PROBE_IDS, manifest.probe.logprobs, strict=True):
        logits = published(input_ids=torch.tensor([ids])).logits[0].detach()
        expected = [float(logits[i].log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
    assert manifest.probe.token_ids == PROBE_IDS


@pytest.mark.parametrize(("process", "job"), EBFT_OUTCOMES, ids=EBFT_NAMES)
def test_cross_entropy_of_each_document_under_the_current_weights(
    process: str,
    job: int,
    processes: dict[str, Future[list[Outcome]]],
    ebft_reference: Reference,
    scored: list[ScoredRollout],
) -> None:
    found = outcome(processes, process, job).cross_entropy
    own = scored[: len(found)]
    with torch.no_grad():
        expected = [-float(document_logprobs(ebft_reference.model, one.rollout).mean()) for one in own]
    assert len(found) in (2, 4)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_in_bfloat16_every_stage_takes_the_same_steps(stage: int, processes: dict[str, Future[list[Outcome]]]) -> None:
    """Without ZeRO, DeepSpeed takes one more at the start; then one weight in twenty rounds to another number."""
    jobs = [8 + 3 * STAGES_AND_DTYPES.index((one, "bfloat16")) for one in (stage, 2)]
    found, expected = (
        np.concatenate([buffer.view(np.int16) for buffer in outcome(processes, "alone", job).buffers]) for job in jobs
    )
    assert np.mean(found != expected) < 1e-3


@pytest.mark.parametrize("rank", [0, 1])
def test_an_engine_that_disagrees_at_lag_0_is_refused_by_both_ranks(
    rank: int, processes: dict[str, Future[list[Outcome]]]
) -> None:
    found = outcome(processes, f"rank {rank}", 8)
    assert (
        found.error is not None and "step 1: at equal weights the learner's log-probs of 40 sampled" in found.error
    )  # both steps
    assert "model of another type than 'llama'" in found.error
    if rank == 0:
        for before, after in zip(found.buffers, found.buffers_after_error, strict=True):
            assert np.array_equal(before, after)


SKIPPED = [
    pytest.param("alone", 6 + 3 * index + kind, cause, 8 + 3 * index, id=f"{name}, 1 rank, ZeRO {stage}, {dtype}")
    for index, (stage, dtype) in enumerate(STAGES_AND_DTYPES)
    for kind, (name, cause) in enumerate([("gradient", "the gradient's norm is "), ("loss", "the loss is nan")])
]
SKIPPED += [
    pytest.param(f"rank {rank}", job, cause, as_job, id=f"{name}, rank {rank} of 2, ZeRO {stage}")
    for rank in (0, 1)
    for job, stage, as_job, name, cause in (
        (4, 2, 0, "gradient", "the gradient's norm is "),
        (5, 3, 1, "gradient", "the gradient's norm is "),
        (7, 2, 0, "loss", "the loss is nan"),
    )
]


@pytest.mark.parametrize(("process", "job", "cause", "same_without"), SKIPPED)
def test_a_step_that_is_not_finite_is_refused_and_the_next_ones_train_as_if_it_had_not_been(
    process: str,
    job: int,
    cause: str,
    same_without: int,
    processes: dict[str, Future[list[Outcome]]],
    model: PreTrainedModel,
) -> None:
    """What is broken is the last of four micro-batches, or one rank's share alone; every rank must refuse."""
    found, without = outcome(processes, process, job), outcome(processes, process, same_without)
    assert found.error is not None and f"step 2: {cause}" in found.error
    assert "the step was not applied. Lower learner.learning_rate" in found.error
    timed = {"time/train_s"}
    for own, other in zip(found.metrics, without.metrics, strict=True):
        assert {k: v for k, v in own.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    if process != "rank 1":
        assert all(map(np.array_equal, found.buffers, found.buffers_after_error))
        assert all(map(np.array_equal, found.buffers_at_end, without.buffers))
        assert not all(map(np.array_equal, found.buffers, without.buffers))
