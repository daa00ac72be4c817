"""What a real engine did with the tensors it was given: all read and all filled, or named; experts one by one."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from small_engine import TOLERANCE, own_logprobs, random_ids, started_worker
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from actors.engine.load_account import LoadAccount
from actors.engine.sampler import Sampler
from actors.weights.manifest import WeightMismatchError
from learner.publish import checkpoint_tensors, model_tensors

COMMON = {
    "vocab_size": 520,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 32, "head_dim": 32},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "head_dim": 32,
    },
}


class Fused(nn.Module):
    """As vLLM makes them: query, key and value in one parameter, rows of padding, a tied head, experts in one."""

    def __init__(self, *, reads_ahead: bool) -> None:
        """`reads_ahead`: it asks for all tensors before it copies the first; else it reorders some as they come."""
        super().__init__()
        self.reads_ahead = reads_ahead
        self.embedding = nn.Parameter(torch.zeros(8, 4, device="meta"))
        self.qkv = nn.Parameter(torch.zeros(6, 4, device="meta"))
        self.experts = nn.Parameter(torch.zeros(2, 3, 4, device="meta"))
        self.head = nn.Module()
        self.head.weight = self.embedding

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Names that it does not know are skipped, as many of vLLM's models do."""
        for name, tensor in list(weights) if self.reads_ahead else weights:
            if name == "embedding":
                self.embedding.data[:5].copy_(tensor)
                self.embedding.data[5:].fill_(0)
            elif name in ("q", "k", "v"):
                first = 2 * "qkv".index(name)
                self.qkv.data.narrow(0, first, 2).copy_(tensor)
            elif name.startswith("expert"):
                self.experts.data[int(name[-1])].copy_(tensor.t() if self.reads_ahead else tensor.t().contiguous())


WHOLE = {
    "embedding": torch.ones(5, 4),
    "q": torch.ones(2, 4),
    "k": torch.ones(2, 4),
    "v": torch.ones(2, 4),
    "expert0": torch.ones(4, 3),
    "expert1": torch.ones(4, 3),
}


@pytest.mark.parametrize("reads_ahead", [False, True])
@pytest.mark.parametrize(
    ("left_out", "added", "unread", "unfilled"),
    [
        ([], {}, [], []),
        (["k"], {}, [], ["qkv"]),
        (["k"], {"q": torch.ones(2, 4)}, [], ["qkv"]),
        (["expert1"], {}, [], ["experts"]),
        (["embedding"], {}, [], ["embedding"]),
        ([], {"bias": torch.ones(4)}, ["bias"], []),
        (["v"], {"w": torch.ones(2, 4)}, ["w"], ["qkv"]),
    ],
)
def test_copies_are_counted_and_not_names(
    left_out: list[str], added: dict[str, Tensor], unread: list[str], unfilled: list[str], reads_ahead: bool
) -> None:
    model = Fused(reads_ahead=reads_ahead)
    tensors = [*added.items(), *[(name, tensor) for name, tensor in WHOLE.items() if name not in left_out]]
    with LoadAccount(model, tensors) as account:
        model.load_weights(account.handed_out())
    assert (account.unread(), account.unfilled()) == (unread, unfilled)


def numbered() -> list[tuple[str, Tensor]]:
    """No two elements are alike."""
    return [
        (name, 100 * index + torch.randperm(t.numel()).view_as(t) * 1.0)
        for index, (name, t) in enumerate(WHOLE.items())
    ]


def spoil_nothing(model: Fused) -> None:
    """All as it was loaded."""


def spoil_key(model: Fused) -> None:
    model.qkv.data[3] += 1e-3


def keep_old_head(model: Fused) -> None:
    model.embedding.data = torch.zeros(8, 4)


def pad(model: Fused) -> None:
    """Another layout, which a kernel may want: there is nothing to compare."""
    model.qkv.data = torch.cat([model.qkv.data, torch.zeros(2, 4)])


def transpose(model: Fused) -> None:
    model.qkv.data = model.qkv.data.t().contiguous().t()


