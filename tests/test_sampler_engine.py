"""One real vLLM engine in this process: what it samples, what it reports, and how weights enter it."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.config import RolloutConfig
from actors.rollout import Document, Rollout, Ticket
from actors.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT, context_seed
from actors.weights import Probe, WeightManifest, WeightMismatchError, WeightReceiver, as_bytes, checksum
from actors.worker import RolloutWorker
from feature_server.packing import pack
from learner.policy import PackedPolicy

pytestmark = pytest.mark.engine

TEMPERATURE = 0.7
TOLERANCE = 1e-4
MAX_TOKENS = 160
EOS = 0

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a trap of vLLM's CPU kernels")


@pytest.fixture(scope="module")
def policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Tied, of 520 tokens: more than the tokenizer has, fewer than vLLM pads to; fond of EOS."""
    assert tokenizer.eos_token_id == EOS and len(tokenizer) <= 512
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=520,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.get_input_embeddings().weight[EOS] *= 4
    return model


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[RolloutWorker]:
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = RolloutConfig(temperature=TEMPERATURE, max_num_seqs=128, block_size=32, kv_cache_gib=0.1)
    with pytest.MonkeyPatch.context() as environment:
        variables = ENGINE_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            variables |= CPU_ENGINE_ENVIRONMENT
        for name, value in variables.items():
            environment.setenv(name, value)
        environment.setattr(dynamo_config, "disable", True)  # its variable is read when it is imported
        yield RolloutWorker(model=str(folder), config=config, dtype="float32", max_tokens=MAX_TOKENS)
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@pytest.fixture
def worker(engine: RolloutWorker, policy: LlamaForCausalLM) -> Iterator[RolloutWorker]:
    """The engine with the initial weights, whatever the test before did to it."""
    yield engine
    if engine._policy_version != 0:
        engine.receive_weights(*publication(policy, policy_version=0))


