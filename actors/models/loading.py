"""Networks of a resolved model with every tensor from its files: none drawn at random, none left over.

transformers initialises a missing tensor and skips an unknown one; a run would then train another network than the one
that was saved. What belongs to an architecture (tied heads, buffers that are computed, keys of older versions) is
transformers' to judge.
"""

from typing import TYPE_CHECKING, TypedDict, cast

import torch

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedModel

NAMES_SHOWN = 6
"""Names of tensors in an error, of each kind."""


class LoadingInfo(TypedDict):
    """The part read here of what from_pretrained reports."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """Name, shape in the files, shape in the network."""


def load_causal_lm(model: str, *, dtype: str, attention: str = "sdpa") -> "PreTrainedModel":
    """The causal language model of a resolved model. `dtype`: of torch, such as `float32`; `auto`: as it was saved.

    Raises: ValueError naming the tensors that its files lack, hold in another shape, or hold in addition.
    """
    from transformers import AutoModelForCausalLM

    network, found = AutoModelForCausalLM.from_pretrained(model, **_settings(dtype, attention))
    _require_all(model, cast(LoadingInfo, found))
    return network


def load_decoder(model: str, *, dtype: str, attention: str = "sdpa") -> "PreTrainedModel":
    """The same network without its head, which the files may hold or lack.

    Raises: as `load_causal_lm`.
    """
    from transformers import AutoModel

    network, found = AutoModel.from_pretrained(model, **_settings(dtype, attention))
    found = cast(LoadingInfo, found)
    if found["unexpected_keys"]:
        found["unexpected_keys"] -= _head_keys(model)
    _require_all(model, found)
    return network


def require_complete(model: str) -> None:
    """For a reader that checks no names itself, such as an engine that is to sample at once.

    Raises: as `load_causal_lm`.
    """
    load_causal_lm(model, dtype="auto")


def _settings(dtype: str, attention: str) -> dict[str, object]:
    return {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": attention,
        "output_loading_info": True,
        "trust_remote_code": False,
        "use_safetensors": True,  # else a folder's pytorch_model.bin may be taken, a pickle
        "ignore_mismatched_sizes": True,  # they are refused here, with their names
    }


def _head_keys(model: str) -> set[str]:
    """Names, as its files have them, of what the causal language model has outside its decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion  # as save_pretrained does

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, trust_remote_code=False))
    decoder = f"{network.base_model_prefix}."
    head = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(decoder)}
    return head.keys() | revert_weight_conversion(network, head).keys()


def _require_all(model: str, found: LoadingInfo) -> None:
    mismatched = [
        f"{name} {tuple(saved)} instead of {tuple(wanted)}" for name, saved, wanted in found["mismatched_keys"]
    ]
    faults = {
        "lack": found["missing_keys"],
        "hold another shape of": mismatched,
        "hold in addition": found["unexpected_keys"],
    }
    described = [f"{fault} {_shown(sorted(names))}" for fault, names in faults.items() if names]
    if described:
        raise ValueError(
            f"the weights of the model {model!r} are not those of its config.json: they {'; they '.join(described)}. "
            "transformers would draw what is missing at random and ignore the rest; save the model again with "
            "save_pretrained, or correct its config.json"
        )


def _shown(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
