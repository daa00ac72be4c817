"""Features against the whole network on separate sequences, and the statistics made of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, PreTrainedModel, PreTrainedTokenizerFast

from actors.rollout import Rollout
from feature_server import packed_forward as packed_forward_module
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import FeatureModel, HiddenStates, blocks_of
from feature_server.features.gram import GramStatistics
from feature_server.features.pooling import feature_layers
from feature_server.features.server import FeatureServer
from feature_server.packing import PackedBatch, pack
from learner.objective.reward import cfm_plug_in
from learner.objective.whitening import unwhitened

NUM_LAYERS = 5
LAYERS = [1, 2, 3]  # floor of 1.25, 2.5 and 3.75
TOLERANCE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    make_causal_lm: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    folders = {}
    for kind in ("llama", "qwen2", "gpt2"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        make_causal_lm(kind, num_layers=NUM_LAYERS).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    """Variable lengths, and ground truth that the document's end cuts to 2 tokens."""
    strided = make_rollout(
        num_tokens=12, anchors=[2, 5, 10], lengths=[[4, 1, 2], [3, 4, 1], [1, 2, 4]], horizon=4, seed=1
    )
    pair = make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 5, 3]], horizon=5, seed=2, num_prompt_tokens=6)
    other = make_rollout(num_tokens=10, anchors=[3, 6], lengths=[[2, 2, 2], [2, 1, 2]], horizon=2, seed=3)
    return [strided, pair, other]


@pytest.fixture
def row_mates(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    """Pieces of 13, 29 and 11 tokens, the short ones in one row; the long one is a row of three texts."""
    texts = make_rollout(num_tokens=17, anchors=[2, 8, 11], lengths=[[3, 1], [2, 3], [1, 2]], horizon=3, seed=6)
    texts = replace(texts, document=replace(texts.document, text_starts=np.array([0, 5, 14])))
    short = make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 3]], horizon=5, seed=7, num_prompt_tokens=6)
    shorter = make_rollout(num_tokens=7, anchors=[3], lengths=[[2, 2]], horizon=2, seed=8)
    assert pack([short, texts, shorter]).token_ids.shape == (2, 29)
    return [short, texts, shorter]


