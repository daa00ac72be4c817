"""What vLLM loads into every process of the engine, by name: the side of a weight update that touches the model.

It imports nothing of this project but the account beside it, so that it can be imported wherever vLLM starts a process.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from actors.engine.load_account import LoadAccount

WEIGHT_RECEIVER = "actors.engine.worker_extension.WeightReceiver"
"""Import path of the worker extension: vLLM imports it by name in every process of the engine."""

PACKED = "cpu_linear"
"""Attribute of a vLLM layer on CPU that holds its packed weight, inside a function."""


EXPERT_KERNEL = "moe_kernel"
"""Attribute of the method of a vLLM layer of experts: what computes with their weights."""


class ModelRunner(Protocol):
    """The part of vLLM's model runner that is used here."""

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place."""

    def get_model(self) -> torch.nn.Module:
        """The network, with vLLM's own layers."""


class WeightReceiver:
    """vLLM worker extension: its methods run inside each process of the engine, between two engine steps."""

    model_runner: ModelRunner
    """Of the worker that vLLM mixes this class into."""
    rearranged: frozenset[str] | None = None
    """Parameters that vLLM rearranged in the same shape after the first load, as it does with experts on CPU: what they
    hold cannot be compared. None before a load."""

    def limit_vocabulary(self, num_token_ids: int) -> int:
        """Leave the logits of ids from this one on out of every output, as if the network had no rows for them.

        vLLM cuts its own padding off in the same way, so this costs nothing, unlike a mask for each request.
        Returns the number of ids left out. Raises: RuntimeError if the model cuts its logits in no way known here.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor  # heavy, and here it is loaded already

        layers = [layer for layer in self.model_runner.get_model().modules() if isinstance(layer, LogitsProcessor)]
        if not layers:
            raise RuntimeError(
                "the engine's model has no LogitsProcessor of vLLM's, so ids beyond the tokenizer cannot be left out; "
                "use a model whose vocabulary is its tokenizer's"
            )
        num_left_out = max(0, *(layer.org_vocab_size - num_token_ids for layer in layers))
        for layer in layers:
            layer.org_vocab_size = min(layer.org_vocab_size, num_token_ids)
        return num_left_out

    def receive_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> tuple[list[str], list[str], list[str]]:
        """Replace the engine's weights in place by these named tensors.

        Returns the tensors that nothing read, the engine's own parameters that they did not fill, and those that hold
        something else than was copied into them. (The first load is judged by its probe.)

        `reload_weights` undoes and redoes vLLM's own processing of the weights (on CPU every linear layer is packed);
        loading into the processed parameters would leave the engine half updated.
        """
        model = self.model_runner.get_model()
        _discard_expert_kernels(model)
        with LoadAccount(model, tensors) as account:
            self.model_runner.reload_weights(weights_iterator=account.handed_out())
        _repack_tied_head(model)
        changed = account.changed()
        if self.rearranged is None:
            self.rearranged = frozenset(changed)
        return account.unread(), account.unfilled(), [name for name in changed if name not in self.rearranged]


def _discard_expert_kernels(model: torch.nn.Module) -> None:
    # vLLM 0.32 on CPU packs the experts of a layer when it builds their kernel, and not again for new weights: the
    # kernel would read plain rows as packed ones. Without a kernel, the reload builds it anew.
    if not _is_on_cpu(model):
        return
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, EXPERT_KERNEL, None) is not None:
            setattr(method, EXPERT_KERNEL, None)


def _is_on_cpu(model: torch.nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _repack_tied_head(model: torch.nn.Module) -> None:
    # vLLM 0.32 on CPU reloads the embedding of a tied model but keeps the head's packed copy of the old one: the logits
    # would come from old weights on top of new hidden states. It has packed the embedding as well, used only here.
    head = getattr(model, "lm_head", None)
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and _is_on_cpu(model):
        for embedding in model.modules():
            if embedding is not head and getattr(embedding, "weight", None) is head.weight:
                setattr(head, PACKED, getattr(embedding, PACKED))
