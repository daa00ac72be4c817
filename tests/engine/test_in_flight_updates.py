"""New weights that reach a real engine during a request: which weights sampled each token, checked by its log-prob.

A hook on the engine's step makes the moment exact: after a given number of steps another thread loads weights, and the
step returns once they wait in the slot (or were refused).
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from small_engine import (
    EOS,
    TOLERANCE,
    errors_by_token,
    logprob_errors,
    publication,
    random_ids,
    started_worker,
    ticket,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from actors import worker as worker_module
from actors.config import InFlightUpdates
from actors.rollout import Rollout, Ticket
from actors.weights.manifest import WeightMismatchError
from actors.worker import RolloutWorker, WeightReceipt

pytestmark = pytest.mark.engine

DEADLINE_S = 60.0
STEPS = 4
"""Engine steps before the weights arrive: every completion that has not ended then has as many tokens."""
HORIZON = 12


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[RolloutWorker]:
    folder = tmp_path_factory.mktemp("policy")
    with started_worker(folder, policy, tokenizer, in_flight_updates="keep") as worker:
        yield worker


@pytest.fixture
def worker(engine: RolloutWorker, policy: LlamaForCausalLM) -> Iterator[RolloutWorker]:
    """The engine with the initial weights; afterwards no request and no thread is left in it."""
    yield engine
    assert not engine._sampler._llm.llm_engine.has_unfinished_requests()
    lock = engine._sampler._loop._lock
    assert not lock._is_held and lock.load is None
    if engine._sampler.policy_version != 0:
        engine.receive_weights(*publication(policy, policy_version=0))


class MidFlight:
    """Samples in this thread; another one loads weights after STEPS steps of the engine."""

    def __init__(self, worker: RolloutWorker, patch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
        self.worker = worker
        self.num_steps = 0
        self._pool, self._patch = pool, patch
        self._step = worker._sampler._llm.llm_engine.step
        self._receiving: Future | None = None

    def sample(self, tickets: list[Ticket], published: tuple, *, mode: InFlightUpdates) -> list[Rollout]:
        loop, decided = self.worker._sampler._loop, threading.Event()

        def step() -> list:
            outputs = self._step()
            self.num_steps += 1
            if self.num_steps == STEPS:
                self._receiving = self._pool.submit(self.worker.receive_weights, *published)
                assert decided.wait(DEADLINE_S)
            return outputs

        for verb in ("_offer", "quarantine"):
            self._patch.setattr(loop._lock, verb, self._then(getattr(loop._lock, verb), decided.set))
        self._patch.setattr(loop, "_in_flight_updates", mode)
        self._patch.setattr(self.worker._sampler._llm.llm_engine, "step", step)
        return self.worker.sample(tickets)

    @staticmethod
    def _then(action: Callable[..., None], afterwards: Callable[[], None]) -> Callable[..., None]:
        return lambda *arguments: (action(*arguments), afterwards())[0]

    def receipt(self) -> WeightReceipt:
        return self._receiving.result(DEADLINE_S)

    def failure(self) -> BaseException | None:
        return self._receiving.exception(DEADLINE_S)


@pytest.fixture
def mid_flight(worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[MidFlight]:
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        yield MidFlight(worker, patch, pool)


def some_tickets() -> list[Ticket]:
    """Nested prefixes around the borders of cache blocks, and completions that end by themselves."""
    return [
        ticket(1, anchors=[1, 31, 32, 33, 70, 100], horizon=HORIZON),
        ticket(2, anchors=[10, 20, 64], horizon=HORIZON, completions=8, ends_with_eos=True),
    ]


def assert_sampled_by(rollout: Rollout, policies: dict[int, LlamaForCausalLM]) -> None:
    """Each token has the log-prob that its own version gives it, and not the other's."""
    errors = {version: errors_by_token(rollout, policy) for version, policy in policies.items()}
    for version in policies:
        own = rollout.is_token & (rollout.token_versions == version)
        assert own.sum() > 10
        for other, of_all in errors.items():
            if other == version:
                assert of_all[own].max() < TOLERANCE
            else:
                assert of_all[own].mean() > 0.1
    assert set(rollout.token_versions[rollout.is_token]) == set(policies)


