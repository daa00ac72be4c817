"""One packed forward pass equals one forward pass for each sequence: values, gradients, and visibility."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.rollout import Document, Rollout
from feature_server import packed_forward as packed_forward_module
from feature_server.forward_check import check_rollout, separate_sequences
from feature_server.packed_forward import require_packable
from feature_server.packing import PackedBatch, dense_mask, pack
from learner.logprobs import token_logprobs
from learner.policy import PackedPolicy, causal_logprobs, check_policy

TEMPERATURE = 0.7
TOLERANCE = {"rtol": 0, "atol": 1e-5}
ARCHITECTURES = [(kind, tied) for kind in ("llama", "qwen2", "gpt2") for tied in (False, True)]

Outputs = tuple[Tensor, Tensor]


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout], texts: Rollout) -> list[Rollout | Document]:
    """Pieces of 36, 15, 8 and 29 tokens in rows {0}, {1, 2} and {3}: shared prefixes and variable lengths, a
    prompt-completion pair, a bare document, separate texts."""
    strided = make_rollout(
        num_tokens=14, anchors=[2, 6, 10], lengths=[[4, 1, 2], [3, 4, 1], [1, 2, 4]], horizon=4, seed=1
    )
    pair = make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 5]], horizon=5, seed=2, num_prompt_tokens=6)
    document = make_rollout(num_tokens=8, anchors=[3], lengths=[[2]], horizon=2, seed=3).document
    return [strided, pair, document, texts]


@pytest.fixture
def texts(make_rollout: Callable[..., Rollout]) -> Rollout:
    """Texts of 5, 1, 8 and 3 tokens; blocks in the first and two in the third. Document tokens 1-4, 7-13, 15-16 are
    predicted by their own text."""
    rollout = make_rollout(num_tokens=17, anchors=[2, 8, 11], lengths=[[3, 1], [2, 3], [1, 2]], horizon=3, seed=6)
    return replace(rollout, document=replace(rollout.document, text_starts=np.array([0, 5, 6, 14])))


@pytest.fixture
def strided(make_rollout: Callable[..., Rollout]) -> Rollout:
    """Three blocks of two completions of 3 tokens: completion k*2 + j starts in column 12 + (k*2 + j) * 3."""
    return make_rollout(num_tokens=12, anchors=[2, 5, 8], lengths=[[3, 3]] * 3, horizon=3, seed=4)


def document_of(piece: Rollout | Document) -> Document:
    return piece if isinstance(piece, Document) else piece.document


def packed_policy(model: PreTrainedModel, *, attention: str = "sdpa", logits_chunk_tokens: int = 1024) -> PackedPolicy:
    return PackedPolicy(model, attention=attention, logits_chunk_tokens=logits_chunk_tokens)


def separate_logprobs(model: PreTrainedModel, rollouts: list[Rollout | Document]) -> Outputs:
    """Every completion behind its own copy of its context, every text alone, token by token."""
    sampled, documents = [], []
    for rollout in rollouts:
        document = document_of(rollout)
        ids = document.token_ids.tolist()
        borders = [*document.text_starts.tolist(), len(ids)]
        for group, anchor in enumerate([] if rollout is document else document.anchors.tolist()):
            context = ids[max(start for start in borders if start < anchor) : anchor]
            for completion, length in zip(
                rollout.completion_ids[group], rollout.completion_lengths[group], strict=True
            ):
                sequence = context + completion[:length].tolist()
                logits = model(input_ids=torch.tensor([sequence])).logits[0]
                for position in range(len(context), len(sequence)):
                    scaled = logits[position - 1] / TEMPERATURE
                    sampled.append((scaled - torch.log(torch.exp(scaled).sum()))[sequence[position]])
        for start, end in pairwise(borders):
            text = ids[start:end]
            logits = model(input_ids=torch.tensor([text])).logits[0]
            for position in range(max(1, document.num_prompt_tokens), len(text)):
                documents.append(torch.log(torch.softmax(logits[position - 1], -1)[text[position]]))
    return torch.stack(sampled) if sampled else torch.zeros(0), torch.stack(documents)


def objective(outputs: Outputs) -> Tensor:
    """Policy gradient with an advantage for each token plus 0.3 times the cross-entropy."""
    sampled, documents = outputs
    advantages = torch.linspace(-2, 1.5, len(sampled))
    return -(advantages * sampled).sum() / len(sampled) - 0.3 * documents.sum() / len(documents)


def gradients(model: PreTrainedModel, outputs: Outputs) -> list[Tensor]:
    return list(torch.autograd.grad(objective(outputs), list(model.parameters())))


@torch.no_grad()
def sampled_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return packed_policy(model)(batch, TEMPERATURE)[0]


@pytest.mark.parametrize(("kind", "tied"), ARCHITECTURES)
def test_packed_equals_separate_sequences(
    kind: str, tied: bool, make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model = make_causal_lm(kind, tied=tied)
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters()) == (kind == "qwen2")
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)
    packed = packed_policy(model)(pack(rollouts), TEMPERATURE)
    separate = separate_logprobs(model, rollouts)
    assert [len(part) for part in packed] == [22 + 6 + 12, 13 + 3 + 7 + 13]
    for found, expected in zip(packed, separate, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **TOLERANCE)
    for found, expected in zip(gradients(model, packed), gradients(model, separate), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_ids_beyond_the_tokenizer_have_no_probability(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    """As if the head had no rows for them; the network has 80, the tokenizer 64."""
    model = make_causal_lm("llama", vocab_size=80)
    cut = copy.deepcopy(model)
    cut.lm_head.weight = nn.Parameter(model.lm_head.weight[:64].detach())
    policy = PackedPolicy(model, attention="sdpa", num_token_ids=64)
    for found, expected in zip(policy(pack(rollouts), TEMPERATURE), separate_logprobs(cut, rollouts), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    padded = packed_policy(model)(pack(rollouts), TEMPERATURE)
    assert all(
        (whole - part).abs().mean() > 0.1
        for whole, part in zip(padded, policy(pack(rollouts), TEMPERATURE), strict=True)
    )
    texts = torch.arange(1, 25).reshape(2, 12)
    expected = causal_logprobs(packed_policy(cut), texts)
    torch.testing.assert_close(causal_logprobs(policy, texts), expected, **TOLERANCE)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        "cohere",  # logits scaled behind the head
        "gemma2: no cap in attention",  # logits capped; a window in every other layer
        "gpt2",  # dropout in modules
        "gpt_neox",
        "granite",  # logits scaled behind the head
        "llama",  # dropout inside attention
        "llama4_text",  # attention within chunks
        "mistral",  # a window in every layer
        "mixtral",  # noise in the router
        "opt",  # dropout in functions, whole layers left out; the head reads the decoder inside the base model
        "qwen2",  # a window in some layers
        "starcoder2",
    ],
)
def test_every_architecture_computes_in_training_what_it_computes_alone(
    architecture: str,
    checkpointed: bool,
    make_architecture: Callable[[str], PreTrainedModel],
    rollouts: list[Rollout | Document],
) -> None:
    """Windows of 5 tokens, and contexts of up to 10; dropout in the configuration is for training by others."""
    model = make_architecture(architecture)
    separate = separate_logprobs(model.eval(), rollouts)
    policy = packed_policy(model, logits_chunk_tokens=7)
    if checkpointed:
        policy.checkpoint_gradients()
    packed = policy.train()(pack(rollouts), TEMPERATURE)
    for found, expected in zip(packed, separate, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    scale = max(float(gradient.abs().max()) for gradient in gradients(model, separate_logprobs(model, rollouts)))
    for found, expected in zip(gradients(model, packed), gradients(model, separate), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, scale))


def test_logits_never_stand_whole(
    make_architecture: Callable[[str], PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model = make_architecture("granite")
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))
    packed_policy(model, logits_chunk_tokens=7)(pack(rollouts), TEMPERATURE)
    assert max(sizes) == 7 and sum(sizes) == 40 + 36


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "'mamba' carries a state .*attention alone"),
        ("rwkv", r"'rwkv' carries a state .*\(RwkvModel\)"),
        ("jamba", r"'jamba' carries a state .*\(linear_attention\)"),
        ("qwen3_next", "'qwen3_next' carries a state"),
        ("recurrent_gemma", "'recurrent_gemma' carries a state"),
        ("bloom", "'bloom' takes no position_ids"),
        ("gpt_neo", "'gpt_neo' does not support model.attention='sdpa'"),
    ],
)
def test_models_that_no_mask_can_pack_are_refused_by_type(model_type: str, message: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(ValueError, match=message):
        require_packable(AutoConfig.for_model(model_type), "sdpa")


def test_a_cap_of_attention_scores_is_refused_where_the_kernel_leaves_it_out() -> None:
    """The own forward of transformers leaves it out as well, so no comparison with that would show it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma2")
    with pytest.raises(ValueError, match=r"'gemma2' caps .*=50\.0\), which .* set model.attention='flex_attention'"):
        require_packable(config, "sdpa")
    require_packable(config, "flex_attention")
    config.attn_logit_softcapping = None
    require_packable(config, "sdpa")


