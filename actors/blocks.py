"""Where completions start: the strided anchors of a packed document (pure)."""

import numpy as np


def num_blocks(document_tokens: int, context_tokens: int, horizon: int, stride: int) -> int:
    """Number of anchors B = (P - G - ctx) / stride + 1 of a document of P tokens.

    Raises: ValueError if the blocks do not tile the document exactly, with the nearest lengths that do.
    Source: EBFT (arXiv:2603.12248), strided block-parallel sampling; B = 127 for (1024, 8, 8, 8).
    """
    span = document_tokens - horizon - context_tokens
    if span < 0 or span % stride:
        fitting = context_tokens + horizon + max(0, span // stride) * stride
        raise ValueError(
            f"document_tokens={document_tokens} - context_tokens={context_tokens} - horizon={horizon} = {span} must be "
            f"a non-negative multiple of stride={stride}; document_tokens={fitting} or {fitting + stride} would fit"
        )
    return span // stride + 1


def strided_anchors(document_tokens: int, context_tokens: int, horizon: int, stride: int) -> np.ndarray:
    """[B] int64 anchors a_k = context_tokens + k * stride; the context of block k is the whole prefix before a_k.

    Raises: ValueError as `num_blocks`.
    """
    count = num_blocks(document_tokens, context_tokens, horizon, stride)
    return context_tokens + stride * np.arange(count, dtype=np.int64)
