"""A real vLLM engine around a tiny policy, and what transformers says about the same tokens."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.config import RolloutConfig
from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from actors.rollout import Document, Rollout, Ticket
from actors.weights.manifest import Probe, WeightManifest, as_bytes, checksum
from actors.weights.object_store import ArrayPart
from actors.worker import RolloutWorker

TEMPERATURE = 0.7
TOLERANCE = 1e-4
MAX_TOKENS = 160
EOS = 0
NUM_TOKEN_IDS = 512
"""Of the tokenizer; the network has more rows, which engine and learner leave out."""


def make_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Tied, of 520 tokens: more than the tokenizer has, fewer than vLLM pads to; fond of EOS."""
    assert tokenizer.eos_token_id == EOS and len(tokenizer) == NUM_TOKEN_IDS
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
    model.get_input_embeddings().weight[NUM_TOKEN_IDS:] *= 4  # padding that would often be sampled
    return model


def largely_updated(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    """The policy after a large update of every parameter."""
    other = copy.deepcopy(policy)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return other


@contextmanager
def started_worker(
    folder: Path, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **settings: object
) -> Iterator[RolloutWorker]:
    """A worker whose engine lives in this process, until the context is left."""
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = RolloutConfig(temperature=TEMPERATURE, max_num_seqs=128, kv_cache_gib=0.1, **settings)
    # The variable of dynamo is read when it is imported; undone by pytest's patch, the setting would be lost.
    with pytest.MonkeyPatch.context() as environment, dynamo_config.patch(disable=True):
        variables = ENGINE_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            variables |= CPU_ENGINE_ENVIRONMENT
        for name, value in variables.items():
            environment.setenv(name, value)
        yield RolloutWorker(model=str(folder), config=config, dtype="float32", max_tokens=MAX_TOKENS)
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def publication(
    model: LlamaForCausalLM, *, policy_version: int, probe_length: int = 70
) -> tuple[WeightManifest, ArrayPart]:
    """What a learner with this model publishes; a tied head is no parameter of its own."""
    parameters = dict(model.named_parameters())
    assert "lm_head.weight" not in parameters
    buffers = [as_bytes(parameter).copy() for parameter in parameters.values()]
    probe_ids = [random_ids(probe_length, seed=100), random_ids(9, seed=101)]
    logprobs = [own_logprobs(model, ids, temperature=1.0)[1:].float().numpy() for ids in probe_ids]
    manifest = WeightManifest(
        policy_version=policy_version,
        names=list(parameters),
        dtypes=["float32"] * len(parameters),
        shapes=[tuple(parameter.shape) for parameter in parameters.values()],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=Probe(token_ids=probe_ids, logprobs=logprobs),
    )
    return manifest, ArrayPart(buffers)


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
    logits = model(input_ids=torch.tensor([token_ids])).logits[0, :, :NUM_TOKEN_IDS].double() / temperature
    logprobs = [logits[i - 1].log_softmax(-1)[token_ids[i]] for i in range(1, len(token_ids))]
    return torch.stack([torch.zeros((), dtype=torch.float64), *logprobs])


def errors_by_token(rollout: Rollout, model: LlamaForCausalLM, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """[B, n, G] |behavior - transformers| log-prob, each completion from a sequence of its own; NaN past its end."""
    ids = rollout.document.token_ids.tolist()
    errors = np.full(rollout.completion_ids.shape, np.nan)
    for group, anchor in enumerate(rollout.document.anchors.tolist()):
        for j, length in enumerate(rollout.completion_lengths[group].tolist()):
            completion = rollout.completion_ids[group, j, :length].tolist()
            own = own_logprobs(model, ids[:anchor] + completion, temperature=temperature)[anchor:]
            errors[group, j, :length] = np.abs(own.numpy() - rollout.behavior_logprobs[group, j, :length])
    return errors


def logprob_errors(
    rollouts: Sequence[Rollout], model: LlamaForCausalLM, *, temperature: float = TEMPERATURE
) -> np.ndarray:
    """|behavior - transformers| log-prob of every sampled token."""
    errors = [errors_by_token(rollout, model, temperature=temperature).flatten() for rollout in rollouts]
    return np.concatenate([of_one[~np.isnan(of_one)] for of_one in errors])
