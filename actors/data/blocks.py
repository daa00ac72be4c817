"""Where completions start: the strided anchors of a packed document, or those of them within one text (pure)."""

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


def anchors_without(positions: np.ndarray, anchors: np.ndarray, *, horizon: int) -> np.ndarray:
    """The anchors whose block [a, a + horizon) holds none of these positions."""
    block = anchors[:, None] + np.arange(horizon)
    return anchors[~np.isin(block, positions).any(axis=1)]


def anchors_within_texts(
    anchors: np.ndarray, text_starts: np.ndarray, *, document_tokens: int, context_tokens: int, horizon: int
) -> np.ndarray:
    """The anchors whose block lies in one text: context_tokens of it before the anchor, horizon of it from there on.

    Anchor a is kept if  start(a) + context_tokens <= a <= end(a) - horizon,  where [start, end) is the text of token a.
    `text_starts` ascends from 0; a text ends where the next one starts, so its EOS belongs to it.

    Units: tokens.
    Test: test_blocks.py::test_kept_blocks_are_those_that_a_loop_over_tokens_keeps
    """
    text = np.searchsorted(text_starts, anchors, side="right") - 1
    ends = np.append(text_starts[1:], document_tokens)
    return anchors[(text_starts[text] + context_tokens <= anchors) & (anchors <= ends[text] - horizon)]