def assert_bit_equal(found: list[Rollout], expected: list[Rollout]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("completion_ids", "completion_lengths", "behavior_logprobs", "token_versions"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def assert_quarantined(worker: RolloutWorker) -> None:
    with pytest.raises(RuntimeError, match="last weight update failed its checks"):
        worker.sample([ticket(3, anchors=[5])])


def test_keep_continues_with_the_new_weights_from_the_next_token_on(
    mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    rollouts = mid_flight.sample(some_tickets(), publication(other_policy, policy_version=7), mode="keep")
    for rollout in rollouts:
        expected = np.where(np.arange(HORIZON) < STEPS, 0, 7)
        assert np.array_equal(rollout.token_versions, np.where(rollout.is_token, expected, 0))
        assert_sampled_by(rollout, {0: policy, 7: other_policy})
        assert (rollout.min_policy_version, rollout.max_policy_version) == (0, 7)
    receipt = mid_flight.receipt()
    assert (receipt.policy_version, mid_flight.num_steps) == (7, HORIZON)
    assert receipt.probe_error < TOLERANCE
    assert min(receipt.verify_s, receipt.pause_s, receipt.probe_s) > 0


def test_keep_may_go_back_to_older_weights(
    mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    mid_flight.worker.receive_weights(*publication(other_policy, policy_version=7))
    rollouts = mid_flight.sample(some_tickets(), publication(policy, policy_version=3), mode="keep")
    for rollout in rollouts:
        assert_sampled_by(rollout, {7: other_policy, 3: policy})
        assert np.array_equal(rollout.completion_versions, np.where(rollout.completion_lengths > STEPS, 3, 7))
    assert mid_flight.receipt().policy_version == 3


def test_a_request_that_saw_new_weights_can_be_repeated(
    mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    """With the same weights before the same engine step, twice: nothing that happened in between has an effect."""
    worker, plan = mid_flight.worker, ((0, 0), (STEPS, 7))
    rollouts = mid_flight.sample(some_tickets(), publication(other_policy, policy_version=7), mode="keep")
    assert mid_flight.receipt().policy_version == 7 and {r.weight_steps for r in rollouts} == {plan}
    again = [replace(t, max_policy_version=0, weight_steps=plan) for t in some_tickets()]
    worker.receive_weights(*publication(policy, policy_version=0))
    with pytest.raises(RuntimeError, match=r"has to see weights of version 7 .* this worker holds \[\]"):
        worker.sample(again)
    for _ in range(2):
        worker.hold_weights(*publication(other_policy, policy_version=7))
        assert worker._sampler.policy_version == 0
        assert_bit_equal(worker.sample(again), rollouts)
        assert worker._sampler.policy_version == 7
        worker.receive_weights(*publication(policy, policy_version=0))


def test_bytes_of_held_weights_that_changed_are_named(worker: RolloutWorker, other_policy: LlamaForCausalLM) -> None:
    manifest, part = publication(other_policy, policy_version=7)
    part.buffers[3][0] ^= 1
    with pytest.raises(WeightMismatchError, match=f"tensor '{manifest.names[3]}' arrived with checksum"):
        worker.hold_weights(manifest, part)
    assert_quarantined(worker)


def test_keep_with_equal_weights_samples_what_an_undisturbed_request_does(
    mid_flight: MidFlight, policy: LlamaForCausalLM
) -> None:
    """Random states continue where they were: preemption draws nothing twice and skips nothing."""
    undisturbed = mid_flight.worker.sample(some_tickets())
    policy_again = publication(policy, policy_version=7)
    rollouts = mid_flight.sample(some_tickets(), policy_again, mode="keep")
    for found, expected in zip(rollouts, undisturbed, strict=True):
        assert np.array_equal(found.completion_ids, expected.completion_ids)
        np.testing.assert_allclose(found.behavior_logprobs, expected.behavior_logprobs, rtol=0, atol=TOLERANCE)
        assert found.max_policy_version == 7 and expected.max_policy_version == 0


def test_keep_resumes_whole_prompts_where_they_do_not_fit_into_a_step(
    mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seeded request whose prompt is processed in two pieces crashes on CPU: they must queue up instead."""
    undisturbed = mid_flight.worker.sample(some_tickets())
    scheduler = mid_flight.worker._sampler._llm.llm_engine.engine_core.engine_core.scheduler
    for limit, most in (("max_num_scheduled_tokens", 160), ("max_num_running_reqs", 24), ("max_num_active_reqs", 24)):
        monkeypatch.setattr(scheduler, limit, most)
    rollouts = mid_flight.sample(some_tickets(), publication(other_policy, policy_version=7), mode="keep")
    assert mid_flight.num_steps > 2 * HORIZON
    boundaries = set()
    for rollout, expected in zip(rollouts, undisturbed, strict=True):
        old = rollout.is_token & (rollout.token_versions == 0)
        assert np.array_equal(rollout.completion_ids[old], expected.completion_ids[old])
        assert_sampled_by(rollout, {0: policy, 7: other_policy})
        boundaries |= set(old.sum(-1).flatten().tolist())
    assert {0, STEPS} <= boundaries and mid_flight.receipt().policy_version == 7


def test_control_without_the_reset_running_requests_mix_old_keys_with_new_weights(
    mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm_engine = mid_flight.worker._sampler._llm.llm_engine
    monkeypatch.setattr(llm_engine, "reset_prefix_cache", lambda **settings: True)
    (rollout,) = mid_flight.sample(some_tickets()[:1], publication(other_policy, policy_version=7), mode="keep")
    new = rollout.is_token & (rollout.token_versions == 7)
    assert errors_by_token(rollout, policy)[new].mean() > 0.1
    assert errors_by_token(rollout, other_policy)[new].mean() > 0.01
    assert mid_flight.receipt().probe_error < TOLERANCE


def test_wait_lets_the_request_finish_and_then_updates(mid_flight: MidFlight, other_policy: LlamaForCausalLM) -> None:
    undisturbed = mid_flight.worker.sample(some_tickets())
    rollouts = mid_flight.sample(some_tickets(), publication(other_policy, policy_version=7), mode="wait")
    afterwards = mid_flight.worker.sample(some_tickets())  # at once: the update still comes first
    assert_bit_equal(rollouts, undisturbed)
    for rollout in afterwards:
        assert_sampled_by(rollout, {7: other_policy})
    assert mid_flight.receipt().policy_version == 7


def test_abort_samples_the_same_tickets_again(mid_flight: MidFlight, other_policy: LlamaForCausalLM) -> None:
    rollouts = mid_flight.sample(some_tickets(), publication(other_policy, policy_version=7), mode="abort")
    assert mid_flight.num_steps == STEPS + 1 + HORIZON  # the probe in between
    for rollout in rollouts:
        assert_sampled_by(rollout, {7: other_policy})
    assert mid_flight.receipt().policy_version == 7
    assert_bit_equal(rollouts, mid_flight.worker.sample(some_tickets()))


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_weights_newer_than_a_ticket_allows_wait(
    mode: InFlightUpdates, mid_flight: MidFlight, other_policy: LlamaForCausalLM
) -> None:
    first, second = some_tickets()
    undisturbed = mid_flight.worker.sample([first, second])
    tickets = [first, replace(second, max_policy_version=6)]
    rollouts = mid_flight.sample(tickets, publication(other_policy, policy_version=7), mode=mode)
    assert_bit_equal(rollouts, undisturbed)
    assert mid_flight.receipt().policy_version == 7
    message = "ticket 2 needs weights of version 6 or older, this worker has 7; send it these weights first"
    with pytest.raises(RuntimeError, match=message):
        mid_flight.worker.sample(tickets)


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_bytes_that_changed_on_the_way_end_the_running_request(
    mode: InFlightUpdates, mid_flight: MidFlight, other_policy: LlamaForCausalLM
) -> None:
    manifest, part = publication(other_policy, policy_version=7)
    part.buffers[3][0] ^= 1
    with pytest.raises(WeightMismatchError, match="during this request failed their checks"):
        mid_flight.sample(some_tickets(), (manifest, part), mode=mode)
    assert isinstance(mid_flight.failure(), WeightMismatchError)
    assert mid_flight.num_steps == STEPS
    assert_quarantined(mid_flight.worker)


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_a_probe_that_fails_ends_the_running_request(
    mode: InFlightUpdates, mid_flight: MidFlight, policy: LlamaForCausalLM, other_policy: LlamaForCausalLM
) -> None:
    manifest, part = publication(other_policy, policy_version=7)
    wrong = replace(manifest, probe=publication(policy, policy_version=7)[0].probe)
    with pytest.raises(WeightMismatchError, match="during this request failed their checks"):
        mid_flight.sample(some_tickets(), (wrong, part), mode=mode)
    assert "after loading version 7" in str(mid_flight.failure())
    assert mid_flight.num_steps == STEPS + 1  # the step of the probe
    assert_quarantined(mid_flight.worker)
    mid_flight.worker.receive_weights(manifest, part)
    rollouts = mid_flight.worker.sample(some_tickets())
    assert logprob_errors(rollouts, other_policy).max() < TOLERANCE


def test_the_engine_keeps_stepping_while_weights_are_verified(
    worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification here lasts until the request is over; were the engine to pause for it, neither would end."""
    is_over, verified_tensors = threading.Event(), worker_module.verified_tensors

    def verify_slowly(*arguments: object) -> list:
        assert is_over.wait(DEADLINE_S)
        return verified_tensors(*arguments)

    monkeypatch.setattr(worker_module, "verified_tensors", verify_slowly)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(worker.receive_weights, *publication(other_policy, policy_version=7))
        rollouts = worker.sample(some_tickets())
        is_over.set()
        assert receiving.result(DEADLINE_S).policy_version == 7
    assert {(r.min_policy_version, r.max_policy_version) for r in rollouts} == {(0, 0)}


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_texts_may_be_completed_and_scored_while_weights_arrive(
    mode: InFlightUpdates, worker: RolloutWorker, other_policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests without tickets follow the same rules and finish."""
    monkeypatch.setattr(worker._sampler._loop, "_in_flight_updates", mode)
    prompts = [random_ids(length, seed=length) for length in (3, 40, 90)]
    with ThreadPoolExecutor(1) as pool:
        for version in (7, 8, 9):
            receiving = pool.submit(worker.receive_weights, *publication(other_policy, policy_version=version))
            completions = worker._sampler.complete(prompts, max_tokens=HORIZON)
            assert [len(of_prompt) for of_prompt in completions] == [1, 1, 1]
            assert all(len(ids) == HORIZON or ids[-1] == EOS for (ids,) in completions)
            assert [len(scores) for scores in worker._sampler.score_tokens(prompts)] == [2, 39, 89]
            assert receiving.result(DEADLINE_S).policy_version == version
