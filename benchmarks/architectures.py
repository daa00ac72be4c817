"""Tiny random models of many architectures: is what this project computes with them what they compute themselves?

Learner: log-probs of a packed row, and their gradients, against plain forwards of separate sequences. Features: what
the feature model reads of a packed row against the hidden states that the untouched model returns. Windows are
shorter than the sequences, and dropout is on in the configurations.

    python benchmarks/architectures.py            # all; prints the table of docs/architectures.md
    python benchmarks/architectures.py gemma2 opt
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.rollout import Document, Rollout
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import HiddenStates
from feature_server.features.pooling import feature_layers
from feature_server.packed_forward import packed_forward, require_packable
from feature_server.packing import pack
from learner.policy import PackedPolicy, base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE, TEMPERATURE = 64, 0.7
WINDOW = 5
"""Tokens that a layer with a window sees; the row's sequences have up to 24."""
TOLERANCE = 2e-5
"""Nats, or relative to the largest hidden state or gradient: many roundings of float32."""

Settings = dict[str, object]
SIZES: Settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2_SIZES: Settings = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 256}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED: Settings = {"sliding_window": WINDOW}
ARCHITECTURES: dict[str, Settings] = {
    "llama": {"attention_dropout": 0.3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED},
    "qwen3": {},
    "mistral": WINDOWED,
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.1, **LOCAL_EXPERTS},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, **WINDOWED},
    "gemma3_text": WINDOWED,
    "phi": {},
    "phi3": {"resid_pdrop": 0.2, **WINDOWED},
    "phimoe": {**LOCAL_EXPERTS, **WINDOWED},
    "gpt2": GPT2_SIZES,
    "gpt_bigcode": GPT2_SIZES,
    "gpt_neo": {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 8, **GPT2_SIZES},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "gpt_oss": {**LOCAL_EXPERTS, **WINDOWED},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2, "layerdrop": 0.2},
    "bloom": {"n_layer": 4, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 1, "alibi": False},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.3},
    "granitemoe": {"logits_scaling": 4.0, **LOCAL_EXPERTS},
    "stablelm": {"hidden_dropout": 0.2},
    "starcoder2": {"embedding_dropout": 0.1, "residual_dropout": 0.1, **WINDOWED},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **WINDOWED},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWED,
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
    },
    "nemotron": {},
    "llama4_text": {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "exaone4": {"sliding_window_pattern": 2, **WINDOWED},
    "ernie4_5": {},
    "nanochat": {},
    "mamba": {},
    "rwkv": {},
    "jamba": {},
    "qwen3_next": {},
    "recurrent_gemma": {},
}


class Row(NamedTuple):
    """One line of the table."""

    architecture: str
    learner: str
    features: str


def tiny_model(name: str) -> "PreTrainedModel":
    """A causal language model of the architecture, float32, no parameter left at a special value.

    Raises: ValueError if packed rows do not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in SIZES.items() if not (name == "falcon" and key == "head_dim")}
    config = AutoConfig.for_model(name, **sizes | ARCHITECTURES[name])
    require_packable(config, "sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases would be 0 and norms 1
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def strided_rollout() -> Rollout:
    """A document of 24 tokens, three blocks of two completions."""
    random = np.random.default_rng(0)
    shape = (3, 2, 4)
    return Rollout(
        ticket_id=0,
        document=Document(
            document_id="document",
            token_ids=random.integers(1, VOCAB_SIZE, 24),
            anchors=np.array([4, 12, 20]),
            horizon=4,
            ends_with_eos=True,
        ),
        completion_ids=random.integers(1, VOCAB_SIZE, shape),
        completion_lengths=np.array([[4, 3], [2, 4], [4, 4]]),
        behavior_logprobs=-np.ones(shape, dtype=np.float32),
        token_versions=np.zeros(shape, dtype=np.int64),
    )


def sequences(rollout: Rollout) -> list[tuple[int, Tensor]]:
    """Anchor and tokens of every completion behind its own copy of its context."""
    found = []
    for group, anchor in enumerate(rollout.document.anchors.tolist()):
        for ids, length in zip(rollout.completion_ids[group], rollout.completion_lengths[group], strict=True):
            tokens = np.concatenate([rollout.document.token_ids[:anchor], ids[:length]])
            found.append((anchor, torch.from_numpy(tokens)))
    return found


def own_logprobs(model: "PreTrainedModel", rollout: Rollout) -> Tensor:
    """Of the sampled tokens, by plain forwards of separate sequences."""
    parts = []
    for anchor, tokens in sequences(rollout):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, anchor - 1 : -1]
        logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
        parts.append(logprobs.gather(-1, tokens[anchor:, None])[:, 0])
    return torch.cat(parts)


def learner_error(model: "PreTrainedModel", rollout: Rollout) -> float:
    """Largest error of a log-prob [nats], or of a gradient relative to the largest, in training mode."""
    parameters = list(model.parameters())
    own = own_logprobs(model.eval(), rollout)
    expected = torch.autograd.grad(own.sum(), parameters, allow_unused=True, materialize_grads=True)
    policy = PackedPolicy(model, attention="sdpa", logits_chunk_tokens=7).train()
    packed, _ = policy(pack([rollout]), TEMPERATURE)
    found = torch.autograd.grad(packed.sum(), parameters, allow_unused=True, materialize_grads=True)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    errors = [float((a - b).abs().max()) / largest for a, b in zip(found, expected, strict=True)]
    return max(float((packed - own).detach().abs().max()), *errors)


@torch.no_grad()
def feature_error(model: "PreTrainedModel", rollout: Rollout) -> float:
    """Largest error of a hidden state of a completion's token, relative to the largest hidden state."""
    whole = base_model(model)[1].eval()
    network = copy.deepcopy(whole)
    layers = feature_layers(FeatureConfig().depth_fracs, model.config.num_hidden_layers)
    expected = own_hidden_states(whole, rollout, layers)
    batch = pack([rollout])
    states = HiddenStates(network, layers)
    packed_forward(network, batch, "sdpa")
    found = torch.stack([hidden[batch.completions.row, batch.completions.column] for hidden in states.taken()])
    return float((found - expected).abs().max() / expected.abs().max())


def own_hidden_states(whole: "PreTrainedModel", rollout: Rollout, layers: list[int]) -> Tensor:
    """[layer, token, hidden] of the completions' tokens, as the untouched model returns them."""
    parts = []
    for anchor, tokens in sequences(rollout):
        states = whole(input_ids=tokens[None], output_hidden_states=True, use_cache=False).hidden_states
        parts.append(torch.stack([states[layer][0, anchor:] for layer in layers]))
    return torch.cat(parts, dim=1)


def verdict(error: float) -> str:
    """Yes, or by how much not."""
    return f"yes ({error:.0e})" if error < TOLERANCE else f"no ({error:.1e})"


def row(name: str) -> Row:
    """Both comparisons, or the reason why there is none."""
    try:
        model = tiny_model(name)
    except ValueError as error:
        return Row(name, f"refused: {error}", "refused")
    rollout = strided_rollout()
    return Row(name, verdict(learner_error(model, rollout)), verdict(feature_error(model, rollout)))


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*", default=[], help=f"some of {', '.join(ARCHITECTURES)}; default: all")
    print("| architecture | learner | features |\n| --- | --- | --- |")
    for name in parser.parse_args().architecture or ARCHITECTURES:
        print("|", " | ".join(row(name)), "|", flush=True)


if __name__ == "__main__":
    main()
