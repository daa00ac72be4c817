"""The frozen network behind phi: an ordinary transformers model, cut after the deepest layer that is read."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.models.loading import load_decoder
from actors.models.pretrained import differing_tokens, load_tokenizer, require_same_tokenizer, resolve_model
from actors.rollout import Completions
from feature_server.config import FeatureConfig
from feature_server.features.pooling import feature_layers, pool, token_features
from feature_server.features.retokenization import retokenized
from feature_server.packing import Windows, attention_mask, pack

Features = tuple[list[Float[Tensor, "group completion feature"]], list[Float[Tensor, "group feature"]]]
"""Of completions and of ground truth, by document."""

RANDOM_WEIGHTS_SEED = 260312248
"""Unlikely to be the seed of any other network's initialisation."""

GROUPS_PER_FORWARD = 16
"""Groups of a retokenized document in one forward pass: each brings its own context."""

BLOCK_LISTS = ("layers", "h")
FINAL_NORMS = ("norm", "ln_f")
"""Names under which Llama-like and GPT-2-like decoders keep their blocks and their last norm."""


class DecoderConfig(Protocol):
    """Sizes that a decoder was made with."""

    num_hidden_layers: int
    max_position_embeddings: int


class Decoder(Protocol):
    """What is read of a transformers model; nn.Module declares such attributes as tensors or modules."""

    config: DecoderConfig

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the token ids."""


def truncate(decoder: nn.Module, num_blocks: int) -> None:
    """Keep the first blocks only and drop the final norm, so that the last output is the bare residual stream.

    Raises: ValueError if the architecture keeps its blocks under a name unknown here.
    """
    blocks = next((name for name in BLOCK_LISTS if hasattr(decoder, name)), None)
    norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)
    if blocks is None or norm is None:
        raise ValueError(
            f"{type(decoder).__name__} has none of {BLOCK_LISTS} or none of {FINAL_NORMS}; "
            "use a Llama-, Qwen2- or GPT-2-type feature model, or add its names in "
            "feature_server/features/feature_model.py"
        )
    setattr(decoder, blocks, getattr(decoder, blocks)[:num_blocks])
    setattr(decoder, norm, nn.Identity())
    cast(Decoder, decoder).config.num_hidden_layers = num_blocks


def frozen_network(model: str, *, attention: str, dtype: str, random_weights: bool) -> nn.Module:
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
            AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype), attn_implementation=attention
        )


class FeatureModel:
    """Maps packed documents to features of their completions and ground truth. Never trained, never updated."""

    def __init__(
        self, model: str, config: FeatureConfig, *, dtype: str, policy: str | None = None, attention: str = "sdpa"
    ) -> None:
        """Load the network. `policy` names the model whose token ids are read, if that is not `model` itself.

        Raises: ValueError if their tokenizers differ and feature.foreign_tokenizer refuses that, or cannot read it.
        """
        start = time.perf_counter()
        from transformers import AutoModel  # noqa: F401  heavy (8 s)

        imported = time.perf_counter()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._config, self._attention = config, attention
        folder = resolve_model(model)
        network = frozen_network(folder, attention=attention, dtype=dtype, random_weights=config.random_weights)
        self._layers = feature_layers(config.depth_fracs, cast(Decoder, network).config.num_hidden_layers)
        truncate(network, max(1, *self._layers))
        self._model = network.eval().requires_grad_(False).to(self._device)
        self._retokenized = None if policy is None or policy == model else self._reader(resolve_model(policy), folder)
        self.startup_s = {"imports": imported - start, "model": time.perf_counter() - imported}

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
        output = self._model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=attention_mask(batch, self._attention),
            output_hidden_states=True,
            use_cache=False,
        )
        hidden_states = [output.hidden_states[layer] for layer in self._layers]
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
