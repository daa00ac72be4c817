"""A second set of weights beside an engine's model, so that an update pauses the engine for a swap of pointers only.

Loading weights into a vLLM model is more than a copy: on CPU every linear layer is packed anew. The twin shares the
model's structure and owns its tensors; vLLM's own `reload_weights` fills it while the engine goes on, and then the two
exchange their tensors and packed layers. The twin holds the previous weights afterwards, and the next update writes
over them. It costs the memory of one more set of weights.
"""

import torch
from torch import nn

PACKED = "cpu_linear"
"""Attribute of a vLLM layer on CPU that holds its packed weight, inside a function."""


def make_twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree; tensors are copied (those that modules share stay shared), all else is shared."""
    return _twin(model, {})


def exchange(model: nn.Module, twin: nn.Module) -> None:
    """Swap all tensors and packed layers of the two; each parameter object stays where it is."""
    seen: set[int] = set()
    for live, fresh in zip(model.modules(), twin.modules(), strict=True):
        for mine, other in ((live._parameters, fresh._parameters), (live._buffers, fresh._buffers)):
            for name, tensor in mine.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensor.data, other[name].data = other[name].data, tensor.data
        if hasattr(live, PACKED):
            packed = live.__dict__[PACKED]
            live.__dict__[PACKED] = fresh.__dict__[PACKED]
            fresh.__dict__[PACKED] = packed


def _twin(module: nn.Module, known: dict[int, object]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, get_layerwise_info
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    twin = known[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin._parameters = {name: _tensor(tensor, known) for name, tensor in module._parameters.items()}
    twin._buffers = {name: _tensor(tensor, known) for name, tensor in module._buffers.items()}
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    info = get_layerwise_info(module)
    LAYERWISE_INFO[twin] = LayerReloadingInfo(info.restore_metadata, info.restore_device)
    twin._modules = {name: child and _twin(child, known) for name, child in module._modules.items()}
    return twin


def _tensor(tensor: torch.Tensor | None, known: dict[int, object]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in known:
        copy = tensor.detach().clone()
        copy.__class__ = tensor.__class__
        copy.__dict__ = tensor.__dict__.copy()
        known[id(tensor)] = copy
    return known[id(tensor)]
