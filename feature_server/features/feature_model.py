"""The frozen network behind phi: an ordinary transformers model, cut after the deepest layer that is read.

Hidden states are read where the model's own forward hands them from block to block, so no architecture is known here
by name.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.models.loading import load_decoder
from actors.models.pretrained import differing_tokens, load_tokenizer, require_same_tokenizer, resolve_model
from actors.rollout import Completions
from feature_server.config import FeatureConfig
from feature_server.features.pooling import feature_layers, pool, token_features
from feature_server.features.retokenization import retokenized
from feature_server.forward_check import check_rollout, require_rounding, separate_sequences
from feature_server.packed_forward import packed_forward, require_packable
from feature_server.packing import Windows, pack

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedModel

Features = tuple[list[Float[Tensor, "group completion feature"]], list[Float[Tensor, "group feature"]]]
"""Of completions and of ground truth, by document."""

RANDOM_WEIGHTS_SEED = 260312248
"""Unlikely to be the seed of any other network's initialisation."""

GROUPS_PER_FORWARD = 16
"""Groups of a retokenized document in one forward pass: each brings its own context."""


class DecoderConfig(Protocol):
    """Sizes that a decoder was made with."""

    model_type: str
    num_hidden_layers: int
    max_position_embeddings: int


class Decoder(Protocol):
    """What is read of a transformers model; nn.Module declares such attributes as tensors or modules."""

    config: DecoderConfig

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the token ids."""


def blocks_of(decoder: nn.Module) -> nn.ModuleList:
    """The list of the decoder's blocks, whatever its name: the outermost list with as many modules as hidden layers.

    Raises: ValueError, naming the model type, if there is none, or more than one.
    """
    config = cast(Decoder, decoder).config
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and not nested:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"model type {config.model_type!r} has {len(found)} lists of {config.num_hidden_layers} modules "
            f"(num_hidden_layers): {', '.join(found) or 'none'}; its blocks are not known, so choose another feature "
            "model"
        )
    return next(iter(found.values()))


class HiddenStates:
    """Reads the residual stream of a decoder while it runs: 0 before its first block, i after block i."""

    def __init__(self, decoder: nn.Module, layers: Sequence[int]) -> None:
        """Blocks behind the deepest layer are dropped. Raises: ValueError as `blocks_of`."""
        self._layers = layers
        self._read: dict[int, Tensor] = {}
        blocks = blocks_of(decoder)
        del blocks[max(1, *layers) :]
        blocks[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        for index, block in enumerate(blocks, start=1):
            block.register_forward_hook(partial(self._after, index))

    def taken(self) -> list[Float[Tensor, "row token hidden"]]:
        """Those of the last forward, in the order of `layers`; none is kept."""
        read = [self._read[layer] for layer in self._layers]
        self._read.clear()
        return read

    def _before_first(self, block: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        self._keep(0, inputs[0] if inputs else named["hidden_states"])

    def _after(self, layer: int, block: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        self._keep(layer, output[0] if isinstance(output, tuple) else output)

    def _keep(self, layer: int, hidden: object) -> None:
        assert isinstance(hidden, Tensor), "blocks hand on hidden states"
        if layer in self._layers:
            self._read[layer] = hidden


def frozen_network(model: str, *, attention: str, dtype: str, random_weights: bool) -> "PreTrainedModel":
    """The decoder of a resolved model without its head: as saved, or the same architecture with random weights.

    Weights are drawn from a seed of their own on the CPU, so all servers of all runs draw the same.
    Test: test_features.py::test_random_weights_are_the_same_everywhere
    """
    from transformers import AutoConfig, AutoModel  # heavy (8 s)

    if not random_weights:
        return load_decoder(model, dtype=dtype, attention=attention)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        return AutoModel.from_config(
            AutoConfig.from_pretrained(model, trust_remote_code=False),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
        )


class FeatureModel:
    """Maps packed documents to features of their completions and ground truth. Never trained, never updated."""

    def __init__(
        self,
        model: str,
        config: FeatureConfig,
        *,
        dtype: str,
        max_tokens: int,
        policy: str | None = None,
        attention: str = "sdpa",
    ) -> None:
        """Load the network, and check that its packed forward is its own.

        `policy` names the model whose token ids are read, if that is not `model` itself. `max_tokens`: of the longest
        context and completion together.
        Raises: ValueError if their tokenizers differ and feature.foreign_tokenizer refuses that, or cannot read it;
        ValueError, naming the model type, for a model that packed rows do not fit.
        """
        start = time.perf_counter()
        from transformers import AutoConfig, AutoModel  # noqa: F401  heavy (8 s)

        imported = time.perf_counter()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._config, self._attention = config, attention
        folder = resolve_model(model)
        require_packable(AutoConfig.from_pretrained(folder, trust_remote_code=False), attention)
        network = frozen_network(folder, attention=attention, dtype=dtype, random_weights=config.random_weights)
        self._layers = feature_layers(config.depth_fracs, cast(Decoder, network).config.num_hidden_layers)
        self._hidden_states = HiddenStates(network, self._layers)
        nn.Module.to(network.eval().requires_grad_(False), self._device)
        self._model = network
        self._retokenized = None if policy is None or policy == model else self._reader(resolve_model(policy), folder)
        loaded = time.perf_counter()
        self._check(max_tokens=max_tokens, dtype=dtype)
        self.startup_s = {
            "imports": imported - start,
            "model": loaded - imported,
            "forward check": time.perf_counter() - loaded,
        }

    @torch.inference_mode()
    def _check(self, *, max_tokens: int, dtype: str) -> None:
        """What is read of packed rows against the same of separate sequences, by the network's own forward."""
        decoder = cast(Decoder, self._model)
        config, vocab_size = decoder.config, decoder.get_input_embeddings().num_embeddings
        # Longer ones are refused when they come: a document may be shorter than its limit.
        num_tokens = min(max_tokens, config.max_position_embeddings)
        completions = check_rollout(num_tokens=num_tokens, vocab_size=vocab_size)
        batch = pack([completions]).to(self._device)
        packed_forward(self._model, batch, self._attention)
        packed = token_features(
            [h[batch.completions.row, batch.completions.column] for h in self._hidden_states.taken()]
        )
        own = []
        for num_context, sequence in separate_sequences(completions):
            self._model(input_ids=sequence[None].to(self._device), use_cache=False)
            own.append(token_features([hidden[0, num_context:] for hidden in self._hidden_states.taken()]))
        errors = (packed - torch.cat(own)).norm(dim=-1)
        require_rounding(errors, model_type=config.model_type, dtype=dtype, what="features")

    @torch.inference_mode()
    def __call__(self, documents: Sequence[Completions]) -> Features:
        """Features of the completions and of the ground truth of each document, float32 on the CPU.

        Raises: ValueError if a token id or a position is beyond what the network was made for.
        """
        if self._retokenized is None:
            return self._features(documents)
        by_document = [self._features_of_groups(self._retokenized(document)) for document in documents]
        return [completions for completions, _ in by_document], [ground_truth for _, ground_truth in by_document]

    def _features(self, documents: Sequence[Completions]) -> Features:
        batch = pack(documents)
        self._require_known(largest_id=int(batch.token_ids.max()), length=1 + int(batch.positions.max()))
        batch = batch.to(self._device)
        packed_forward(self._model, batch, self._attention)
        hidden_states = self._hidden_states.taken()
        completions = self._pool(hidden_states, batch.completions).cpu()
        ground_truth = self._pool(hidden_states, batch.ground_truth).cpu()
        shapes = [document.completion_lengths.shape for document in documents]
        by_document = completions.split([groups * n for groups, n in shapes])
        return (
            [f.unflatten(0, (groups, n)) for f, (groups, n) in zip(by_document, shapes, strict=True)],
            list(ground_truth.split([groups for groups, _ in shapes])),
        )

    def _features_of_groups(
        self, groups: Sequence[Completions]
    ) -> tuple[Float[Tensor, "group completion feature"], Float[Tensor, "group feature"]]:
        """Features of the groups of one document, each with a context of its own."""
        completions: list[Tensor] = []
        ground_truth: list[Tensor] = []
        for first in range(0, len(groups), GROUPS_PER_FORWARD):
            some = groups[first : first + GROUPS_PER_FORWARD]
            features = self._features(some)
            completions += [_merged(f, group) for f, group in zip(features[0], some, strict=True)]
            ground_truth += features[1]
        return torch.cat(completions), torch.cat(ground_truth)

    def _reader(self, policy: str, model: str) -> Callable[[Completions], list[Completions]] | None:
        """What turns completions of the policy into the model's own tokens; None: it reads the policy's ids."""
        if self._config.foreign_tokenizer == "reuse_ids":
            vocabulary = load_tokenizer(policy).get_vocab()
            self._require_known(largest_id=max(vocabulary.values()), length=1)
            return None
        if self._config.foreign_tokenizer == "refuse":
            require_same_tokenizer(policy, model)
            return None
        if not differing_tokens(policy, model):
            return None
        return partial(
            retokenized,
            policy_tokenizer=load_tokenizer(policy),
            feature_tokenizer=load_tokenizer(model),
        )

    def _require_known(self, *, largest_id: int, length: int) -> None:
        decoder = cast(Decoder, self._model)
        vocab_size, limit = decoder.get_input_embeddings().num_embeddings, decoder.config.max_position_embeddings
        if largest_id >= vocab_size:
            raise ValueError(
                f"token id {largest_id} of the policy is outside of the feature model's vocabulary of {vocab_size} "
                "tokens; set feature.foreign_tokenizer='retokenize', or choose a feature model of the policy's family"
            )
        if length > limit:
            raise ValueError(
                f"context and completion take {length} tokens of the feature model, which was made for {limit} "
                "(max_position_embeddings); lower data.document_tokens, or choose a feature model for longer texts"
            )

    def _pool(self, hidden_states: list[Tensor], windows: Windows) -> Float[Tensor, "window feature"]:
        tokens = [hidden[windows.row, windows.column] for hidden in hidden_states]
        return pool(token_features(tokens), windows.window, windows.num_windows, pooling=self._config.pooling)


def _merged(
    features: Float[Tensor, "group completion feature"], group: Completions
) -> Float[Tensor, "group completion feature"]:
    """Completions of one group with the same tokens share the first one's feature, to the last bit.

    The server merges by the policy's ids, and different ids may have been the same text.
    """
    ids, lengths = group.completion_ids[0], group.completion_lengths[0]
    tokens = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    return features[:, [tokens.index(one) for one in tokens]]
