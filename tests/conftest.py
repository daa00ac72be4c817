"""Fixtures that several test files share."""

import functools
import gc
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets read it: no test may reach the network

import numpy as np
import pytest
from xdist.scheduler import LoadScopeScheduling

# jaxtyping checks only what is imported after pytest has started; and what is heavy, the process that shares the tests
# out among others would import for nothing.
if TYPE_CHECKING:
    from own_cluster import OwnCluster
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
    from whole_runs import WholeRun

    from actors.rollout import Document, Rollout


ON_THE_CLUSTER = ("test_bad_input.py", "test_job.py", "test_replay_engine.py", "test_scale_job.py")
"""Tests of whole runs in several processes."""


class WholeFiles(LoadScopeScheduling):
    """Side by side, one process takes all tests of a file, and one takes those on the cluster, which they share."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "cluster" if file.endswith(ON_THE_CLUSTER) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> WholeFiles:
    """Of pytest-xdist."""
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on the cluster first: they last longest."""
    items.sort(key=lambda item: not item.path.name.endswith(ON_THE_CLUSTER))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On busy cores two spinning threads are slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of 512 tokens that knows some Python; `<eos>` is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [(stdlib / name).read_text(encoding="utf-8") for name in ("bisect.py", "heapq.py", "textwrap.py")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.fixture(scope="session")
def make_causal_lm() -> "Callable[..., PreTrainedModel]":
    """Tiny random networks: 64 tokens, width 32, float32, no parameter left at a special value."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    def make(
        kind: str, *, tied: bool = False, num_layers: int = 2, vocab_size: int = 64, seed: int = 0
    ) -> "PreTrainedModel":
        common = {"vocab_size": vocab_size, "initializer_range": 0.2, "tie_word_embeddings": tied}
        common |= {"bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config = GPT2Config(n_embd=32, n_layer=num_layers, n_head=2, n_positions=256, **dropout, **common)
        else:
            config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=num_layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                **common,
            )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases would be 0 and norms 1
                    parameter += 0.2 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def make_architecture() -> "Callable[[str], PreTrainedModel]":
    """Tiny random networks of many architectures, by the names of benchmarks/architectures.py."""
    import importlib.util

    path = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.tiny_model


@pytest.fixture(scope="session")
def make_rollout() -> "Callable[..., Rollout]":
    """Rollouts of random tokens and log-probs; past a completion's end are values that must not be read."""
    from actors.rollout import Document, Rollout

    def make(
        *,
        num_tokens: int,
        anchors: list[int],
        lengths: list[list[int]],
        horizon: int,
        vocab_size: int = 64,
        num_prompt_tokens: int = 0,
        policy_version: int = 0,
        seed: int = 0,
    ) -> Rollout:
        random = np.random.default_rng(seed)
        completion_lengths = np.array(lengths, dtype=np.int64)
        shape = (*completion_lengths.shape, horizon)
        past_end = np.arange(horizon) >= completion_lengths[..., None]
        return Rollout(
            ticket_id=seed,
            document=Document(
                document_id=f"document {seed}",
                token_ids=random.integers(1, vocab_size, num_tokens),
                anchors=np.array(anchors, dtype=np.int64),
                horizon=horizon,
                ends_with_eos=True,
                num_prompt_tokens=num_prompt_tokens,
            ),
            completion_ids=np.where(past_end, vocab_size - 1, random.integers(1, vocab_size, shape)),
            completion_lengths=completion_lengths,
            behavior_logprobs=np.where(past_end, -50, -4 * random.random(shape)).astype(np.float32),
            token_versions=np.where(past_end, 99, policy_version),
        )

    return make


@pytest.fixture(scope="session")
def unchecked_packing() -> ModuleType:
    """`feature_server.packing` without the shape checks, whose wrapper FlexAttention refuses as a mask."""
    import importlib.util

    from feature_server import packing

    spec = importlib.util.spec_from_file_location("unchecked_packing", packing.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_document() -> "Callable[[int], Document]":
    """Documents of two groups that differ in their id and in their tokens."""
    from actors.rollout import Document

    def make(index: int) -> Document:
        return Document(
            document_id=f"train/{index}",
            token_ids=np.arange(8) + index,
            anchors=np.array([2, 4]),
            horizon=2,
            ends_with_eos=False,
        )

    return make


@pytest.fixture(scope="session")
def policy(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """What the small real engine holds at version 0; not to be changed."""
    from small_engine import make_policy

    return make_policy(tokenizer)


@pytest.fixture(scope="session")
def other_policy(policy: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """The same after a large update; not to be changed either."""
    from small_engine import largely_updated

    return largely_updated(policy)


@pytest.fixture(scope="session")
def cluster() -> "Iterator[OwnCluster]":
    """The one Ray cluster of all tests that need one: a node of two CPUs. Each test leaves it empty."""
    from own_cluster import own_cluster

    with own_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def submitted(cluster: "OwnCluster", tmp_path_factory: pytest.TempPathFactory) -> "Callable[[bool], WholeRun]":
    """A job that was submitted to the cluster: uploaded, of the smallest configuration as it is; or not uploaded,
    with every batch as old as it may be."""
    from own_cluster import SMOKE
    from whole_runs import EXACT, few_texts, submitted_run

    @functools.cache
    def submitted(upload: bool) -> "WholeRun":
        folder = tmp_path_factory.mktemp("submitted")
        exact = (*EXACT, "--asynchrony.weight-transport", "gloo", *few_texts(folder))
        arguments = (SMOKE,) if upload else exact
        return submitted_run(cluster, folder / f"upload-{upload}", *arguments, upload=upload)

    return submitted


@pytest.fixture(scope="session")
def without_cluster(tmp_path_factory: pytest.TempPathFactory) -> "WholeRun":
    """A synchronous run that started and ended its own Ray."""
    from whole_runs import SYNCHRONOUS, few_texts, local_run

    folder = tmp_path_factory.mktemp("local")
    arguments = (*SYNCHRONOUS, "--asynchrony.weight-transport", "object_store", *few_texts(folder))
    return local_run(folder / "local", *arguments)


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: searching it took a tenth of the time of the unit tests."""
    gc.freeze()
