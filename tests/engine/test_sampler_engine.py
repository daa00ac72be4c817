"""One real vLLM engine in this process: what it samples, what it reports, and how weights enter it."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_engine import (
    EOS,
    NUM_TOKEN_IDS,
    TEMPERATURE,
    TOLERANCE,
    largely_updated,
    logprob_errors,
    own_logprobs,
    publication,
    random_ids,
    started_worker,
    ticket,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from actors.engine import worker_extension
from actors.engine.sampler import context_seed
from actors.rollout import Rollout, Ticket
from actors.weights.manifest import WeightMismatchError
from actors.weights.object_store import ArrayPart
from actors.worker import RolloutWorker
from feature_server.packing import pack
from learner.policy import PackedPolicy

pytestmark = pytest.mark.engine

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a trap of vLLM's CPU kernels")


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[RolloutWorker]:
    with started_worker(tmp_path_factory.mktemp("policy"), policy, tokenizer) as worker:
        yield worker


@pytest.fixture
def worker(engine: RolloutWorker, policy: LlamaForCausalLM) -> Iterator[RolloutWorker]:
    """The engine with the initial weights, whatever the test before did to it."""
    yield engine
    if engine._sampler.policy_version != 0:
        engine.receive_weights(*publication(policy, policy_version=0))


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
        learner = PackedPolicy(policy, attention="sdpa", logits_chunk_tokens=1024, num_token_ids=NUM_TOKEN_IDS)
        logprobs, _ = learner(pack(rollouts), TEMPERATURE)
    in_completion = [np.arange(r.document.horizon) < r.completion_lengths[..., None] for r in rollouts]
    behavior = [r.behavior_logprobs[valid] for r, valid in zip(rollouts, in_completion, strict=True)]
    mismatch = np.abs(logprobs.numpy() - np.concatenate(behavior))
    assert len(mismatch) > 250
    assert mismatch.max() < TOLERANCE
    assert mismatch.mean() < TOLERANCE / 10


def test_ids_beyond_the_tokenizer_have_no_probability(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    """The padded rows are the likeliest of all: by the network alone, many tokens would be theirs."""
    ids = random_ids(40, seed=77)
    padding = policy(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)[:, NUM_TOKEN_IDS:].sum(-1)
    assert padding.mean() > 0.1
    (rollout,) = worker.sample([ticket(77, anchors=[20, 30, 40], horizon=20, completions=32)])
    assert (rollout.completion_ids < NUM_TOKEN_IDS).all()
    (greedy,) = worker._sampler.complete([ids], max_tokens=20)
    assert max(greedy[0]) < NUM_TOKEN_IDS
    (scored,) = worker._sampler.score_tokens([ids])
    assert np.abs(scored - own_logprobs(policy, ids, temperature=1.0)[1:].numpy()).max() < TOLERANCE


def test_rollouts_belong_to_their_tickets(worker: RolloutWorker) -> None:
    tickets = [ticket(3, anchors=[5, 9], horizon=4), ticket(4, anchors=[7], horizon=2, completions=5)]
    for one, rollout in zip(tickets, worker.sample(tickets), strict=True):
        assert (rollout.ticket_id, rollout.document) == (one.ticket_id, one.document)
        shape = (len(one.document.anchors), one.completions_per_context, one.document.horizon)
        assert rollout.completion_ids.shape == rollout.behavior_logprobs.shape == shape
        assert (rollout.completion_lengths == one.document.horizon).all()
        assert (rollout.completion_ids < NUM_TOKEN_IDS).all()
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


def assert_bit_equal(found: list[Rollout], expected: list[Rollout]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.completion_ids, other.completion_ids)
        assert np.array_equal(one.behavior_logprobs, other.behavior_logprobs)


def test_a_request_is_bitwise_reproducible_whatever_was_sampled_before(worker: RolloutWorker) -> None:
    """The same documents, a part of one, and others: prefixes that a request without a salt would find cached."""
    tickets = [ticket(seed, anchors=[30, 40, 70, 100], horizon=5) for seed in (10, 11)]
    worker._sampler._llm.reset_prefix_cache()
    first, tokens = worker.sample(tickets), scheduled_tokens(worker, tickets)
    part = replace(tickets[0].document, anchors=np.array([70]))
    worker.sample([replace(tickets[0], document=part), ticket(12, anchors=[20])])
    assert_bit_equal(worker.sample(tickets), first)
    worker._sampler._llm.reset_prefix_cache()
    assert tokens == scheduled_tokens(worker, tickets)


def test_control_without_salts_a_request_finds_what_another_has_cached(
    worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels whose sums depend on the number of tokens at once would then give other last bits."""
    monkeypatch.setattr(worker._sampler, "_salts", itertools.repeat("same"))
    tickets = [ticket(seed, anchors=[30, 40, 70, 100], horizon=5) for seed in (10, 11)]
    worker._sampler._llm.reset_prefix_cache()
    cold, warm = scheduled_tokens(worker, tickets), scheduled_tokens(worker, tickets)
    assert warm[0] < cold[0]


