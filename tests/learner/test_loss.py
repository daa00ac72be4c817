"""The loss and its micro-batches: denominators, alignment of tokens, and which coefficient moves what."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.rollout import Rollout
from feature_server.features.gram import GramStatistics, gram_statistics
from feature_server.packing import pack
from feature_server.scored_rollout import ScoredRollout
from learner.batch import MicroBatch, make_micro_batches
from learner.config import LearnerConfig
from learner.credit import assign_credit
from learner.loss import cross_entropy_loss, policy_gradient_loss
from learner.objective.reward import cfm_unbiased
from learner.policy import PackedPolicy
from learner.rewards import compute_rewards

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


def gradient_of_cut(model: PreTrainedModel, scored: list[ScoredRollout], *, documents: int) -> list[Tensor]:
    """Gradients summed over micro-batches of that many documents, denominators of the whole."""
    policy = PackedPolicy(model, attention="sdpa", logits_chunk_tokens=1024)
    batches = make_micro_batches(scored, documents=documents)
    assert len(batches) == -(-len(scored) // documents)
    num_sampled, num_document = token_counts(batches)
    model.zero_grad()
    for batch in batches:
        sampled, document = policy(batch.packed, TEMPERATURE)
        credit = assign_credit(batch, sampled, CONFIG, policy_version=3)
        loss = policy_gradient_loss(sampled, credit.factor, num_tokens=num_sampled)
        loss = loss + GAMMA * cross_entropy_loss(document, num_tokens=num_document)
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def slow_gradient(model: PreTrainedModel, scored: list[ScoredRollout]) -> list[Tensor]:
    """Of -sum w A log pi / sampled tokens - gamma * sum log pi / document tokens, one plain sequence at a time.

    w = min(p_learner / p_behavior, 2) of whole completions, here in front of A and inside it.
    """
    model.zero_grad()
    sampled = document = torch.zeros(())
    num_sampled = num_document = 0
    for one in scored:
        rollout, logprobs = one.rollout, {}
        ids = rollout.document.token_ids.tolist()
        weights = torch.zeros(rollout.completion_lengths.shape, dtype=torch.float64)
        for group, anchor in enumerate(rollout.document.anchors.tolist()):
            for j, length in enumerate(rollout.completion_lengths[group].tolist()):
                completion = rollout.completion_ids[group, j, :length].tolist()
                logits = model(input_ids=torch.tensor([ids[:anchor] + completion])).logits[0]
                logprobs[group, j] = sum(
                    (logits[anchor + step - 1] / TEMPERATURE).log_softmax(-1)[token]
                    for step, token in enumerate(completion)
                )
                behavior = float(rollout.behavior_logprobs[group, j, :length].sum(dtype=np.float64))
                weights[group, j] = min(2.0, math.exp(float(logprobs[group, j].detach()) - behavior))
                num_sampled += length
        advantage = compute_rewards(one, CONFIG, weights).advantage
        for (group, j), logprob in logprobs.items():
            sampled = sampled - float(weights[group, j] * advantage[group, j]) * logprob
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for position in range(max(1, rollout.document.num_prompt_tokens), len(ids)):
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
    expected = slow_gradient(model, scored)
    found = gradient_of_cut(model, scored, documents=documents)
    assert relative_error(found, expected) < 1e-6
    whole = gradient_of_cut(model, scored, documents=4)
    assert relative_error(found, whole) < 1e-6


def test_control_denominators_of_each_micro_batch_change_the_gradient(
    model: PreTrainedModel, scored: list[ScoredRollout]
) -> None:
    whole = gradient_of_cut(model, scored, documents=4)
    alone = [gradient_of_cut(model, [one], documents=1) for one in scored]
    averaged = [sum(parts) / 4 for parts in zip(*alone, strict=True)]
    assert relative_error(averaged, whole) > 1e-2


def test_without_the_policy_gradient_it_is_plain_fine_tuning(
    model: PreTrainedModel, scored: list[ScoredRollout]
) -> None:
    """Documents with and without their completions, and an ordinary causal loss over the documents alone."""
    with_completions = [one.rollout for one in scored]
    alone = [one.rollout.document for one in scored]
    gradients = []
    for documents in (with_completions, alone):
        batch = pack(documents)
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


def verified(one: ScoredRollout, rewards: Tensor) -> ScoredRollout:
    return replace(one, verified=rewards)


def test_a_reward_moves_its_own_group_only(scored: list[ScoredRollout]) -> None:
    """With one completion rewarded, the gradient of each log-prob is -A / N in its group and 0 elsewhere."""
    config = LearnerConfig(objective="rlvr", correction="none", reward_weights="none")
    for document, group, j in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (2, 1, 2)]:
        rewards = [torch.zeros(one.rollout.completion_lengths.shape, dtype=torch.float64) for one in scored]
        rewards[document][group, j] = 1.0
        rewards = [verified(one, reward) for one, reward in zip(scored, rewards, strict=True)]
        (batch,) = make_micro_batches(rewards, documents=4)
        windows = batch.packed.completions
        logprobs = torch.full(windows.window.shape, -1.0, requires_grad=True)
        num_tokens = len(logprobs)
        credit = assign_credit(batch, logprobs, config, policy_version=0)
        policy_gradient_loss(logprobs, credit.factor.float(), num_tokens=num_tokens).backward()
        expected = []
        for d, one in enumerate(scored):
            for g, lengths in enumerate(one.rollout.completion_lengths.tolist()):
                for k, length in enumerate(lengths):
                    advantage = (1.0 if k == j else -0.5) if (d, g) == (document, group) else 0.0
                    expected += [-advantage / num_tokens] * length
        assert logprobs.grad.tolist() == pytest.approx(expected)


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
def test_micro_batches_align_tokens_versions_and_behavior_logprobs(documents: int, scored: list[ScoredRollout]) -> None:
    """Each sampled token gets the behavior log-prob and the policy version of its own completion and step."""
    draw = np.random.default_rng(0)
    aged = [
        replace(
            one, rollout=replace(one.rollout, token_versions=draw.integers(9, size=one.rollout.completion_ids.shape))
        )
        for one in scored
    ]
    expected = []
    for one in aged:
        rollout = one.rollout
        for group, n_lengths in enumerate(rollout.completion_lengths.tolist()):
            for j, length in enumerate(n_lengths):
                for step in range(length):
                    token = int(rollout.completion_ids[group, j, step])
                    behavior = float(rollout.behavior_logprobs[group, j, step])
                    expected.append((token, behavior, int(rollout.token_versions[group, j, step])))
    found = []
    for batch in make_micro_batches(aged, documents=documents):
        columns = (
            batch.packed.completion_tokens.target,
            batch.behavior_logprobs,
            batch.sampled_at,
        )
        found += list(zip(*[column.tolist() for column in columns], strict=True))
    assert found == expected


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
        (batch,) = make_micro_batches(rollouts, documents=4)
        with torch.no_grad():
            learner_logprobs, _ = policy(batch.packed, TEMPERATURE)
        credit = assign_credit(batch, learner_logprobs, CONFIG, policy_version=0)
        ones = torch.ones(18, dtype=torch.float64)
        assert torch.allclose(credit.weights, ones, rtol=0, atol=1e-5) == agree
        with_gradient, _ = policy(batch.packed, TEMPERATURE)
        assert not assign_credit(batch, with_gradient, CONFIG, policy_version=0).factor.requires_grad
        assert torch.allclose(credit.correction, ones[:1].expand(len(learner_logprobs)), rtol=0, atol=1e-5) == agree
        temperature_one, _ = policy(batch.packed, 1.0)
        assert (temperature_one - learner_logprobs).abs().max() > 0.1


def test_lag_counts_learner_steps_since_the_oldest_sampling_weights(scored: list[ScoredRollout]) -> None:
    """Of each completion, and of its real tokens only."""
    rollout = scored[0].rollout
    versions = np.where(rollout.is_token, 6, 1)
    versions[0, 1, 0] = 4
    versions[1, 2, rollout.completion_lengths[1, 2] - 1] = 2
    old = replace(rollout, token_versions=versions)
    (batch,) = make_micro_batches([replace(scored[0], rollout=old), scored[1]], documents=2)
    credit = assign_credit(batch, batch.behavior_logprobs, CONFIG, policy_version=7)
    assert credit.lag.tolist() == [1.0, 3.0, 1.0, 1.0, 1.0, 5.0] + [7.0] * 3


def test_a_correction_gets_each_tokens_own_lag(scored: list[ScoredRollout]) -> None:
    """Completions whose first token is a step older than the others."""
    (plain,) = make_micro_batches(scored[:1], documents=1)
    versions = np.full(scored[0].rollout.completion_ids.shape, 6)
    versions[..., 0] = 5
    aged = replace(scored[0], rollout=replace(scored[0].rollout, token_versions=versions))
    (batch,) = make_micro_batches([aged], documents=1)
    config = CONFIG.model_copy(update={"correction": "decoupled_ppo_log_linear"})
    learner = batch.behavior_logprobs - 0.1
    mixed = assign_credit(batch, learner, config, policy_version=7).correction
    young, old = (assign_credit(plain, learner, config, policy_version=lag).correction for lag in (1, 2))
    is_first = torch.tensor(np.broadcast_to(np.arange(versions.shape[-1]) == 0, versions.shape)[aged.rollout.is_token])
    assert torch.equal(mixed, torch.where(is_first, old, young))
    assert (old != young).any()


def test_a_weight_is_truncated_where_the_ratio_is_larger(scored: list[ScoredRollout]) -> None:
    """Of a completion of l tokens the ratio is exp(0.3 l), and the bound 2: from three tokens on."""
    (batch,) = make_micro_batches(scored, documents=4)
    on_policy = assign_credit(batch, batch.behavior_logprobs, CONFIG, policy_version=0)
    bound_of_one = CONFIG.model_copy(update={"max_importance_weight": 1.0})
    for credit in (on_policy, assign_credit(batch, batch.behavior_logprobs, bound_of_one, policy_version=0)):
        assert not credit.is_truncated.any()
    longer = batch.behavior_logprobs.double() + 0.3
    credit = assign_credit(batch, longer, CONFIG, policy_version=0)
    lengths = np.concatenate([one.rollout.completion_lengths.flatten() for one in scored])
    assert credit.is_truncated.tolist() == (lengths >= 3).tolist()


def test_the_cfm_is_that_of_rollouts_with_pairs_of_completions(
    scored: list[ScoredRollout], make_rollout: Callable[..., Rollout]
) -> None:
    shape = {"num_tokens": 8, "anchors": [3], "horizon": 2}
    single, pair = (scored_at_random(make_rollout(lengths=[[1] * n], **shape), seed=n) for n in (1, 2))
    plain = LearnerConfig(whitening="none", diversity_coef=0.0)
    (batch,) = make_micro_batches([scored[0], single, pair, scored[1]], documents=4)
    credit = assign_credit(batch, batch.behavior_logprobs, plain, policy_version=0)
    expected = [cfm_unbiased(one.raw) for one in (scored[0], pair, scored[1])]
    assert [found.tolist() for found in credit.cfm_losses] == [losses.tolist() for losses in expected]


def test_documents_without_completions_are_cut_like_others(scored: list[ScoredRollout]) -> None:
    batches = make_micro_batches([one.rollout.document for one in scored], documents=3)
    assert token_counts(batches) == (0, 11 + 3 + 6 + 9)
    assert all(len(batch.behavior_logprobs) == 0 for batch in batches)
    assert not any(batch.scored for batch in batches)
    assert [batch.packed.ground_truth.num_windows for batch in batches] == [0, 0]


def test_a_document_without_completions_may_share_a_batch(scored: list[ScoredRollout]) -> None:
    mixed = [scored[0], scored[1].rollout.document, scored[2]]
    (together,) = make_micro_batches(mixed, documents=3)
    (apart,) = make_micro_batches([scored[0], scored[2]], documents=3)
    found, expected = (
        assign_credit(batch, batch.behavior_logprobs, CONFIG, policy_version=0).factor for batch in (together, apart)
    )
    assert torch.equal(found, expected)


def ones_like(one: ScoredRollout) -> Tensor:
    return torch.ones(one.rollout.completion_lengths.shape, dtype=torch.float64)


def test_each_whitening_reads_its_own_statistics(scored: list[ScoredRollout]) -> None:
    one = scored[0]
    other = GramStatistics(
        gram=2 * one.raw.gram,
        ground_truth_products=3 * one.raw.ground_truth_products,
        ground_truth_norm_sq=one.raw.ground_truth_norm_sq,
    )
    both, weights = replace(one, whitened=other), ones_like(one)
    plain = LearnerConfig(whitening="none", diversity_coef=0.0)
    pooled = LearnerConfig(whitening="pooled", diversity_coef=0.0)
    torch.testing.assert_close(
        compute_rewards(both, pooled, weights).reward, 3 * compute_rewards(both, plain, weights).reward
    )
    torch.testing.assert_close(
        compute_rewards(both, pooled, weights).similarity, 2 * compute_rewards(both, plain, weights).similarity
    )
    rewards = []
    for whitening in ("feature_space", "shrunk", "sample_mixing", "none"):
        own = LearnerConfig(whitening=whitening)
        rewards.append(compute_rewards(both, own, weights).reward)
        assert torch.equal(rewards[-1], compute_rewards(one, own, weights).reward)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(rewards, 2))
    with pytest.raises(ValueError, match=r"'document 1' was scored before a pooled whitening map was fitted"):
        compute_rewards(one, pooled, weights)


@pytest.mark.parametrize("reward_weights", ["none", "pairwise", "self_normalised"])
def test_importance_weights_enter_the_reward_as_configured(reward_weights: str, scored: list[ScoredRollout]) -> None:
    """Against a loop over siblings: sums of w_k <phi_j, phi_k> over n - 1, or over the sum of the w_k."""
    one = scored[0]
    weights = torch.linspace(0.3, 1.9, ones_like(one).numel(), dtype=torch.float64).reshape(ones_like(one).shape)
    config = LearnerConfig(whitening="none", reward_weights=reward_weights)
    found = compute_rewards(one, config, weights).reward
    used = ones_like(one) if reward_weights == "none" else weights
    for group, n in itertools.product(range(found.shape[0]), [found.shape[1]]):
        for j in range(n):
            others = [k for k in range(n) if k != j]
            count = sum(float(used[group, k]) for k in others) if reward_weights == "self_normalised" else n - 1
            similarity = sum(float(used[group, k] * one.raw.gram[group, j, k]) for k in others) / count
            expected = 2 * float(one.raw.ground_truth_products[group, j]) - 2 * similarity
            assert float(found[group, j]) == pytest.approx(expected, rel=1e-12)


def test_self_likelihood_rewards_the_log_prob_of_the_own_tokens(scored: list[ScoredRollout]) -> None:
    one = scored[0]
    found = compute_rewards(one, LearnerConfig(objective="self_likelihood", reward_weights="none"), ones_like(one))
    for group, lengths in enumerate(one.rollout.completion_lengths.tolist()):
        likelihood = [
            sum(one.rollout.behavior_logprobs[group, j, :length].astype(float)) for j, length in enumerate(lengths)
        ]
        assert found.reward[group].tolist() == pytest.approx(likelihood, rel=1e-12)
        for j in range(3):
            others = [likelihood[k] for k in range(3) if k != j]
            assert float(found.advantage[group, j]) == pytest.approx(likelihood[j] - sum(others) / 2, rel=1e-12)


def test_rlvr_takes_the_verifiers_reward_and_asks_for_it(scored: list[ScoredRollout]) -> None:
    one, config = scored[1], LearnerConfig(objective="rlvr")
    rewards = torch.tensor([[1.0, 0.0, 0.25]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.5, 2.0]], dtype=torch.float64)
    found = compute_rewards(verified(one, rewards), config, weights)
    assert torch.equal(found.reward, rewards)
    expected = [1 - (0 * 1.5 + 0.25 * 2) / 2, 0 - (1 * 0.5 + 0.25 * 2) / 2, 0.25 - (1 * 0.5 + 0 * 1.5) / 2]
    assert found.advantage[0].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"'document 2' comes without a verifier's reward"):
        compute_rewards(one, config, weights)
