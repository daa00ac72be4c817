"""Models that cannot work are refused by their configuration, with the type and the key, before a process starts."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast

from actors.models.pretrained import EMBEDDED_FOLDER
from orchestration.config import RunConfig
from orchestration.model_check import require_usable_models


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def configured(folder: Path, model_type: str, **settings: object) -> str:
    """A folder with this configuration and the tests' tokenizer of 512 tokens; its weights are never read."""
    (folder / "model.safetensors").touch()
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return str(folder)


def test_the_default_models_are_usable() -> None:
    require_usable_models(RunConfig(), str(EMBEDDED_FOLDER))


@pytest.mark.parametrize("role", ["policy", "feature_model"])
@pytest.mark.parametrize(("model_type", "message"), [("mamba", "carries a state"), ("bloom", "takes no position_ids")])
def test_models_that_packed_rows_do_not_fit(role: str, model_type: str, message: str, folder: Path) -> None:
    model = configured(folder, model_type, vocab_size=512)
    policy = model if role == "policy" else str(EMBEDDED_FOLDER)
    settings = {"model": {role: model}, "feature": {"foreign_tokenizer": "retokenize"}}
    with pytest.raises(ValueError, match=f"model type '{model_type}' {message}"):
        require_usable_models(RunConfig.model_validate(settings), policy)


@pytest.mark.parametrize(("document_tokens", "refused"), [(1020, False), (1024, True)])
def test_documents_beyond_the_positions(document_tokens: int, refused: bool) -> None:
    config = RunConfig.model_validate({"data": {"document_tokens": document_tokens, "context_tokens": 8}})
    if not refused:
        require_usable_models(config, str(EMBEDDED_FOLDER))
        return
    message = (
        "data.document_tokens=1024 and data.horizon=4 need 1028 positions, and model type 'llama' was made for 1024"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        require_usable_models(config, str(EMBEDDED_FOLDER))


def test_positions_that_are_scaled_are_left_to_the_engine(folder: Path) -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    model = configured(folder, "llama", vocab_size=512, max_position_embeddings=64, rope_parameters=scaled)
    require_usable_models(RunConfig(), model)


@pytest.mark.parametrize(("rows", "refused"), [(512, False), (511, True)])
def test_a_tokenizer_with_more_ids_than_the_network_has_rows(rows: int, refused: bool, folder: Path) -> None:
    model = configured(folder, "llama", vocab_size=rows)
    if not refused:
        require_usable_models(RunConfig(), model)
        return
    with pytest.raises(ValueError, match=r"has 512 token ids, and model type 'llama' has rows for 511 of them"):
        require_usable_models(RunConfig(), model)