def falcon_with_alibi() -> PreTrainedModel:
    """Its attention is biased by the distance of columns."""
    from transformers import AutoModelForCausalLM, FalconConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = FalconConfig(alibi=True, initializer_range=0.2, bos_token_id=0, eos_token_id=0, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()


def check(policy: PackedPolicy) -> None:
    check_policy(policy, num_tokens=40, temperature=TEMPERATURE, dtype="float32", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "architecture", ["gemma2: no cap in attention", "gpt2", "granite", "llama4_text", "mistral", "mixtral", "opt"]
)
def test_a_model_whose_packed_forward_is_its_own_passes_the_check(
    architecture: str, make_architecture: Callable[[str], PreTrainedModel]
) -> None:
    check(packed_policy(make_architecture(architecture)).train())


def test_a_model_whose_packed_forward_is_another_is_refused(
    make_architecture: Callable[[str], PreTrainedModel],
) -> None:
    with pytest.raises(ValueError, match=r"'falcon': log-probs .* by 0\.\d+ on average, and rounding in float32"):
        check(packed_policy(falcon_with_alibi()))
    noisy = packed_policy(make_architecture("gpt2"))
    noisy.causal_lm.transformer.drop.train()
    with pytest.raises(ValueError, match="'gpt2': log-probs"):
        check(noisy)


def test_the_check_sees_a_window_that_packing_leaves_out(
    make_architecture: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_windows(batch: PackedBatch, attention: str, *, within: object) -> object:
        return dense_mask(batch)

    policy = packed_policy(make_architecture("qwen2"))
    monkeypatch.setattr(packed_forward_module, "attention_mask", without_windows)
    with pytest.raises(ValueError, match="'qwen2': log-probs"):
        check(policy)


@pytest.mark.parametrize("num_tokens", [2, 8, 40, 300])
def test_the_check_goes_up_to_the_longest_sequence(num_tokens: int) -> None:
    completions = check_rollout(num_tokens=num_tokens, vocab_size=64)
    sequences = separate_sequences(completions)
    assert max(len(sequence) for _, sequence in sequences) == num_tokens
    assert 1 + int(pack([completions]).positions.max()) == num_tokens
    assert completions.document.context_starts.tolist()[1:] == [completions.document.text_starts[1]] * 2


def test_a_model_that_asks_for_no_mask_is_refused(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    with pytest.raises(ValueError, match=r"'llama' makes attention masks by code of its own"):
        packed_policy(make_causal_lm("llama"))(pack(rollouts), TEMPERATURE)


def test_a_packed_forward_leaves_the_models_own_masks_alone(
    make_architecture: Callable[[str], PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model, ids = make_architecture("mistral").eval(), torch.arange(1, 15)[None]
    before = model(input_ids=ids).logits
    packed_policy(model)(pack(rollouts), TEMPERATURE)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_packed_documents_equal_the_models_own_causal_forward(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model = make_causal_lm("qwen2", tied=True)
    policy = packed_policy(model)
    for document in map(document_of, rollouts[:3]):
        first = max(1, document.num_prompt_tokens)
        sampled, packed = policy(pack([document]), TEMPERATURE)
        (own,) = causal_logprobs(policy, torch.from_numpy(document.token_ids)[None])
        assert len(sampled) == 0
        torch.testing.assert_close(packed, own[first - 1 :], **TOLERANCE)


def test_what_fills_a_row_changes_no_logprob_of_the_text_before_it(
    make_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    policy = packed_policy(make_causal_lm("llama", tied=True))
    texts = torch.arange(1, 25).reshape(2, 12)
    (alone,) = causal_logprobs(policy, texts[1:, :7])
    filled = texts.clone()
    filled[1, 7:] = 0
    torch.testing.assert_close(causal_logprobs(policy, filled)[1, :6], alone, **TOLERANCE)


def test_gradient_checkpointing_changes_no_gradient(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model = make_causal_lm("llama").train()
    plain = gradients(model, packed_policy(model)(pack(rollouts), TEMPERATURE))
    policy = packed_policy(model)
    policy.checkpoint_gradients()
    forwards = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: forwards.append(1))
    recomputed = gradients(model, policy.train()(pack(rollouts), TEMPERATURE))
    assert len(forwards) == 2
    gradients(model, policy.eval()(pack(rollouts), TEMPERATURE))
    assert len(forwards) == 3
    gradients(model, policy.train()(pack(rollouts), TEMPERATURE))
    assert len(forwards) == 5
    for found, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10**6])
def test_chunking_the_logits_changes_nothing(
    chunk_tokens: int, make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model, batch = make_causal_lm("llama", tied=True), pack(rollouts)
    chunked = packed_policy(model, logits_chunk_tokens=chunk_tokens)(batch, TEMPERATURE)
    whole = packed_policy(model)(batch, TEMPERATURE)
    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for found, expected in zip(gradients(model, chunked), gradients(model, whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 2, 9])
def test_the_head_is_called_for_each_chunk_an_empty_one_too(num_tokens: int) -> None:
    """In the forward pass and again in the backward pass, as all ranks must at ZeRO-3."""
    head, calls = torch.nn.Linear(3, 7), []
    head.register_forward_hook(lambda *_: calls.append(1))
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 3, generator=draw, requires_grad=True)
    target = torch.randint(7, (num_tokens,), generator=draw)
    found = token_logprobs(hidden, target, head=head, temperature=TEMPERATURE, num_chunks=4)
    assert len(calls) == 4
    gradient = torch.autograd.grad(found.sum(), [hidden, head.weight])
    assert len(calls) == 8
    whole = (head(hidden) / TEMPERATURE).log_softmax(-1)[torch.arange(num_tokens), target]
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), [hidden, head.weight]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_dense_masks(
    make_causal_lm: Callable[..., PreTrainedModel],
    rollouts: list[Rollout | Document],
    unchecked_packing: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = make_causal_lm("llama"), pack(rollouts)
    with torch.no_grad():
        dense = packed_policy(model)(batch, TEMPERATURE)
        model.set_attn_implementation("flex_attention")
        monkeypatch.setattr(packed_forward_module, "attention_mask", unchecked_packing.attention_mask)
        with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes seconds
            flex = packed_policy(model, attention="flex_attention")(batch, TEMPERATURE)
    for found, expected in zip(flex, dense, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_changed_completion_changes_its_own_later_tokens_only(
    kind: str, block: int, make_causal_lm: Callable[..., PreTrainedModel], strided: Rollout
) -> None:
    policy = packed_policy(make_causal_lm(kind))
    changed_ids = strided.completion_ids.copy()
    changed_ids[block, 1, 1] = (changed_ids[block, 1, 1] + 7) % 64  # its token of step 1
    with torch.no_grad():
        before, document_before = policy(pack([strided]), TEMPERATURE)
        after, document_after = policy(pack([replace(strided, completion_ids=changed_ids)]), TEMPERATURE)
    steps_changed = (before != after).reshape(3, 2, 3)
    expected = torch.zeros(3, 2, 3, dtype=torch.bool)
    expected[block, 1, 1:] = True  # step 1 is another target, step 2 sees another past
    assert torch.equal(steps_changed, expected)
    assert torch.equal(document_before, document_after)


@pytest.mark.parametrize("position", range(12))
def test_a_changed_document_token_changes_the_blocks_behind_it_only(
    position: int, make_causal_lm: Callable[..., PreTrainedModel], strided: Rollout
) -> None:
    model = make_causal_lm("qwen2")
    changed = with_other_token(strided, position)
    before, after = (sampled_logprobs(model, pack([r])).reshape(3, 6) for r in (strided, changed))
    for block, anchor in enumerate([2, 5, 8]):
        if position < anchor:
            assert (before[block] != after[block]).all()
        else:
            assert torch.equal(before[block], after[block])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("position", range(17))
def test_a_changed_token_changes_its_own_text_only(
    kind: str, position: int, make_causal_lm: Callable[..., PreTrainedModel], texts: Rollout
) -> None:
    """Tokens that are predicted from here on in the text, and the blocks behind the token in it."""
    policy = packed_policy(make_causal_lm(kind))
    with torch.no_grad():
        before, after = (policy(pack([r]), TEMPERATURE) for r in (texts, with_other_token(texts, position)))
    (text,) = [span for span in (range(5), range(5, 6), range(6, 14), range(14, 17)) if position in span]
    predicted = [*range(1, 5), *range(7, 14), *range(15, 17)]
    assert (before[1] != after[1]).tolist() == [p in text and p >= position for p in predicted]
    anchors = [2] * 4 + [8] * 5 + [11] * 3  # of each sampled token
    assert (before[0] != after[0]).tolist() == [anchor in text and position < anchor for anchor in anchors]


@pytest.mark.parametrize("changed_one", [0, 1])
def test_a_changed_rollout_changes_nothing_in_its_row(
    changed_one: int, make_causal_lm: Callable[..., PreTrainedModel], make_rollout: Callable[..., Rollout]
) -> None:
    """Its prompt, the rest of its document and its completions, all at once."""
    sizes = {"num_tokens": 6, "anchors": [4], "lengths": [[1, 3, 2]], "horizon": 3}
    pairs = [make_rollout(seed=seed, num_prompt_tokens=4, **sizes) for seed in (1, 2)]
    long = make_rollout(num_tokens=20, anchors=[8, 12], lengths=[[2], [2]], horizon=2)
    other = make_rollout(seed=3, num_prompt_tokens=4, **sizes)
    others = [other if index == changed_one else pair for index, pair in enumerate(pairs)]
    batch = pack([long, *pairs])
    assert batch.token_ids.shape == (2, 24) and batch.completions.row.unique().tolist() == [0, 1]
    policy = packed_policy(make_causal_lm("gpt2"))
    with torch.no_grad():
        before, after = policy(batch, TEMPERATURE), policy(pack([long, *others]), TEMPERATURE)
    for num_tokens, old, new in zip(([4, 6, 6], [19, 2, 2]), before, after, strict=True):
        changed = (old != new).split(num_tokens)  # of the long one and of the two pairs
        assert [bool(part.any()) for part in changed] == [False, changed_one == 0, changed_one == 1]
        assert changed[1 + changed_one].all()


def test_what_padding_holds_changes_nothing(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    model, batch = make_causal_lm("llama"), pack(rollouts)
    padding = torch.arange(36) >= torch.tensor([[36], [15 + 8], [29]])
    assert batch.token_ids.shape == padding.shape
    other = replace(
        batch,
        token_ids=torch.where(padding, 17, batch.token_ids),
        positions=torch.where(padding, 5, batch.positions),
    )
    assert not torch.equal(batch.token_ids, other.token_ids)
    assert torch.equal(sampled_logprobs(model, batch), sampled_logprobs(model, other))
    alone = torch.cat([sampled_logprobs(model, pack([rollout])) for rollout in rollouts])
    torch.testing.assert_close(sampled_logprobs(model, batch), alone, **TOLERANCE)


def test_temperature_divides_the_logits_of_sampled_tokens_only(
    make_causal_lm: Callable[..., PreTrainedModel], rollouts: list[Rollout | Document]
) -> None:
    policy = packed_policy(make_causal_lm("llama"))
    with torch.no_grad():
        cold, warm = policy(pack(rollouts), TEMPERATURE), policy(pack(rollouts), 1.0)
    assert torch.equal(cold[1], warm[1])
    assert (cold[0] != warm[0]).all()


def test_control_a_plain_causal_mask_leaks(
    make_causal_lm: Callable[..., PreTrainedModel], strided: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the mask of an ordinary sequence a block sees the document behind its anchor and its siblings."""
    model = make_causal_lm("llama")
    separate, _ = separate_logprobs(model, [strided])
    monkeypatch.setattr(packed_forward_module, "attention_mask", causal_mask)
    leaky = sampled_logprobs(model, pack([strided]))
    error = (leaky - separate).abs().reshape(6, 3)
    assert (error[:, 0] < 1e-5).all()  # predicted by rows of the document, where causal is right
    assert (error[:, 1:] > 1e-3).all()
    changed_ids = strided.completion_ids.copy()
    changed_ids[0, 0, 1] = (changed_ids[0, 0, 1] + 7) % 64
    after = sampled_logprobs(model, pack([replace(strided, completion_ids=changed_ids)]))
    assert (after[6:] != leaky[6:]).any()


def test_control_the_neighbor_in_memory_is_a_wrong_predictor(
    make_causal_lm: Callable[..., PreTrainedModel], strided: Rollout
) -> None:
    """ "Row i predicts row i+1" reads the first token of a completion from the completion before it."""
    model, batch = make_causal_lm("llama"), pack([strided])
    predictions = batch.completion_tokens
    neighbor = batch.completions.column - 1
    shifted = replace(batch, completion_tokens=replace(predictions, predictor=neighbor))
    separate, _ = separate_logprobs(model, [strided])
    error = (sampled_logprobs(model, shifted) - separate).abs().reshape(6, 3)
    assert (error[:, 0] > 1e-3).all()
    assert (error[:, 1:] < 1e-5).all()


def test_control_without_texts_blocks_see_what_stands_before_their_text(
    make_causal_lm: Callable[..., PreTrainedModel], texts: Rollout
) -> None:
    """The same row as one text: only the blocks of the first text stay what they are."""
    model = make_causal_lm("llama")
    separate, _ = separate_logprobs(model, [texts])
    one_text = replace(texts, document=replace(texts.document, text_starts=np.array([0])))
    error = (sampled_logprobs(model, pack([one_text])) - separate).abs()
    assert (error[:4] < 1e-5).all()
    assert (error[4:] > 1e-4).all()


def with_other_token(rollout: Rollout, position: int) -> Rollout:
    token_ids = rollout.document.token_ids.copy()
    token_ids[position] = (token_ids[position] + 7) % 64
    return replace(rollout, document=replace(rollout.document, token_ids=token_ids))


def causal_mask(batch: PackedBatch, attention: str, *, within: object) -> Tensor:
    rows, length = batch.token_ids.shape
    return torch.from_numpy(np.tri(length, dtype=bool)).expand(rows, 1, length, length)