def test_contexts_of_a_ticket_share_their_prefixes(worker: RolloutWorker) -> None:
    """Each block of the cache is computed once for a ticket, and once more for another ticket of the document."""
    one = ticket(14, anchors=[40, 70, 100], horizon=2, completions=1)
    tokens, twice = (scheduled_tokens(worker, tickets) for tickets in ([one], [one, one]))
    # Blocks of 32: the second context finds one of them, the third two; a completion of 2 tokens takes one more step.
    assert tokens == [40 + (70 - 32) + (100 - 64), 3]
    assert twice == [2 * count for count in tokens]


def scheduled_tokens(worker: RolloutWorker, tickets: list[Ticket]) -> list[int]:
    """Tokens that the engine computes in each step of a request."""
    scheduler = worker._sampler._llm.llm_engine.engine_core.engine_core.scheduler
    counts, schedule = [], scheduler.schedule
    with pytest.MonkeyPatch.context() as patch:

        def counting(*arguments: object) -> object:
            counts.append((planned := schedule(*arguments)).total_num_scheduled_tokens)
            return planned

        patch.setattr(scheduler, "schedule", counting)
        worker.sample(tickets)
    return counts


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
    manifest, part = publication(other_policy, policy_version=4)
    damaged = [buffer.copy() for buffer in part.buffers]
    index = manifest.names.index("model.layers.1.mlp.up_proj.weight")
    damaged[index][5] ^= 1
    with pytest.raises(WeightMismatchError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' arrived"):
        worker.receive_weights(manifest, ArrayPart(damaged))
    assert_quarantined(worker)
    with pytest.raises(WeightMismatchError, match="were published"):
        worker.receive_weights(manifest, ArrayPart(part.buffers[:-1]))
    worker.receive_weights(manifest, part)
    assert logprob_errors(worker.sample([ticket(33, anchors=[5])]), other_policy).max() < TOLERANCE


def test_weights_of_another_model_than_the_probes_are_refused(
    worker: RolloutWorker, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    manifest, part = publication(other_policy, policy_version=5)
    wrong = replace(manifest, probe=publication(policy, policy_version=5)[0].probe)
    with pytest.raises(WeightMismatchError, match=r"after loading version 5 .* differ from the learner's by"):
        worker.receive_weights(wrong, part)
    assert_quarantined(worker)


@on_cpu
def test_control_a_stale_tied_head_is_caught_and_heals(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU kernels keep a packed copy of a tied head; without repacking it the logits come from old weights.

    The weights are new to the engine: it keeps the head of two versions, one of which could be the right one by chance.
    """
    unseen = largely_updated(other_policy)
    with monkeypatch.context() as patch:
        patch.setattr(worker_extension, "_repack_tied_head", lambda model: None)
        with pytest.raises(WeightMismatchError, match=r"does not compute with the weights it was sent"):
            worker.receive_weights(*publication(unseen, policy_version=6))
        assert_quarantined(worker)
    worker.receive_weights(*publication(unseen, policy_version=6))
    assert logprob_errors(worker.sample([ticket(34, anchors=[5, 50])]), unseen).max() < TOLERANCE


def test_control_a_kept_prefix_cache_would_sample_with_old_keys(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe misses it, because its log-probs are computed without a cache: only short prefixes are sampled right.

    Between requests a salt of each request's own hides the old keys as well, so here all have the same one.
    """
    tickets = [ticket(35, anchors=[20, 70, 100])]
    with monkeypatch.context() as patch:
        patch.setattr(worker._sampler, "_salts", itertools.repeat("same"))
        worker.sample(tickets)
        patch.setattr(worker._sampler._llm.llm_engine, "reset_prefix_cache", lambda **settings: True)
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
        patch.setattr(worker._sampler._llm.llm_engine, "reset_prefix_cache", lambda **settings: False)
        with pytest.raises(WeightMismatchError, match="refused to drop its prefix cache"):
            worker.receive_weights(*publication(other_policy, policy_version=6))
    assert_quarantined(worker)


def assert_quarantined(worker: RolloutWorker) -> None:
    with pytest.raises(RuntimeError, match="last weight update failed its checks"):
        worker.sample([ticket(36, anchors=[5])])
