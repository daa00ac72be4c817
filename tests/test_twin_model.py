"""A real engine and the twin of its model: loading aside changes nothing, exchanging everything, again and again."""

from collections.abc import Iterator

import pytest
import torch
from small_engine import TOLERANCE, largely_updated, own_logprobs, random_ids, started_worker
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from actors.engine.sampler import Sampler
from actors.worker import RolloutWorker

pytestmark = pytest.mark.engine
TEXT = random_ids(60, seed=7)


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Iterator[RolloutWorker]:
    with started_worker(tmp_path_factory.mktemp("policy"), policy, tokenizer) as worker:
        yield worker


def tensors(model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.clone()) for name, parameter in model.named_parameters()]


def error(sampler: Sampler, model: LlamaForCausalLM) -> float:
    """Largest difference [nats] between the engine's and transformers' log-probs of a text."""
    sampler._llm.llm_engine.reset_prefix_cache()
    (found,) = sampler.score_tokens([TEXT])
    return float((torch.tensor(found) - own_logprobs(model, TEXT, temperature=1.0)[1:]).abs().max())


def test_the_engine_keeps_its_weights_until_the_exchange_and_has_all_new_ones_after_it(
    worker: RolloutWorker, policy: LlamaForCausalLM
) -> None:
    sampler = worker._sampler
    engine = sampler._llm.llm_engine
    present = policy
    for update in range(3):
        new = largely_updated(present)
        assert error(sampler, new) > 0.1, "the update can hardly be seen"
        engine.collective_rpc("prepare_weights", args=(tensors(new),))
        assert error(sampler, present) < TOLERANCE, f"update {update}: loading aside has changed the engine"
        engine.collective_rpc("exchange_weights")
        assert error(sampler, new) < TOLERANCE, f"update {update}: a part of the old weights is left"
        present = new


def test_an_exchange_can_be_taken_back(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    sampler = worker._sampler
    engine = sampler._llm.llm_engine
    other = largely_updated(policy)
    for model in (policy, other):
        engine.collective_rpc("prepare_weights", args=(tensors(model),))
        engine.collective_rpc("exchange_weights")
    engine.collective_rpc("exchange_weights")
    assert error(sampler, policy) < TOLERANCE


def test_a_model_with_a_twin_is_not_loaded_in_place(worker: RolloutWorker, policy: LlamaForCausalLM) -> None:
    """vLLM's notes on how to reload a layer serve either the model or its twin."""
    engine = worker._sampler._llm.llm_engine
    engine.collective_rpc("prepare_weights", args=(tensors(policy),))
    with pytest.raises(RuntimeError, match="prepare_weights and exchange_weights"):
        engine.collective_rpc("receive_weights", args=(tensors(policy),))
