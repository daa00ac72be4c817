"""A folder whose tensors are not those of its configuration is refused by whatever would load it, with the names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from actors.models.loading import load_causal_lm, load_decoder, require_complete
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import FeatureModel
from learner.config import LearnerConfig
from learner.worker import LearnerWorker

MakeCausalLM = Callable[..., PreTrainedModel]
NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
PREFIX = "(model.)?"
"""A decoder by itself has its parameters without it."""


@pytest.fixture
def folder(make_causal_lm: MakeCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """Complete, with a head of its own."""
    make_causal_lm("llama", vocab_size=512).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def learner(folder: Path) -> object:
    return LearnerWorker(
        model=str(folder), config=LearnerConfig(), dtype="float32", max_tokens=64, temperature=1.0, seed=0
    )


def feature_model(folder: Path) -> object:
    return FeatureModel(str(folder), FeatureConfig(), dtype="float32", max_tokens=64)


def evaluation(folder: Path) -> object:
    return require_complete(str(folder))


READERS = pytest.mark.parametrize("read", [learner, feature_model, evaluation])


@READERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"they lack {PREFIX}{NORM.removeprefix('model.')}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "they hold in addition extra"),
        (
            lambda tensors: tensors.update({QUERY: tensors[QUERY][:16].clone()}),
            rf"they hold another shape of {PREFIX}{QUERY.removeprefix('model.')} \(16, 32\) instead of \(32, 32\)",
        ),
    ],
    ids=["missing", "unexpected", "other shape"],
)
def test_a_tensor_too_few_or_too_many_is_refused_by_name(
    read: Callable[[Path], object],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    folder: Path,
) -> None:
    read(folder)
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*{message}.*save_pretrained"):
        read(folder)


@pytest.mark.parametrize("read", [learner, evaluation])
def test_a_missing_head_is_refused_unless_it_is_tied(
    read: Callable[[Path], object], folder: Path, make_causal_lm: MakeCausalLM
) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"they lack lm_head\.weight"):
        read(folder)
    make_causal_lm("llama", vocab_size=512, tied=True).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    read(folder)


def test_a_feature_model_needs_no_head(folder: Path) -> None:
    assert load_file(folder / "model.safetensors")["lm_head.weight"].shape == (512, 32)
    with_head = load_decoder(str(folder), dtype="float32").state_dict()
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    without = load_decoder(str(folder), dtype="float32").state_dict()
    assert list(with_head) == list(without)
    assert all(torch.equal(with_head[name], without[name]) for name in without)


def test_keys_that_transformers_ignores_by_design_are_accepted(make_causal_lm: MakeCausalLM, tmp_path: Path) -> None:
    """GPT-2's files of old hold the causal masks of its layers."""
    model = make_causal_lm("gpt2")
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(4, 4)}))
    loaded = load_causal_lm(str(tmp_path), dtype="float32").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_one_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    """The files hold every expert by itself, the network all of a layer in one parameter."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    load_causal_lm(str(tmp_path), dtype="float32")
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts"):
        load_causal_lm(str(tmp_path), dtype="float32")
