"""What the learner publishes is what a checkpoint of its model holds, under the same names, and finite."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.weights.manifest import WeightManifest, verified_tensors
from actors.weights.object_store import ObjectStoreTransport
from actors.weights.parts import open_parts
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.policy import PackedPolicy
from learner.publish import publish

PROBE_IDS = [[1, 2, 3], [4, 5]]
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "llama": {},
    "gpt2": {},  # tied
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 16, "head_dim": 16},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
}


def engine_of(policy: PreTrainedModel) -> LearnerEngine:
    """The part of an engine that publishing uses, without DeepSpeed."""
    engine = object.__new__(LearnerEngine)
    engine.policy = PackedPolicy(policy, attention="sdpa")
    engine._config, engine._engine = LearnerConfig(zero_stage=0), SimpleNamespace(device=torch.device("cpu"))
    return engine


def published(policy: PreTrainedModel, **how: object) -> tuple[WeightManifest, list[np.ndarray]]:
    transport, parts = ObjectStoreTransport(device=torch.device("cpu"), folder=None), []
    settings = {"policy_version": 0, "probe_ids": PROBE_IDS, "rank": 0, "part_bytes": 4096} | how
    publishing = publish(engine_of(policy), transport=transport, **settings)
    while True:
        try:
            parts.append(next(publishing))
        except StopIteration as end:
            return end.value, open_parts(parts)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_version_holds_what_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    """Each expert by itself, saved buffers, a tied head once."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **KINDS[kind]))
    for name, buffer in policy.named_buffers():
        if "correction" in name:
            buffer.copy_(torch.randn_like(buffer))
    policy.save_pretrained(tmp_path)
    sent: dict[str, Tensor] = dict(verified_tensors(*published(policy)))
    saved = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], tensor) and sent[name].dtype == tensor.dtype for name, tensor in saved.items())


def test_every_version_carries_the_probe_of_version_0() -> None:
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    first, _ = published(policy)
    assert first.initial_probe is first.probe
    with torch.no_grad():
        policy.get_input_embeddings().weight += 1
    second, _ = published(policy, policy_version=1, initial_probe=first.initial_probe)
    assert second.initial_probe is first.probe
    assert not np.allclose(second.probe.logprobs[0], first.probe.logprobs[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_no_version(value: float) -> None:
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    with torch.no_grad():
        policy.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite in version 9"):
        published(policy, policy_version=9)
