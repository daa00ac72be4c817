"""The loss and its micro-batches: denominators, alignment of tokens, and which coefficient moves what."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.rollout import Rollout
from feature_server.gram import GramStatistics, gram_statistics
from feature_server.packing import pack
from feature_server.scored_rollout import ScoredRollout, unscored
from learner.batch import Judged, MicroBatch, judge, make_micro_batches
from learner.config import LearnerConfig
from learner.loss import cross_entropy_loss, policy_gradient_loss
from learner.off_policy import CORRECTIONS, sequence_log_ratio
from learner.policy import PackedPolicy

TEMPERATURE = 0.7
GAMMA = 0.3
CONFIG = LearnerConfig(whitening="none", cross_entropy_coef=GAMMA)


@pytest.fixture
def scored(make_rollout: Callable[..., Rollout]) -> list[ScoredRollout]:
    """Four documents of unequal length, anchors and completion lengths."""
    rollouts = [
        make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1, 2], [3, 4, 1]], horizon=4, seed=1),
        make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 5, 3]], horizon=5, seed=2, num_prompt_tokens=6),
        make_rollout(num_tokens=7, anchors=[3, 4], lengths=[[1, 1, 2], [2, 2, 2]], horizon=2, seed=3),
        make_rollout(num_tokens=10, anchors=[5], lengths=[[3, 2, 1]], horizon=3, seed=4),
    ]
    return [scored_at_random(rollout, seed) for seed, rollout in enumerate(rollouts)]


@pytest.fixture
def model(make_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_causal_lm("qwen2", tied=True).double()


def scored_at_random(rollout: Rollout, seed: int) -> ScoredRollout:
    generator = torch.Generator().manual_seed(seed)
    groups, n = rollout.completion_lengths.shape
    completions = torch.randn(groups, n, 6, generator=generator, dtype=torch.float64)
    ground_truth = torch.randn(groups, 6, generator=generator, dtype=torch.float64)
    return ScoredRollout(rollout=rollout, raw=gram_statistics(completions, ground_truth), whitened=None, score_s=0.0)


def token_counts(batches: list[MicroBatch]) -> tuple[int, int]:
    sampled = sum(len(batch.packed.completion_tokens.target) for batch in batches)
    return sampled, sum(len(batch.packed.document_tokens.target) for batch in batches)


def gradient_of_cut(
    model: PreTrainedModel, scored: list[ScoredRollout], judged: list[Judged], *, documents: int
) -> list[Tensor]:
    """Gradients summed over micro-batches of that many documents, denominators of the whole."""
    policy = PackedPolicy(model, attention="sdpa", logits_chunk_tokens=1024)
    batches = make_micro_batches(scored, judged, documents=documents)
    assert len(batches) == -(-len(scored) // documents)
    num_sampled, num_document = token_counts(batches)
    model.zero_grad()
    for batch in batches:
        sampled, document = policy(batch.packed, TEMPERATURE)
        advantage = batch.advantage[batch.packed.completions.window]
        loss = policy_gradient_loss(sampled, advantage, num_tokens=num_sampled)
        loss = loss + GAMMA * cross_entropy_loss(document, num_tokens=num_document)
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def slow_gradient(model: PreTrainedModel, scored: list[ScoredRollout], judged: list[Judged]) -> list[Tensor]:
    """Of -sum A log pi / sampled tokens - gamma * sum log pi / document tokens, one plain sequence at a time."""
    model.zero_grad()
    sampled = document = torch.zeros(())
    num_sampled = num_document = 0
    for one, verdict in zip(scored, judged, strict=True):
        ids = one.rollout.document.token_ids.tolist()
        for group, anchor in enumerate(one.rollout.document.anchors.tolist()):
            for j, length in enumerate(one.rollout.completion_lengths[group].tolist()):
                completion = one.rollout.completion_ids[group, j, :length].tolist()
                logits = model(input_ids=torch.tensor([ids[:anchor] + completion])).logits[0]
                for step, token in enumerate(completion):
                    logprob = (logits[anchor + step - 1] / TEMPERATURE).log_softmax(-1)[token]
                    sampled = sampled - float(verdict.advantage[group, j]) * logprob
                    num_sampled += 1
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for position in range(max(1, one.rollout.document.num_prompt_tokens), len(ids)):
            document = document - logits[position - 1].log_softmax(-1)[ids[position]]
            num_document += 1
    (sampled / num_sampled + GAMMA * document / num_document).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return float(max((f - e).abs().max() for f, e in pairs) / max(e.abs().max() for _, e in pairs))


@pytest.mark.parametrize("documents", [1, 2, 3, 4])
def test_cutting_the_step_does_not_change_its_gradient(
    documents: int, model: PreTrainedModel, scored: list[ScoredRollout]
) -> None:
    """Log-probs are float32 by contract, and so is their error."""
    judged = [judge(one, CONFIG) for one in scored]
    expected = slow_gradient(model, scored, judged)
    found = gradient_of_cut(model, scored, judged, documents=documents)
    assert relative_error(found, expected) < 1e-6
    whole = gradient_of_cut(model, scored, judged, documents=4)
    assert relative_error(found, whole) < 1e-6


def test_control_denominators_of_each_micro_batch_change_the_gradient(
    model: PreTrainedModel, scored: list[ScoredRollout]
) -> None:
    judged = [judge(one, CONFIG) for one in scored]
    whole = gradient_of_cut(model, scored, judged, documents=4)
    alone = [gradient_of_cut(model, [s], [j], documents=1) for s, j in zip(scored, judged, strict=True)]
    averaged = [sum(parts) / 4 for parts in zip(*alone, strict=True)]
    assert relative_error(averaged, whole) > 1e-2


def test_without_the_policy_gradient_it_is_plain_fine_tuning(
    model: PreTrainedModel, scored: list[ScoredRollout]
) -> None:
    """Documents with and without their completions, and an ordinary causal loss over the documents alone."""
    with_completions = [one.rollout for one in scored]
    alone = [unscored(one.rollout.document).rollout for one in scored]
    gradients = []
    for rollouts in (with_completions, alone):
        batch = pack(rollouts)
        policy = PackedPolicy(model, attention="sdpa", logits_chunk_tokens=7)
        _, document = policy(batch, TEMPERATURE)
        loss = cross_entropy_loss(document, num_tokens=len(document))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    total, count = torch.zeros(()), 0
    for one in scored:
        ids = torch.from_numpy(one.rollout.document.token_ids)
        labels = ids.clone()
        labels[: one.rollout.document.num_prompt_tokens] = -100
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    for found in gradients:
        assert relative_error(list(found), list(expected)) < 1e-6


def test_an_advantage_moves_its_own_completion_only(scored: list[ScoredRollout]) -> None:
    """Gradient with respect to each token's log-prob is -A / N on that completion's tokens and 0 elsewhere."""
    judged = [judge(one, CONFIG) for one in scored]
    for document, group, j in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (2, 1, 2)]:
        only = [replace(verdict, advantage=torch.zeros_like(verdict.advantage)) for verdict in judged]
        only[document].advantage[group, j] = 1.0
        (batch,) = make_micro_batches(scored, only, documents=4)
        windows = batch.packed.completions
        logprobs = torch.full(windows.window.shape, -1.0, requires_grad=True)
        num_tokens = len(logprobs)
        policy_gradient_loss(logprobs, batch.advantage[windows.window], num_tokens=num_tokens).backward()
        moved = logprobs.grad.nonzero().flatten()
        rollout = scored[document].rollout
        length = int(rollout.completion_lengths[group, j])
        assert moved.tolist() == list(range(int(moved[0]), int(moved[0]) + length))
        expected_ids = rollout.completion_ids[group, j, :length].tolist()
        assert batch.packed.completion_tokens.target[moved].tolist() == expected_ids
        assert (windows.row[moved] == document).all()
        assert torch.equal(logprobs.grad[moved], torch.full((length,), -1 / num_tokens))


def test_an_advantage_carries_no_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([0.5, -3.0], requires_grad=True)
    loss = policy_gradient_loss(logprobs, advantage, num_tokens=8)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 * -1 + -3 * -2) / 8)
    assert advantage.grad is None
    assert logprobs.grad.tolist() == [-0.5 / 8, 3 / 8]


def test_cross_entropy_is_nats_per_token_of_the_whole_step() -> None:
    logprobs = torch.tensor([-1.0, -2.5], requires_grad=True)
    loss = cross_entropy_loss(logprobs, num_tokens=7)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert logprobs.grad.tolist() == pytest.approx([-1 / 7, -1 / 7])


@pytest.mark.parametrize("documents", [1, 2, 4])
def test_micro_batches_align_tokens_advantages_and_behavior_logprobs(
    documents: int, scored: list[ScoredRollout]
) -> None:
    """Each sampled token meets the advantage and the behavior log-prob that its own completion and step have."""
    judged = [judge(one, CONFIG) for one in scored]
    expected = []
    for one, verdict in zip(scored, judged, strict=True):
        rollout = one.rollout
        for group, n_lengths in enumerate(rollout.completion_lengths.tolist()):
            for j, length in enumerate(n_lengths):
                for step in range(length):
                    token = int(rollout.completion_ids[group, j, step])
                    behavior = float(rollout.behavior_logprobs[group, j, step])
                    expected.append((token, behavior, float(verdict.advantage[group, j].float())))
    found = []
    for batch in make_micro_batches(scored, judged, documents=documents):
        assert len(batch.advantage) == batch.packed.completions.num_windows
        columns = (
            batch.packed.completion_tokens.target,
            batch.behavior_logprobs,
            batch.advantage[batch.packed.completions.window],
        )
        found += list(zip(*[column.tolist() for column in columns], strict=True))
    assert found == expected
    assert len({advantage for *_, advantage in found}) == sum(v.advantage.numel() for v in judged)


def test_weights_are_one_where_the_policies_are_equal(model: PreTrainedModel, scored: list[ScoredRollout]) -> None:
    policy = PackedPolicy(model, attention="sdpa", logits_chunk_tokens=1024)
    own = []
    for one in scored:
        with torch.no_grad():
            logprobs, _ = policy(pack([one.rollout]), TEMPERATURE)
        lengths = one.rollout.completion_lengths
        behavior = np.full(one.rollout.behavior_logprobs.shape, -50, dtype=np.float32)
        behavior[np.arange(behavior.shape[-1]) < lengths[..., None]] = logprobs.numpy()
        own.append(replace(one, rollout=replace(one.rollout, behavior_logprobs=behavior)))
    for rollouts, agree in ((own, True), (scored, False)):
        (batch,) = make_micro_batches(rollouts, [judge(one, CONFIG) for one in rollouts], documents=4)
        with torch.no_grad():
            learner_logprobs, _ = policy(batch.packed, TEMPERATURE)
        windows = batch.packed.completions
        log_ratio = sequence_log_ratio(learner_logprobs, batch.behavior_logprobs, windows.window, windows.num_windows)
        weights = CORRECTIONS["truncated_sequence_is"](log_ratio, max_importance_weight=2.0)
        assert torch.allclose(weights, torch.ones(18), rtol=0, atol=1e-5) == agree
        temperature_one, _ = policy(batch.packed, 1.0)
        assert (temperature_one - learner_logprobs).abs().max() > 0.1


def test_documents_without_completions_are_judged_and_cut_like_others(scored: list[ScoredRollout]) -> None:
    bare = [unscored(one.rollout.document) for one in scored]
    judged = [judge(one, CONFIG) for one in bare]
    batches = make_micro_batches(bare, judged, documents=3)
    assert token_counts(batches) == (0, 11 + 3 + 6 + 9)
    for batch in batches:
        assert len(batch.advantage) == len(batch.behavior_logprobs) == 0
    assert all(len(one.rollout.document.anchors) == 0 for one in bare)


def test_each_whitening_reads_its_own_statistics(scored: list[ScoredRollout]) -> None:
    one = scored[0]
    other = GramStatistics(
        gram=2 * one.raw.gram, products=3 * one.raw.products, ground_truth_norm_sq=one.raw.ground_truth_norm_sq
    )
    both = replace(one, whitened=other)
    plain = LearnerConfig(whitening="none", diversity_coef=0.0)
    pooled = LearnerConfig(whitening="pooled", diversity_coef=0.0)
    torch.testing.assert_close(judge(both, pooled).reward, 3 * judge(both, plain).reward)
    torch.testing.assert_close(judge(both, pooled).sibling_similarity, 2 * judge(both, plain).sibling_similarity)
    for whitening in ("feature_space", "sample_mixing"):
        own = LearnerConfig(whitening=whitening)
        assert torch.equal(judge(both, own).reward, judge(one, own).reward)
    with pytest.raises(ValueError, match=r"'document 1' was scored before a pooled whitening map was fitted"):
        judge(one, pooled)
