"""From hidden states to one feature for each window of tokens (pure)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def feature_layers(depth_fracs: Sequence[float], num_layers: int) -> list[int]:
    """Indices floor(frac * num_layers), at least 1, into the hidden states, whose index 0 is the embedding output.

    Index i is the residual stream after block i, before the final norm. Index 0 would be a function of a token's
    identity alone. A product that is a whole number up to rounding counts as it: 0.29 of 100 layers is 29, in floating
    point 28.999999999999996, and a third of 12 is 4.
    Source: EBFT (arXiv:2603.12248): 25, 50 and 75% of the depth; layers 7, 14, 21 of Qwen2.5-1.5B.
    """
    return [max(1, math.floor(frac * num_layers + 1e-9)) for frac in depth_fracs]


def token_features(hidden_states: Sequence[Float[Tensor, "token hidden"]]) -> Float[Tensor, "token feature"]:
    """Concatenate the layers of each token and scale the whole vector to unit L2 norm.

    Returns float32 whatever the network's precision.
    """
    return normalize(torch.cat([hidden.float() for hidden in hidden_states], dim=-1), dim=-1)


def pool(
    features: Float[Tensor, "token feature"],
    window: Int[Tensor, " token"],
    num_windows: int,
    *,
    pooling: Literal["last", "mean"],
) -> Float[Tensor, "window feature"]:
    """One vector for each window: that of its last token, or the mean over its (already normalised) tokens.

    `window` holds the ascending window index of each token; every window has at least one token.
    """
    sizes = torch.bincount(window, minlength=num_windows)
    if pooling == "last":
        return features[sizes.cumsum(0) - 1]
    sums = features.new_zeros(num_windows, features.shape[1]).index_add_(0, window, features)
    return sums / sizes[:, None]