@pytest.fixture(scope="module")
def other_policy(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    """The policy after a large update of every parameter."""
    other = copy.deepcopy(policy)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return other


def publication(
    model: LlamaForCausalLM, *, policy_version: int, probe_length: int = 70
) -> tuple[WeightManifest, list[np.ndarray]]:
    """What a learner with this model publishes; a tied head is no parameter of its own."""
    parameters = dict(model.named_parameters())
    assert "lm_head.weight" not in parameters
    buffers = [as_bytes(parameter).copy() for parameter in parameters.values()]
    probe_ids = [random_ids(probe_length, seed=100), random_ids(9, seed=101)]
    logprobs = [own_logprobs(model, ids, temperature=1.0)[1:].numpy() for ids in probe_ids]
    manifest = WeightManifest(
        policy_version=policy_version,
        names=list(parameters),
        dtypes=["float32"] * len(parameters),
        shapes=[tuple(parameter.shape) for parameter in parameters.values()],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=Probe(token_ids=probe_ids, logprobs=logprobs),
    )
    return manifest, buffers


def random_ids(length: int, *, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 512, length).tolist()


def ticket(
    seed: int, *, anchors: list[int], horizon: int = 6, completions: int = 3, ends_with_eos: bool = False
) -> Ticket:
    """Documents differ by seed and share no prefix."""
    document = Document(
        document_id=f"document {seed}",
        token_ids=np.array(random_ids(anchors[-1] + horizon, seed=seed)),
        anchors=np.array(anchors),
        horizon=horizon,
        ends_with_eos=ends_with_eos,
    )
    return Ticket(
        ticket_id=seed,
        document=document,
        seed=1000 + seed,
        completions_per_context=completions,
        min_policy_version=0,
    )


def own_logprobs(model: LlamaForCausalLM, token_ids: list[int], *, temperature: float) -> Tensor:
    """[T] log-prob of each token under transformers' own forward; 0 for the first."""
    logits = model(input_ids=torch.tensor([token_ids])).logits[0].double() / temperature
    logprobs = [logits[i - 1].log_softmax(-1)[token_ids[i]] for i in range(1, len(token_ids))]
    return torch.stack([torch.zeros((), dtype=torch.float64), *logprobs])


def logprob_errors(rollouts: list[Rollout], model: LlamaForCausalLM, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """|behavior - transformers| of every sampled token, each completion from a sequence of its own."""
    errors = []
    for rollout in rollouts:
        ids = rollout.document.token_ids.tolist()
        for group, anchor in enumerate(rollout.document.anchors.tolist()):
            for j, length in enumerate(rollout.completion_lengths[group].tolist()):
                completion = rollout.completion_ids[group, j, :length].tolist()
                own = own_logprobs(model, ids[:anchor] + completion, temperature=temperature)[anchor:]
                errors.append(np.abs(own.numpy() - rollout.behavior_logprobs[group, j, :length]))
    return np.concatenate(errors)


def assert_same_completions(found: Rollout, expected: Rollout) -> None:
    assert found.document.document_id == expected.document.document_id
    assert np.array_equal(found.completion_ids, expected.completion_ids)
    assert np.allclose(found.behavior_logprobs, expected.behavior_logprobs, rtol=0, atol=TOLERANCE)


STRIDED = [1, 2, 31, 32, 33, 64, 96, 100]
"""Anchors before, at and behind the borders of cache blocks."""


def test_behavior_logprobs_are_those_of_the_sampling_policy(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    """First cold, then from cached prefixes; at temperature 1 they would be others."""
    tickets = [ticket(1, anchors=STRIDED), ticket(2, anchors=[20, 50, 80])]
    for _ in range(2):
        rollouts = worker.sample(tickets)
        errors = logprob_errors(rollouts, policy)
        assert len(errors) == (8 + 3) * 3 * 6
        assert errors.max() < TOLERANCE
        assert logprob_errors(rollouts, policy, temperature=1.0).mean() > 0.1


def test_engine_and_packed_learner_give_the_same_tokens_the_same_logprobs(
    worker: RolloutWorker, policy: LlamaForCausalLM
) -> None:
    """What stands between them is rounding: on-policy importance weights are 1."""
    tickets = [
        ticket(5, anchors=STRIDED),
        ticket(6, anchors=[10, 20, 30], horizon=24, completions=4, ends_with_eos=True),
        ticket(7, anchors=[80], horizon=16),
    ]
    rollouts = worker.sample(tickets)
    with torch.no_grad():
        learner = PackedPolicy(policy, attention="sdpa", logits_chunk_tokens=1024)
        logprobs, _ = learner(pack(rollouts), TEMPERATURE)
    in_completion = [np.arange(r.document.horizon) < r.completion_lengths[..., None] for r in rollouts]
    behavior = [r.behavior_logprobs[valid] for r, valid in zip(rollouts, in_completion, strict=True)]
    mismatch = np.abs(logprobs.numpy() - np.concatenate(behavior))
    assert len(mismatch) > 250
    assert mismatch.max() < TOLERANCE
    assert mismatch.mean() < TOLERANCE / 10


def test_rollouts_belong_to_their_tickets(worker: RolloutWorker) -> None:
    tickets = [ticket(3, anchors=[5, 9], horizon=4), ticket(4, anchors=[7], horizon=2, completions=5)]
    for one, rollout in zip(tickets, worker.sample(tickets), strict=True):
        assert (rollout.ticket_id, rollout.document) == (one.ticket_id, one.document)
        shape = (len(one.document.anchors), one.completions_per_context, one.document.horizon)
        assert rollout.completion_ids.shape == rollout.behavior_logprobs.shape == shape
        assert (rollout.completion_lengths == one.document.horizon).all()
        assert (rollout.completion_ids < 520).all()
        assert rollout.min_policy_version == rollout.max_policy_version == 0


def test_a_rollout_depends_on_its_ticket_only(worker: RolloutWorker) -> None:
    """Alone, in company, in another order, and with other prefixes in the cache."""
    tickets = [ticket(seed, anchors=[30, 40, 70], horizon=5) for seed in (10, 11, 12)]
    together = worker.sample(tickets)
    reversed_order = worker.sample(tickets[::-1])[::-1]
    worker._sampler._llm.reset_prefix_cache()
    alone = [worker.sample([one])[0] for one in tickets]
    for first, second, third in zip(together, reversed_order, alone, strict=True):
        assert_same_completions(second, first)
        assert_same_completions(third, first)


def test_seeds_make_the_difference(worker: RolloutWorker) -> None:
    one = ticket(13, anchors=[30, 40], horizon=6, completions=4)
    first, second = worker.sample([one, replace(one, seed=one.seed + 1)])
    assert (first.completion_ids != second.completion_ids).any(-1).all()
    siblings = {tuple(ids) for ids in first.completion_ids[0].tolist()}
    assert len(siblings) == 4
    seeds = {context_seed(seed, block) for seed in range(100) for block in range(100)}
    assert len(seeds) == 100 * 100


def test_completions_end_with_eos_where_the_document_says_so(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    horizon = 24
    ending = ticket(20, anchors=[10, 20, 30, 40, 50], horizon=horizon, completions=8, ends_with_eos=True)
    (rollout,) = worker.sample([ending])
    stopped = 0
    for ids, length in zip(
        rollout.completion_ids.reshape(-1, horizon), rollout.completion_lengths.flatten(), strict=True
    ):
        assert 1 <= length <= horizon
        assert EOS not in ids[: length - 1]
        assert length == horizon or ids[length - 1] == EOS
        assert (ids[length:] == 0).all()
        stopped += ids[length - 1] == EOS
    assert 0 < stopped < 40
    past_end = np.arange(horizon) >= rollout.completion_lengths[..., None]
    assert (rollout.behavior_logprobs[past_end] == 0).all()
    errors = logprob_errors([rollout], policy)
    assert len(errors) == rollout.completion_lengths.sum() and errors.max() < TOLERANCE


def test_strided_documents_run_through_eos(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    (rollout,) = worker.sample([ticket(20, anchors=[10, 20, 30, 40, 50], horizon=24, completions=8)])
    assert (rollout.completion_lengths == 24).all()
    assert (rollout.completion_ids[..., :-1] == EOS).any()
    assert logprob_errors([rollout], policy).max() < TOLERANCE


def test_scores_are_the_models_at_temperature_one(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    texts = [random_ids(length, seed=length) for length in (2, 32, 70, 150)]
    for _ in range(2):
        for ids, scores in zip(texts, worker._sampler.score_tokens(texts), strict=True):
            expected = own_logprobs(policy, ids, temperature=1.0)[1:].numpy()
            assert scores.dtype == np.float32
            np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_new_weights_sample_at_once_and_for_cached_documents_too(
    worker: RolloutWorker, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    tickets = [ticket(30, anchors=STRIDED), ticket(31, anchors=[90])]
    before = worker.sample(tickets)
    receipt = worker.receive_weights(*publication(other_policy, policy_version=7))
    assert receipt.policy_version == 7 and receipt.probe_error < TOLERANCE
    after = worker.sample(tickets)
    assert logprob_errors(before, policy).max() < TOLERANCE
    assert logprob_errors(after, other_policy).max() < TOLERANCE
    assert logprob_errors(after, policy).mean() > 0.1
    assert {(r.min_policy_version, r.max_policy_version) for r in after} == {(7, 7)}
    worker.receive_weights(*publication(policy, policy_version=8))
    assert logprob_errors(worker.sample(tickets), policy).max() < TOLERANCE


def test_tickets_that_need_newer_weights_are_refused(worker: RolloutWorker) -> None:
    with pytest.raises(RuntimeError, match=r"ticket 32 needs weights of version 3 or newer, this worker has 0"):
        worker.sample([replace(ticket(32, anchors=[5]), min_policy_version=3)])


def test_bytes_that_changed_on_the_way_name_their_tensor_and_quarantine_the_worker(
    worker: RolloutWorker, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    manifest, buffers = publication(other_policy, policy_version=4)
    damaged = [buffer.copy() for buffer in buffers]
    index = manifest.names.index("model.layers.1.mlp.up_proj.weight")
    damaged[index][5] ^= 1
    with pytest.raises(WeightMismatchError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' arrived"):
        worker.receive_weights(manifest, damaged)
    assert_quarantined(worker)
    with pytest.raises(WeightMismatchError, match="were published"):
        worker.receive_weights(manifest, buffers[:-1])
    worker.receive_weights(manifest, buffers)
    assert logprob_errors(worker.sample([ticket(33, anchors=[5])]), other_policy).max() < TOLERANCE


def test_weights_of_another_model_than_the_probes_are_refused(
    worker: RolloutWorker, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    manifest, buffers = publication(other_policy, policy_version=5)
    wrong = replace(manifest, probe=publication(policy, policy_version=5)[0].probe)
    with pytest.raises(WeightMismatchError, match=r"after loading version 5 .* differ from the learner's by"):
        worker.receive_weights(wrong, buffers)
    assert_quarantined(worker)


@on_cpu
def test_control_a_stale_tied_head_is_caught_and_heals(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU kernels keep a packed copy of a tied head; without repacking it the logits come from old weights."""
    with monkeypatch.context() as patch:
        patch.setattr(WeightReceiver, "_repack_tied_head", lambda self: None)
        with pytest.raises(WeightMismatchError, match=r"does not compute with the weights it was sent"):
            worker.receive_weights(*publication(other_policy, policy_version=6))
        assert_quarantined(worker)
    worker.receive_weights(*publication(other_policy, policy_version=6))
    assert logprob_errors(worker.sample([ticket(34, anchors=[5, 50])]), other_policy).max() < TOLERANCE


def test_control_a_kept_prefix_cache_would_sample_with_old_keys(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe cannot see it, for its log-probs are computed afresh: only short prefixes are sampled right."""
    tickets = [ticket(35, anchors=[20, 70, 100])]
    worker.sample(tickets)
    with monkeypatch.context() as patch:
        patch.setattr(worker._sampler._llm, "reset_prefix_cache", lambda: True)
        worker.receive_weights(*publication(other_policy, policy_version=6))
        errors = logprob_errors(worker.sample(tickets), other_policy).reshape(3, -1)
    assert errors[0].max() < TOLERANCE  # shorter than a block of the cache
    assert errors[1:].max(-1).min() > 0.05
    worker.receive_weights(*publication(other_policy, policy_version=6))
    assert logprob_errors(worker.sample(tickets), other_policy).max() < TOLERANCE


def test_an_engine_that_keeps_its_cache_is_refused(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker._sampler._llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(WeightMismatchError, match="refused to drop its prefix cache"):
            worker.receive_weights(*publication(other_policy, policy_version=6))
    assert_quarantined(worker)


def assert_quarantined(worker: RolloutWorker) -> None:
    with pytest.raises(RuntimeError, match="last weight update failed its checks"):
        worker.sample([ticket(36, anchors=[5])])