def residual_streams(model: PreTrainedModel, token_ids: list[int]) -> list[Tensor]:
    """[T, hidden] before the first block and after each block of the whole network, by hooks."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    streams: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        streams.append(inputs[0][0])

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        streams.append(hidden[0])

    hooks = [blocks[0].register_forward_pre_hook(before)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        model(input_ids=torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    assert len(streams) == len(blocks) + 1
    return streams


def slow_feature(
    model: PreTrainedModel, context: list[int], continuation: list[int], config: FeatureConfig, layers: list[int]
) -> Tensor:
    """phi(context : continuation) from a sequence of its own."""
    streams = residual_streams(model, context + continuation)
    tokens = []
    for position in range(len(context), len(context) + len(continuation)):
        joined = torch.cat([streams[layer][position] for layer in layers])
        tokens.append(joined / math.sqrt(sum(float(value) ** 2 for value in joined)))
    return tokens[-1] if config.pooling == "last" else sum(tokens) / len(tokens)


def slow_features(
    model: PreTrainedModel, rollout: Rollout, config: FeatureConfig, layers: list[int]
) -> tuple[Tensor, Tensor]:
    document, completions, ground_truth = rollout.document, [], []
    ids = document.token_ids.tolist()
    for group, anchor in enumerate(document.anchors.tolist()):
        context = ids[max(start for start in document.text_starts.tolist() if start < anchor) : anchor]
        continuations = [
            token_ids[:length].tolist()
            for token_ids, length in zip(rollout.completion_ids[group], rollout.completion_lengths[group], strict=True)
        ]
        features = [slow_feature(model, context, c, config, layers) for c in continuations]
        completions.append(torch.stack(features))
        target = ids[anchor : anchor + document.horizon]
        ground_truth.append(slow_feature(model, context, target, config, layers))
    return torch.stack(completions), torch.stack(ground_truth)


def slow_statistics(completions: Tensor, ground_truth: Tensor) -> GramStatistics:
    """Inner products one by one."""
    groups, n, _ = completions.shape
    gram = torch.zeros(groups, n, n, dtype=torch.float64)
    products = torch.zeros(groups, n, dtype=torch.float64)
    for group in range(groups):
        for j in range(n):
            products[group, j] = (completions[group, j].double() * ground_truth[group].double()).sum()
            for k in range(n):
                gram[group, j, k] = (completions[group, j].double() * completions[group, k].double()).sum()
    norms = torch.tensor([float(vector.double().norm()) ** 2 for vector in ground_truth], dtype=torch.float64)
    return GramStatistics(gram=gram, ground_truth_products=products, ground_truth_norm_sq=norms)


def assert_statistics_close(found: GramStatistics, expected: GramStatistics, *, atol: float) -> None:
    for name in ("gram", "ground_truth_products", "ground_truth_norm_sq"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=atol)


def assert_statistics_equal(found: GramStatistics, expected: GramStatistics) -> None:
    assert_statistics_close(found, expected, atol=0)


def whole_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def server(folder: Path, **settings: object) -> FeatureServer:
    return FeatureServer(model=str(folder), config=FeatureConfig(**settings), dtype="float32", max_tokens=64)


def ground_truth_as_completions(rollout: Rollout) -> Rollout:
    """Two completions per group, both the ground truth (which the document's end may have cut)."""
    document = rollout.document
    ids = np.zeros((len(document.anchors), 2, document.horizon), dtype=np.int64)
    lengths = np.zeros(ids.shape[:2], dtype=np.int64)
    for group, anchor in enumerate(document.anchors.tolist()):
        target = document.token_ids[anchor : anchor + document.horizon]
        ids[group, :, : len(target)] = target
        lengths[group] = len(target)
    logprobs = np.full(ids.shape, -1, dtype=np.float32)
    return replace(
        rollout,
        completion_ids=ids,
        completion_lengths=lengths,
        behavior_logprobs=logprobs,
        token_versions=np.zeros_like(ids),
    )


def test_feature_layers_of_the_paper() -> None:
    assert feature_layers((0.25, 0.5, 0.75), 28) == [7, 14, 21]  # Qwen2.5-1.5B
    assert feature_layers((0.25, 0.5, 0.75), NUM_LAYERS) == LAYERS


def test_a_feature_layer_is_never_the_embedding() -> None:
    assert feature_layers((0.0, 0.99), 30) == [1, 29]
    assert feature_layers((0.25, 0.5, 0.75), 2) == [1, 1, 1]


def test_a_feature_layer_is_the_floor_of_the_exact_product() -> None:
    for num_layers in range(1, 201):
        for numerator, denominator in [(percent, 100) for percent in range(100)] + [(1, 3), (2, 3), (1, 7)]:
            exact = numerator * num_layers // denominator
            assert feature_layers((numerator / denominator,), num_layers) == [max(1, exact)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_equal_those_of_separate_sequences(
    kind: str, pooling: str, folders: dict[str, Path], rollouts: list[Rollout], row_mates: list[Rollout]
) -> None:
    config = FeatureConfig(pooling=pooling)
    model = whole_model(folders[kind])
    network = FeatureModel(str(folders[kind]), config, dtype="float32", max_tokens=64)
    together = [network(batch) for batch in (rollouts, row_mates)]
    found = [completions + more for completions, more in zip(*together, strict=True)]
    for rollout, completions, ground_truth in zip(rollouts + row_mates, *found, strict=True):
        expected_completions, expected_ground_truth = slow_features(model, rollout, config, LAYERS)
        assert completions.shape == (*rollout.completion_lengths.shape, len(LAYERS) * 32)
        torch.testing.assert_close(completions, expected_completions, **TOLERANCE)
        torch.testing.assert_close(ground_truth, expected_ground_truth, **TOLERANCE)
    off_by_one = slow_features(model, rollouts[0], config, [layer + 1 for layer in LAYERS])
    assert (off_by_one[0] - found[0][0]).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("rollout", "position", "changed"),
    [
        (0, 3, [(0, 0)]),
        (0, 7, [(0, 0)]),
        (1, 3, [(1, 0)]),
        (1, 6, [(1, 1), (1, 2)]),
        (1, 12, [(1, 2)]),
        (1, 15, []),
        (2, 0, [(2, 0)]),
    ],
)
def test_a_changed_token_changes_the_groups_that_see_it_only(
    kind: str,
    rollout: int,
    position: int,
    changed: list[tuple[int, int]],
    folders: dict[str, Path],
    row_mates: list[Rollout],
) -> None:
    """`changed` lists (rollout, group); at or behind the anchor it is the ground truth alone that changes."""
    network = FeatureModel(str(folders[kind]), FeatureConfig(), dtype="float32", max_tokens=64)
    before = network(row_mates)
    document = row_mates[rollout].document
    token_ids = document.token_ids.copy()
    token_ids[position] = (token_ids[position] + 7) % 64
    others = list(row_mates)
    others[rollout] = replace(others[rollout], document=replace(document, token_ids=token_ids))
    after = network(others)
    for index, parts in enumerate(zip(*before, *after, strict=True)):
        for group in range(len(parts[0])):
            anchor = int(row_mates[index].document.anchors[group])
            unequal = [not torch.equal(old[group], new[group]) for old, new in zip(parts[:2], parts[2:], strict=True)]
            touched = (index, group) in changed
            assert unequal == [touched and position < anchor, touched], f"rollout {index}, group {group}"


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_changed_completion_changes_its_own_feature_only(
    group: int, folders: dict[str, Path], row_mates: list[Rollout]
) -> None:
    network = FeatureModel(str(folders["qwen2"]), FeatureConfig(), dtype="float32", max_tokens=64)
    before, truth_before = network(row_mates)
    ids = row_mates[1].completion_ids.copy()
    ids[group, 1, 0] = (ids[group, 1, 0] + 7) % 64
    after, truth_after = network([row_mates[0], replace(row_mates[1], completion_ids=ids), row_mates[2]])
    unequal = [(old != new).any(-1).tolist() for old, new in zip(before, after, strict=True)]
    assert unequal == [[[False] * 2], [[False, index == group] for index in range(3)], [[False] * 2]]
    assert all(torch.equal(old, new) for old, new in zip(truth_before, truth_after, strict=True))


def test_control_a_plain_causal_mask_gives_other_features(
    folders: dict[str, Path], row_mates: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    def causal(batch: PackedBatch, attention: str, *, within: object) -> Tensor:
        rows, length = batch.token_ids.shape
        return torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    network = FeatureModel(str(folders["llama"]), FeatureConfig(), dtype="float32", max_tokens=64)
    exact, truth = network(row_mates)
    monkeypatch.setattr(packed_forward_module, "attention_mask", causal)
    leaky, leaky_truth = network(row_mates)
    assert all(((a - b).norm(dim=-1) > 1e-3).all() for a, b in zip(exact, leaky, strict=True))
    # Ground truth stands in its document, where causal is right unless a text or a rollout stands before it.
    errors = [(a - b).norm(dim=-1) for a, b in zip(truth, leaky_truth, strict=True)]
    assert (errors[0] < 1e-5).all() and (errors[1] > 1e-3).tolist() == [False, True, True] and errors[2] > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("fracs", "layers"), [((0.0,), [1]), ((0.0, 0.4), [1, 2]), ((0.9,), [4])])
def test_the_first_layer_is_behind_a_block_and_the_deepest_has_no_final_norm(
    kind: str, fracs: tuple[float, ...], layers: list[int], folders: dict[str, Path], rollouts: list[Rollout]
) -> None:
    config = FeatureConfig(depth_fracs=fracs)
    found, _ = FeatureModel(str(folders[kind]), config, dtype="float32", max_tokens=64)(rollouts[:1])
    expected, _ = slow_features(whole_model(folders[kind]), rollouts[0], config, layers)
    torch.testing.assert_close(found[0], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_ground_truth_fed_as_the_rollout_matches_itself(
    kind: str, pooling: str, folders: dict[str, Path], rollouts: list[Rollout]
) -> None:
    echoes = [ground_truth_as_completions(rollout) for rollout in rollouts]
    for scored in server(folders[kind], pooling=pooling).score(echoes):
        cosine = unwhitened(scored.raw, alignment="cosine").alignment
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)
        loss = cfm_plug_in(scored.raw)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_random_weights_are_the_same_everywhere(kind: str, folders: dict[str, Path], rollouts: list[Rollout]) -> None:
    config = FeatureConfig(random_weights=True)
    networks = []
    for seed in (1, 2):  # whatever was drawn before
        torch.manual_seed(seed)
        networks.append(FeatureModel(str(folders[kind]), config, dtype="float32", max_tokens=64))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), state)  # nor does it change what is drawn next
    first, second = (network(rollouts)[0] for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loaded = FeatureModel(str(folders[kind]), FeatureConfig(), dtype="float32", max_tokens=64)
    drawn, saved = (dict(network._model.named_parameters()) for network in (networks[0], loaded))
    assert {name: p.shape for name, p in drawn.items()} == {name: p.shape for name, p in saved.items()}
    matrices = [name for name, parameter in saved.items() if parameter.dim() == 2]
    for name in matrices:
        assert not torch.isclose(drawn[name], saved[name]).any(dim=-1).all(), name
        assert drawn[name].std() == pytest.approx(0.2, rel=0.75), name  # initializer_range; GPT-2 scales some
    assert all(((a - b).norm(dim=-1) > 0.1).all() for a, b in zip(first, loaded(rollouts)[0], strict=True))


@pytest.mark.parametrize(
    "architecture",
    [
        "falcon",
        "gemma2: no cap in attention",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama4_text",
        "mistral",
        "opt",
        "qwen2",
        "starcoder2",
    ],
)
def test_features_of_every_architecture_equal_its_hidden_states(
    architecture: str,
    make_architecture: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    row_mates: list[Rollout],
    tmp_path: Path,
) -> None:
    """The oracle is what the untouched model returns as its hidden states; windows are 5 tokens."""
    model = make_architecture(architecture)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = FeatureModel(str(tmp_path), FeatureConfig(pooling="last"), dtype="float32", max_tokens=64)(row_mates)
    for rollout, completions, ground_truth in zip(row_mates, *found, strict=True):
        document = rollout.document
        ids = document.token_ids.tolist()
        for group, anchor in enumerate(document.anchors.tolist()):
            context = ids[max(start for start in document.text_starts.tolist() if start < anchor) : anchor]
            lengths = rollout.completion_lengths[group]
            pairs = zip(rollout.completion_ids[group], lengths, completions[group], strict=True)
            for tokens, length, feature in pairs:
                expected = last_feature(model, context + tokens[:length].tolist())
                torch.testing.assert_close(feature, expected, **TOLERANCE)
            expected = last_feature(model, context + ids[anchor : anchor + document.horizon])
            torch.testing.assert_close(ground_truth[group], expected, **TOLERANCE)


@torch.no_grad()
def last_feature(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """From the hidden states 1, 2 and 3 of 4 that the model returns, at the last token."""
    states = model.eval()(input_ids=torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    joined = torch.cat([states[layer][0, -1] for layer in (1, 2, 3)])
    return joined / joined.norm()


def test_a_feature_model_whose_packed_forward_is_another_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Falcon with ALiBi: attention biased by the distance of columns."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = FalconConfig(alibi=True, initializer_range=0.2, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'falcon': features of packed rows differ .* by 0\.\d+ on average"):
        FeatureModel(str(tmp_path), FeatureConfig(), dtype="float32", max_tokens=64)


def decoder_of(**lists: nn.Module) -> nn.Module:
    decoder = nn.Module()
    decoder.config = SimpleNamespace(model_type="unknown", num_hidden_layers=4)
    for name, module in lists.items():
        setattr(decoder, name, module)
    return decoder


def linears(number: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(number))


def test_a_decoder_without_one_list_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'unknown' has 0 lists of 4 modules .*: none; .*choose another feature"):
        blocks_of(decoder_of(layers=linears(3)))
    with pytest.raises(ValueError, match=r"has 2 lists of 4 modules .*: first, second"):
        blocks_of(decoder_of(first=linears(4), second=linears(4)))


def test_blocks_are_found_by_their_number() -> None:
    stack = nn.ModuleList(nn.ModuleDict({"experts": linears(4)}) for _ in range(4))
    inner = nn.Module()
    inner.stack = stack
    assert blocks_of(decoder_of(stack=inner, heads=linears(2))) is stack


def test_blocks_that_are_not_read_are_dropped_and_norms_stay() -> None:
    """A norm that some blocks use as well is the same module."""
    decoder = decoder_of(layers=linears(4), norm=nn.LayerNorm(2))
    kept, norm = list(decoder.layers[:3]), decoder.norm
    HiddenStates(decoder, [1, 3])
    assert list(decoder.layers) == kept and decoder.norm is norm


@pytest.mark.parametrize("micro_batch_documents", [1, 2, 3])
def test_server_statistics_equal_slow_ones(
    micro_batch_documents: int, folders: dict[str, Path], rollouts: list[Rollout]
) -> None:
    config = FeatureConfig(micro_batch_documents=micro_batch_documents)
    scored = server(folders["llama"], micro_batch_documents=micro_batch_documents).score(rollouts)
    model = whole_model(folders["llama"])
    for one, rollout in zip(scored, rollouts, strict=True):
        assert one.rollout is rollout
        assert one.whitened is None
        expected = slow_statistics(*slow_features(model, rollout, config, LAYERS))
        assert_statistics_close(one.raw, expected, atol=2e-6)
        assert one.score_s > 0


def test_equal_completions_get_exactly_equal_statistics(folders: dict[str, Path], rollouts: list[Rollout]) -> None:
    ids, lengths = rollouts[0].completion_ids.copy(), rollouts[0].completion_lengths.copy()
    assert lengths[1, 0] == 3
    ids[1, 2], lengths[1, 2] = [*ids[1, 0, :3], 5], 3  # what stands behind the third token differs
    twins = replace(rollouts[0], completion_ids=ids, completion_lengths=lengths)
    raw = server(folders["llama"]).score([twins])[0].raw
    assert raw.ground_truth_products[1, 0] == raw.ground_truth_products[1, 2] != raw.ground_truth_products[1, 1]
    assert raw.gram[1, 0, 0] == raw.gram[1, 0, 2] == raw.gram[1, 2, 2]


def test_pooled_whitening_fitted_from_rollouts(folders: dict[str, Path], rollouts: list[Rollout]) -> None:
    shrinkage = 0.1
    first = server(folders["qwen2"], whitening_shrinkage=shrinkage)
    fitted = first.fit_whitening(*(6 * rollouts))  # repetition leaves the moment as it is
    model, config = whole_model(folders["qwen2"]), FeatureConfig()
    features = [slow_features(model, rollout, config, LAYERS) for rollout in rollouts]
    rows = torch.cat([completions.flatten(0, 1) for completions, _ in features]).double()
    moment = sum(torch.outer(row, row) for row in rows) / len(rows)
    torch.testing.assert_close(fitted, moment, rtol=0, atol=1e-6)
    eigenvalues, axes = torch.linalg.eigh(moment)
    shrunk = eigenvalues.clamp(min=0) + shrinkage * float(moment.trace()) / len(moment)
    scale = 1 / math.sqrt(sum(float(v / s) for v, s in zip(eigenvalues.clamp(min=0), shrunk, strict=True)))
    expected_map = scale * axes @ torch.diag(shrunk**-0.5) @ axes.T

    second = server(folders["qwen2"], whitening_shrinkage=shrinkage)
    second.set_whitening(fitted)
    pairs = zip(first.score(rollouts), second.score(rollouts), features, strict=True)
    for one, other, (completions, ground_truth) in pairs:
        mapped = [f.double() @ expected_map for f in (completions, ground_truth)]
        assert one.whitened is not None and other.whitened is not None
        assert_statistics_close(one.whitened, slow_statistics(*mapped), atol=1e-4)
        assert_statistics_close(one.raw, slow_statistics(completions, ground_truth), atol=2e-6)
        assert_statistics_equal(one.whitened, other.whitened)
        assert_statistics_equal(one.raw, other.raw)
    squares = [s.whitened.gram.diagonal(dim1=-2, dim2=-1).flatten() for s in first.score(rollouts)]
    assert float(torch.cat(squares).mean()) == pytest.approx(1, abs=1e-5)


def test_pooled_whitening_refuses_fewer_completions_than_dimensions(
    folders: dict[str, Path], rollouts: list[Rollout]
) -> None:
    one = server(folders["qwen2"])
    with pytest.raises(ValueError, match=r"of 96 dimensions .* 3\s*documents gave 18; .*whitening_documents to 16 or"):
        one.fit_whitening(*rollouts)
    assert one.score(rollouts)[0].whitened is None


def test_a_score_does_not_depend_on_what_was_scored_before(folders: dict[str, Path], rollouts: list[Rollout]) -> None:
    fresh, used = server(folders["llama"]), server(folders["llama"])
    used.score(rollouts[::-1])
    used.score(rollouts[:1])
    for one, again in zip(fresh.score(rollouts), used.score(rollouts), strict=True):
        for name in ("gram", "ground_truth_products", "ground_truth_norm_sq"):
            assert torch.equal(getattr(one.raw, name), getattr(again.raw, name))


def test_a_broken_network_is_named_with_its_document(folders: dict[str, Path], rollouts: list[Rollout]) -> None:
    others = [r.document.token_ids for r in (rollouts[0], rollouts[2])]
    others += [r.completion_ids.flatten() for r in rollouts]
    only_there = set(rollouts[1].document.token_ids.tolist()) - set(np.concatenate(others).tolist())
    broken = server(folders["llama"])
    with torch.inference_mode():
        next(broken._model._model.parameters())[only_there.pop()] = math.nan
    with pytest.raises(ValueError, match=r"document 'document 2': .*features must be finite, got .* in group 0"):
        broken.score(rollouts)
