"""Tiny random models of many architectures: is what this project computes with them what they compute themselves?

Learner: log-probs of a packed row, and their gradients, against plain forwards of separate sequences. Features: what
the feature model reads of a packed row against the hidden states that the untouched model returns. Windows are
shorter than the sequences, and dropout is on in the configurations.

    python benchmarks/architectures.py            # all; prints the table of docs/architectures.md
    python benchmarks/architectures.py gemma2 opt
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.rollout import Document, Rollout
from benchmarks.architecture_engine import (
    TEMPERATURE,
    engine_columns,
    first_clause,
    report_fault,
    run_alone,
    sequences,
    text_logprobs,
)
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import HiddenStates
from feature_server.features.pooling import feature_layers
from feature_server.packed_forward import packed_forward, require_packable
from feature_server.packing import pack
from learner.policy import PackedPolicy, base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE = 64
COLUMNS = ("learner", "features", "engine", "update", "export")
ROW_S = 400.0
"""Longest time for a row [s]."""
WINDOW = 5
"""Tokens that a layer with a window sees; the row's sequences have up to 24."""
TOLERANCE = 2e-5
"""Nats, or relative to the largest hidden state or gradient: many roundings of float32."""

Settings = dict[str, object]
SIZES: Settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.14,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2_SIZES: Settings = {"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 256}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED: Settings = {"sliding_window": WINDOW}
ARCHITECTURES: dict[
    str, Settings
] = {  # a model type of transformers, and behind a colon what sets it apart from the row above
    "llama": {"attention_dropout": 0.3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED},
    "qwen2: no windows": {},
    "qwen3": {},
    "mistral": WINDOWED,
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.1, **LOCAL_EXPERTS},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gemma": {},
    "gemma2": {},
    "gemma2: no cap in attention": {
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 3.0,
        **WINDOWED,
    },
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
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.2, "layerdrop": 0.2},
    "bloom": {"n_layer": 4, "n_head": 2},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 1, "alibi": False},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.3},
    "granitemoe": {"logits_scaling": 4.0, "attention_multiplier": 0.125, **LOCAL_EXPERTS},
    "stablelm": {"hidden_dropout": 0.2},
    "starcoder2": {"embedding_dropout": 0.1, "residual_dropout": 0.1, **WINDOWED},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **WINDOWED},
    "cohere2: no windows": {"logit_scale": 0.3, "sliding_window": 256},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWED,
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        "head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
    "nemotron": {},
    "llama4_text": {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "llama4_text: chunks of 32": {"attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "exaone4": {"sliding_window_pattern": 2, **WINDOWED},
    "ernie4_5": {},
    "nanochat": {},
    "mamba": {},
    "rwkv": {},
    "jamba": {},
    "qwen3_next": {},
    "recurrent_gemma": {},
}
"""By the model type of transformers; behind a colon stands what sets it apart from the entry above."""


def tiny_model(name: str) -> "PreTrainedModel":
    """A causal language model of the architecture, float32, no parameter left at a special value.

    Raises: ValueError if packed rows do not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, _, _ = name.partition(":")
    known = AutoConfig.for_model(model_type)  # by a size that a configuration only carries along, vLLM would go
    sizes = {key: size for key, size in SIZES.items() if hasattr(known, key) and (name, key) != ("falcon", "head_dim")}
    config = AutoConfig.for_model(model_type, **sizes | ARCHITECTURES[name])
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


def own_logprobs(model: "PreTrainedModel", rollout: Rollout) -> Tensor:
    """Of the sampled tokens, by plain forwards of separate sequences."""
    parts = [
        text_logprobs(model, tokens, temperature=TEMPERATURE)[anchor - 1 :] for anchor, tokens in sequences(rollout)
    ]
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


def cells(name: str) -> Iterator[tuple[str, str]]:
    """Column and verdict, one after the other."""
    try:
        model = tiny_model(name)
    except ValueError as error:
        yield "learner", f"refused: {first_clause(str(error))}"
        yield from ((column, "-") for column in COLUMNS[1:])
        return
    rollout = strided_rollout()
    yield "learner", verdict(learner_error(model, rollout))
    yield "features", verdict(feature_error(model, rollout))
    yield from engine_columns(model.eval())


def row(name: str) -> str:
    """Of the table, by a process of its own; what ended that stands in the first column that it did not reach."""
    printed, end = run_alone([__file__, "--cells", name], seconds=ROW_S, environment={"HF_HUB_OFFLINE": "1"})
    found = dict(json.loads(line) for line in printed.splitlines() if line.startswith('["'))
    verdicts = [*found.values(), end, *["-"] * len(COLUMNS)][: len(COLUMNS)]
    return f"| {' | '.join([name, *verdicts])} |"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*", help=f"some of {', '.join(ARCHITECTURES)}; default: all")
    parser.add_argument("--cells", metavar="NAME", help="one row, in this process, as JSON")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.architecture} - ARCHITECTURES.keys()):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(ARCHITECTURES)}")
    if arguments.cells:
        sys.excepthook = report_fault
        for cell in cells(arguments.cells):
            print(json.dumps(cell), flush=True)
        return
    print(f"| architecture | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for name in arguments.architecture or ARCHITECTURES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
