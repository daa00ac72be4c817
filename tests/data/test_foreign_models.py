"""Models that come from others: their weights and settings are data, and none of their code runs."""

import ast
import builtins
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.models.loading import load_causal_lm, load_decoder
from actors.models.pretrained import load_tokenizer, resolve_model

ROOT = Path(__file__).resolve().parents[2]


class Marking:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def pickled(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model folder whose weights are a pickle that leaves a mark beside it."""
    folder = tmp_path / "model"
    config = LlamaConfig(vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Marking(tmp_path / "mark")}, folder / "pytorch_model.bin")
    return folder


def test_the_pickle_does_what_it_says_where_it_is_loaded(pickled: Path) -> None:
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert (pickled.parent / "mark").exists()


def test_pickled_weights_are_refused_by_name(pickled: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks weights \(\*\.safetensors\); pytorch_model\.bin is not read"):
        resolve_model(str(pickled))
    (pickled / "other.safetensors").write_bytes(b"")  # enough for the folder, and nothing that holds the weights
    for load in (load_causal_lm, load_decoder):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load(resolve_model(str(pickled)), dtype="float32")
    assert not (pickled.parent / "mark").exists()


def test_code_of_a_model_is_never_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the user would agree when transformers asks."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    folder, mark = tmp_path / "model", tmp_path / "mark"
    tokenizer.save_pretrained(folder)
    foreign = "from transformers import LlamaConfig\nclass Foreign(LlamaConfig): model_type = 'foreign'\n"
    (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\n{foreign}")
    code = {"AutoConfig": "foreign.Foreign", "AutoModelForCausalLM": "foreign.Foreign", "AutoModel": "foreign.Foreign"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    (folder / "model.safetensors").write_bytes(b"")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = resolve_model(str(folder))
    for load in (load_tokenizer, lambda name: load_causal_lm(name, dtype="float32")):
        with pytest.raises((ValueError, OSError)):
            load(model)
    assert not mark.exists()
    AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert mark.exists(), "this is what would have run"


def test_every_call_says_that_it_trusts_no_code_and_no_pickle() -> None:
    faults = []
    for package in ("actors", "feature_server", "learner", "orchestration"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and path.name != "train.py":
                    named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    called = ast.unparse(node.func)
                    if called.endswith(".from_pretrained") and named.get("trust_remote_code") != "False":
                        faults += [] if named.get(None, "").startswith("_settings(") else [f"{path}: {called}"]
                    if called in ("torch.load", "pickle.load") and named.get("weights_only") != "True":
                        faults.append(f"{path}: {called}")
    assert faults == []
