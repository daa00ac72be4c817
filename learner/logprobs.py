"""Log-probabilities of chosen tokens without ever holding all logits."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Float[Tensor, "token hidden"],
    target: Int[Tensor, " token"],
    *,
    head: Callable[[Float[Tensor, "chunk hidden"]], Float[Tensor, "chunk vocab"]],
    temperature: float,
    num_chunks: int,
) -> Float[Tensor, " token"]:
    """log softmax(head(hidden_i) / temperature)[target_i] for each i, in nats and float32.

    The logits of one of `num_chunks` equal parts of the positions stand in memory at a time; the backward pass computes
    them again. The head is called once for each part, an empty one too.
    """

    def chunk_logprobs(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = head(hidden_chunk).float() / temperature
        return logits.gather(-1, target_chunk[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = [
        checkpoint(chunk_logprobs, h, t, use_reentrant=False)
        for h, t in zip(hidden.tensor_split(num_chunks), target.tensor_split(num_chunks), strict=True)
    ]
    return torch.cat(chunks)