@pytest.mark.parametrize("reads_ahead", [False, True])
@pytest.mark.parametrize(
    ("spoil", "changed"),
    [
        (spoil_nothing, []),
        (spoil_key, ["qkv"]),
        (keep_old_head, ["embedding", "head.weight"]),
        (pad, []),
        (transpose, []),
    ],
)
def test_a_parameter_that_holds_something_else_afterwards_is_named(
    spoil: Callable[[Fused], None], changed: list[str], reads_ahead: bool
) -> None:
    model = Fused(reads_ahead=reads_ahead).to_empty(device="cpu")
    model.head.weight = model.embedding
    with LoadAccount(model, numbered()) as account:
        model.load_weights(account.handed_out())
    spoil(model)
    assert set(account.changed()) <= set(changed) and bool(account.changed()) == bool(changed)


def test_what_a_loader_computes_from_a_tensor_is_not_compared() -> None:
    """One expert's matrix is copied as it is, turned; one after a computation."""
    for reads_ahead, changed in ((True, ["experts"]), (False, [])):
        model = Fused(reads_ahead=reads_ahead).to_empty(device="cpu")
        with LoadAccount(model, numbered()) as account:
            model.load_weights(account.handed_out())
        assert account.changed() == []
        model.experts.data[1, 2, 3] += 1
        assert account.changed() == changed


class Engine:
    """A sampler, and the network that it began with."""

    def __init__(self, sampler: Sampler, policy: PreTrainedModel) -> None:
        self.sampler, self.policy = sampler, policy

    def install(self, tensors: dict[str, Tensor]) -> None:
        self.sampler._install(7, list(tensors.items()))
        self.sampler._llm.llm_engine.reset_prefix_cache()

    def error(self) -> float:
        """Largest difference to the network's own log-probs."""
        ids = random_ids(40, seed=1)
        expected = own_logprobs(self.policy, ids, temperature=1.0)[1:].numpy()
        return float(abs(expected - self.sampler.score_tokens([ids])[0]).max())


@pytest.fixture(params=list(KINDS))
def engine(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[Engine]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **COMMON, **KINDS[request.param])
    policy = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    with started_worker(tmp_path, policy, tokenizer) as worker:
        yield Engine(worker._sampler, policy)


def published(policy: PreTrainedModel) -> dict[str, Tensor]:
    return {
        saved: tensor.clone().contiguous()
        for name, held in model_tensors(policy)
        for saved, tensor in checkpoint_tensors(policy, name, held)
    }


@pytest.mark.engine
def test_every_tensor_is_read_and_every_parameter_filled_or_it_is_named(engine: Engine) -> None:
    assert engine.error() < TOLERANCE
    for tensor in (*engine.policy.parameters(), *[b for n, b in engine.policy.named_buffers() if "correction" in n]):
        tensor += 0.1 * torch.randn_like(tensor)
    tensors = published(engine.policy)
    engine.install(tensors)
    assert engine.error() < TOLERANCE, "experts, fused projections and buffers of the last version"
    for name in parts_of_fused_parameters(tensors):
        with pytest.raises(WeightMismatchError, match=r"parameters of the engine that nothing filled: [a-z]"):
            engine.install({other: tensor for other, tensor in tensors.items() if other != name})
    engine.install(tensors)
    assert engine.error() < TOLERANCE


def parts_of_fused_parameters(tensors: dict[str, Tensor]) -> list[str]:
    """The key projection, one expert's last matrix, and the router's bias, as far as the network has them."""
    wanted: list[Callable[[str], bool]] = [
        lambda name: name.endswith("1.self_attn.k_proj.weight"),
        lambda name: name.endswith(("experts.2.w2.weight", "experts.2.down_proj.weight")),
        lambda name: name.endswith("e_score_correction_bias"),
    ]
    found = [next((name for name in tensors if is_wanted(name)), None) for is_wanted in wanted]
    return [name for name in found if name is not None]


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_a_tensor_that_the_engine_skips_is_named(engine: Engine) -> None:
    """vLLM ignores biases and rotary tables that a model does not have."""
    unknown = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    with pytest.raises(WeightMismatchError, match=r"that the engine skipped: \S+rotary_emb\.inv_freq; .* filled: none"):
        engine.install(published(engine.policy) | unknown)
