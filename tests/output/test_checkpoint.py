"""A checkpoint holds exactly what was published, in a folder that appears whole or not at all."""

import copy
import json
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from actors.models.loading import load_causal_lm
from actors.weights.manifest import Probe, WeightManifest, WeightMismatchError, as_bytes, checksum
from learner.publish import checkpoint_tensors, model_tensors
from orchestration.output.checkpoint import save_checkpoint

MakeCausalLM = Callable[..., PreTrainedModel]
Published = tuple[WeightManifest, list[np.ndarray]]


def publish(model: PreTrainedModel, *, policy_version: int = 3) -> Published:
    named = {
        saved: tensor for name, held in model_tensors(model) for saved, tensor in checkpoint_tensors(model, name, held)
    }
    buffers = [as_bytes(parameter).copy() for parameter in named.values()]
    manifest = WeightManifest(
        policy_version=policy_version,
        names=list(named),
        dtypes=[str(parameter.dtype).removeprefix("torch.") for parameter in named.values()],
        shapes=[tuple(parameter.shape) for parameter in named.values()],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=Probe(token_ids=[], logprobs=[]),
    )
    return manifest, buffers


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base_model(
    request: pytest.FixtureRequest,
    make_causal_lm: MakeCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The initial checkpoint, with other weights than those that are published."""
    folder = tmp_path_factory.mktemp("base")
    make_causal_lm("llama", tied=request.param, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base_model: Path, make_causal_lm: MakeCausalLM) -> PreTrainedModel:
    tied = json.loads((base_model / "config.json").read_text())["tie_word_embeddings"]
    return make_causal_lm("llama", tied=tied, seed=1)


def assert_holds(folder: Path, model: PreTrainedModel) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_weights_load_bit_for_bit(
    dtype: torch.dtype, base_model: Path, trained: PreTrainedModel, tmp_path: Path
) -> None:
    trained.to(dtype)
    manifest, buffers = publish(trained)
    folder = tmp_path / "run" / "checkpoint"
    assert save_checkpoint(folder, manifest=manifest, buffers=buffers, base_model=str(base_model)) == folder
    assert_holds(folder, trained)
    text = "def f(x): return x"
    ids = AutoTokenizer.from_pretrained(base_model)(text).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_an_older_checkpoint_is_replaced_as_a_whole(
    base_model: Path, trained: PreTrainedModel, make_causal_lm: MakeCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    left_over = tmp_path / "checkpoint.partial"
    for path in (folder, left_over):
        path.mkdir()
        (path / "stale.txt").touch()
    manifest, buffers = publish(trained)
    save_checkpoint(folder, manifest=manifest, buffers=buffers, base_model=str(base_model))
    assert_holds(folder, trained)
    assert not (folder / "stale.txt").exists()
    assert not left_over.exists()


@pytest.fixture
def rescue_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "rescues"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def rescued(error: OSError, place: Path) -> Path:
    (folder,) = place.glob("async-ebft-rescue-*/*")
    assert str(folder) in str(error)
    return folder


def test_weights_that_cannot_be_written_are_rescued(
    base_model: Path, trained: PreTrainedModel, tmp_path: Path, rescue_place: Path
) -> None:
    (tmp_path / "file").touch()
    manifest, buffers = publish(trained)
    wanted = tmp_path / "file" / "checkpoint"
    with pytest.raises(OSError, match=r"Not a directory; version 3 was saved to") as failure:
        save_checkpoint(wanted, manifest=manifest, buffers=buffers, base_model=str(base_model))
    assert failure.value.filename == str(wanted)
    assert_holds(rescued(failure.value, rescue_place), trained)
    assert list(tmp_path.rglob("*.partial")) == []


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[Callable[[], None]]:
    """Writing further into any file fails as on a full disk; the value lifts the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield lift
    finally:
        lift()


def test_a_disk_that_fills_up_leaves_the_older_checkpoint_and_a_rescue(
    base_model: Path,
    trained: PreTrainedModel,
    tmp_path: Path,
    rescue_place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Configuration and tokenizer still fit, the weights do not; the place of the rescue has room."""
    wanted = tmp_path / "checkpoint"
    wanted.mkdir()
    (wanted / "older.txt").touch()
    manifest, buffers = publish(trained)
    assert manifest.num_bytes > 40_000 > max(p.stat().st_size for p in base_model.glob("*.json"))
    make_place = tempfile.mkdtemp
    with files_limited_to(40_000) as lift:
        monkeypatch.setattr(tempfile, "mkdtemp", lambda **names: (lift(), make_place(**names))[1])
        with pytest.raises(OSError, match=r"version 3 was saved to") as failure:
            save_checkpoint(wanted, manifest=manifest, buffers=buffers, base_model=str(base_model))
    assert "File too large" in str(failure.value)
    assert_holds(rescued(failure.value, rescue_place), trained)
    assert [path.name for path in wanted.iterdir()] == ["older.txt"]
    assert list(tmp_path.rglob("*.partial")) == []


def test_damaged_weights_are_not_saved(base_model: Path, trained: PreTrainedModel, tmp_path: Path) -> None:
    manifest, buffers = publish(trained)
    buffers[-1][0] ^= 1
    with pytest.raises(WeightMismatchError, match=re.escape(manifest.names[-1])):
        save_checkpoint(tmp_path / "checkpoint", manifest=manifest, buffers=buffers, base_model=str(base_model))
    assert list(tmp_path.iterdir()) == []


def make_base(folder: Path, tokenizer: PreTrainedTokenizerFast, *, as_of_version_4: bool) -> None:
    """A mixture of experts whose router's bias is a buffer; transformers would write some of its files otherwise."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        eos_token_id=[0, 7],
    )
    model = Glm4MoeForCausalLM(config)
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").copy_(torch.randn(4))
    model.save_pretrained(folder)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    chatty.save_pretrained(folder)
    (folder / "README.md").write_text("of the base, not of what was trained")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7],\n "temperature": 0.6, "do_sample": true}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>", "unk_token": "<eos>"}')
    if as_of_version_4:
        config = json.loads((folder / "config.json").read_text())
        config["torch_dtype"] = config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("as_of_version_4", [False, True])
def test_a_run_of_no_steps_exports_its_base(
    as_of_version_4: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, export = tmp_path / "base", tmp_path / "checkpoint"
    make_base(base, tokenizer, as_of_version_4=as_of_version_4)
    manifest, buffers = publish(load_causal_lm(str(base), dtype="float32"), policy_version=0)
    save_checkpoint(export, manifest=manifest, buffers=buffers, base_model=str(base))
    names = {path.name for path in base.iterdir()} - {"README.md"}
    assert {path.name for path in export.iterdir()} == names >= {"chat_template.jinja", "special_tokens_map.json"}
    for name in names - {"model.safetensors", *(["config.json"] if as_of_version_4 else [])}:
        assert (export / name).read_bytes() == (base / name).read_bytes(), name
    saved, expected = load_file(export / "model.safetensors"), load_file(base / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    ids = torch.arange(1, 40)[None]
    logits = [load_causal_lm(str(folder), dtype="auto")(ids).logits for folder in (base, export)]
    assert torch.equal(*logits)
    chats = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "x = 1"}])
        for folder in (base, export)
    ]
    assert chats[0] == chats[1]
    assert GenerationConfig.from_pretrained(export).eos_token_id == [0, 7]
