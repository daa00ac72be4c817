"""A transformers model run over packed rows: its own forward, its own windows, another mask.

The model asks transformers for its attention masks, one for each kind of its layers, by a predicate over positions:
causal, within a sliding window, within a chunk. While `packed_forward` runs, transformers makes that mask of the
packed rows instead: what the model's predicate allows between the positions of two tokens in their own sequence, and
the packing between their columns. So windows count tokens of a sequence, wherever it lies in its row, and no
architecture is known here by name.

Guarantee: a model is handed such masks or is refused; none runs under another.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feature_server.packing import MaskFunction, PackedBatch, attention_mask

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput


@dataclass(slots=True, kw_only=True)
class _Request:
    """The packed forward that runs in this thread."""

    batch: PackedBatch
    attention: str
    num_masks: int = 0


_request: ContextVar[_Request | None] = ContextVar("packed_forward", default=None)


def require_packable(config: "PreTrainedConfig", attention: str) -> None:
    """Refuse, by its configuration alone, a model that no mask can pack. `attention`: the kernel it is to run with.

    Raises: ValueError, naming the model type, if layers carry a state from token to token, if positions cannot be
    given, if attention is computed by code of the model's own, or if the kernel leaves a part of it out.
    """
    from transformers import MODEL_MAPPING

    name, base_class = f"model type {config.model_type!r}", MODEL_MAPPING.get(type(config), None)
    if not isinstance(base_class, type):
        raise ValueError(f"{name} has no base model, or several, in transformers; choose another model")
    stateful = sorted(_recurrent_layer_types() & set(getattr(config, "layer_types", None) or ()))
    if base_class._is_stateful or stateful:
        raise ValueError(
            f"{name} carries a state from token to token beside attention "
            f"({', '.join(stateful) or base_class.__name__}), so completions cannot share a packed row; "
            "choose a model of attention alone"
        )
    if "position_ids" not in inspect.signature(base_class.forward).parameters:
        raise ValueError(
            f"{name} takes no position_ids: it counts columns, which are not positions in a packed row; choose a model "
            "with rotary or learned positions"
        )
    if not {"sdpa": base_class._supports_sdpa, "flex_attention": base_class._supports_flex_attn}[attention]:
        raise ValueError(
            f"{name} does not support model.attention={attention!r}, and its own attention cannot be told of packed "
            "rows; choose another kernel or another model"
        )
    # transformers hands the cap to every kernel, and SDPA, which has none, ignores it.
    cap = getattr(config, "attn_logit_softcapping", None)
    if attention == "sdpa" and cap is not None:
        raise ValueError(
            f"{name} caps its attention scores (attn_logit_softcapping={cap}), which "
            "model.attention='sdpa' leaves out; set model.attention='flex_attention', or choose another model"
        )


def _recurrent_layer_types() -> set[str]:
    """Types of layers, as transformers' configurations list them, that carry a state from token to token."""
    from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask

    kinds = {}
    for layer_type, makers in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items():
        kinds[layer_type] = list(makers.values()) if isinstance(makers, dict) else [makers]
    return {layer_type for layer_type, makers in kinds.items() if create_recurrent_attention_mask in makers}


def packed_forward(model: "PreTrainedModel", batch: PackedBatch, attention: str) -> "BaseModelOutput":
    """What a base model returns for the rows of the batch. `attention`: the kernel it was loaded with.

    Raises: ValueError, naming the model type, if the model asked transformers for no mask.
    """
    with _packed_masks(_Request(batch=batch, attention=attention)) as request:
        output = model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            # Nothing is padding. Without this mask, transformers would guess sequences from the positions.
            attention_mask=torch.ones_like(batch.token_ids),
            use_cache=False,
        )
    if not request.num_masks:
        raise ValueError(
            f"model type {model.config.model_type!r} makes attention masks by code of its own, which cannot be told "
            "of packed rows; choose another model"
        )
    return output


@contextmanager
def _packed_masks(request: _Request) -> Iterator[_Request]:
    """Inside, in this thread, every mask that transformers makes is one of packed rows."""
    _register()
    token = _request.set(request)
    try:
        yield request
    finally:
        _request.reset(token)


def _register() -> None:
    """Put a mask maker before transformers' own, once in a process; outside of a packed forward it changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for attention in ("sdpa", "flex_attention"):
        own = ALL_MASK_ATTENTION_FUNCTIONS[attention]
        if not isinstance(own, _MaskMaker):
            AttentionMaskInterface.register(attention, _MaskMaker(own))


class _MaskMaker:
    """Masks of packed rows during a packed forward, and transformers' own otherwise."""

    def __init__(self, own: Callable[..., object]) -> None:
        self._own = own

    def __call__(self, *args: object, **settings: object) -> object:
        request = _request.get()
        if request is None:
            return self._own(*args, **settings)
        request.num_masks += 1
        within = settings["mask_function"]
        assert callable(within), "transformers passes it by name"
        return attention_mask(request.batch, request.attention, within=_broadcast(within))


def _broadcast(within: Callable[..., Tensor]) -> MaskFunction:
    """The model's predicate, typed."""

    def positions_allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within(row, head, query, key)

    return positions_allowed
