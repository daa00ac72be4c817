"""Packed rows: a document once, then the tokens of all its groups and all their completions (pure).

A completion token (group k, completion j, step t) sees the document before its anchor a_k, its own completion up to
itself, and nothing else. Its position is a_k + t. It is predicted by document row a_k - 1 when t = 0 and by its own
previous token otherwise, never by its neighbour in memory. So a packed forward equals one forward for each sequence,
while the prefix is computed once for all blocks and all samples (arXiv:2603.12248, block-parallel sampling).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actors.rollout import Rollout

DOCUMENT = 0
PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Runs of tokens in a packed batch, flat: token i lies at (row[i], column[i]) and belongs to window[i]."""

    row: Int[Tensor, " token"]
    column: Int[Tensor, " token"]
    window: Int[Tensor, " token"]
    """Ascending; every window in 0..num_windows-1 has at least one token."""
    num_windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Tokens whose log-probability is wanted: the logits at (row, predictor) are for token `target`."""

    row: Int[Tensor, " token"]
    predictor: Int[Tensor, " token"]
    target: Int[Tensor, " token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Rows of equal length and what one needs to read them."""

    token_ids: Int[Tensor, "row token"]
    positions: Int[Tensor, "row token"]
    visible_prefix: Int[Tensor, "row token"]
    """Document tokens this token may attend to: the first `visible_prefix` ones."""
    segment: Int[Tensor, "row token"]
    """0 the document, 1.. a completion, -1 padding."""
    completions: Windows
    """One window for each completion, in the order (rollout, group, completion)."""
    ground_truth: Windows
    """One window for each group, in the order (rollout, group)."""
    completion_tokens: Predictions
    """Aligned with `completions`."""
    document_tokens: Predictions
    """Document tokens that carry cross-entropy."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("token_ids", "positions", "visible_prefix", "segment")
        }
        for name in ("completions", "ground_truth", "completion_tokens", "document_tokens"):
            part = getattr(self, name)
            tensors = {f: getattr(part, f).to(device) for f in part.__slots__ if f != "num_windows"}
            moved[name] = replace(part, **tensors)
        return PackedBatch(**moved)


class _Row:
    """Builds one packed row, and the places in it that are read afterwards."""

    def __init__(self, rollout: Rollout) -> None:
        document = rollout.document
        self.token_ids: list[int] = document.token_ids.tolist()
        num_tokens = len(self.token_ids)
        self.positions = list(range(num_tokens))
        self.visible_prefix = [position + 1 for position in self.positions]
        self.segment = [DOCUMENT] * num_tokens
        first = max(1, document.num_prompt_tokens)
        self.document_predictors = list(range(first - 1, num_tokens - 1))
        self.document_targets = self.token_ids[first:num_tokens]
        self.ground_truth = [
            range(anchor, min(anchor + document.horizon, num_tokens)) for anchor in document.anchors.tolist()
        ]
        self.completions: list[range] = []
        self.predictors: list[int] = []
        for group, anchor in enumerate(document.anchors.tolist()):
            for ids, length in zip(rollout.completion_ids[group], rollout.completion_lengths[group], strict=True):
                self._append(ids[:length].tolist(), anchor)

    def _append(self, ids: list[int], anchor: int) -> None:
        start, length = len(self.token_ids), len(ids)
        self.completions.append(range(start, start + length))
        self.predictors += [anchor - 1, *range(start, start + length - 1)]
        self.token_ids += ids
        self.positions += range(anchor, anchor + length)
        self.visible_prefix += [anchor] * length
        self.segment += [len(self.completions)] * length


def pack(rollouts: Sequence[Rollout]) -> PackedBatch:
    """Pack each rollout in a row of its own, padded to the longest row."""
    rows = [_Row(rollout) for rollout in rollouts]
    length = max(len(row.token_ids) for row in rows)

    def padded(name: str, value: int) -> Int[Tensor, "row token"]:
        return torch.tensor([getattr(r, name) + [value] * (length - len(getattr(r, name))) for r in rows])

    completions = _windows([row.completions for row in rows])
    token_ids = padded("token_ids", 0)
    return PackedBatch(
        token_ids=token_ids,
        positions=padded("positions", 0),
        visible_prefix=padded("visible_prefix", 0),
        segment=padded("segment", PADDING),
        completions=completions,
        ground_truth=_windows([row.ground_truth for row in rows]),
        completion_tokens=Predictions(
            row=completions.row,
            predictor=_flat([row.predictors for row in rows]),
            target=token_ids[completions.row, completions.column],
        ),
        document_tokens=Predictions(
            row=_row_index([row.document_targets for row in rows]),
            predictor=_flat([row.document_predictors for row in rows]),
            target=_flat([row.document_targets for row in rows]),
        ),
    )


def may_attend(
    visible_prefix: Int[Tensor, "row token"], segment: Int[Tensor, "row token"]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The block mask as a predicate (row, head, query, key) -> bool, broadcasting over index tensors."""

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        document_key = (segment[row, key] == DOCUMENT) & (key < visible_prefix[row, query])
        own_segment = (segment[row, query] == segment[row, key]) & (key <= query)
        # A document token's own segment is the document, whose causal order the first clause already says.
        return document_key | (own_segment & (segment[row, key] != DOCUMENT))

    return allowed


def dense_mask(batch: PackedBatch) -> Bool[Tensor, "row 1 token token"]:
    """True where the query (third axis) may attend to the key (last axis)."""
    num_rows, length = batch.token_ids.shape
    index = torch.arange(length, device=batch.token_ids.device)
    row = torch.arange(num_rows, device=batch.token_ids.device)[:, None, None]
    allowed = may_attend(batch.visible_prefix, batch.segment)
    return allowed(row, row, index[None, :, None], index[None, None, :])[:, None]


def attention_mask(batch: PackedBatch, attention: str) -> object:
    """The mask in the form the model's attention kernel takes: a dense tensor, or FlexAttention's BlockMask."""
    if attention == "sdpa":
        return dense_mask(batch)
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, length = batch.token_ids.shape
    allowed = may_attend(batch.visible_prefix, batch.segment)
    return create_block_mask(allowed, num_rows, None, length, length, device=str(batch.token_ids.device))


def _windows(ranges_of_rows: list[list[range]]) -> Windows:
    window = [w for w, run in enumerate(run for ranges in ranges_of_rows for run in ranges) for _ in run]
    return Windows(
        row=_row_index([[c for run in ranges for c in run] for ranges in ranges_of_rows]),
        column=_flat([[c for run in ranges for c in run] for ranges in ranges_of_rows]),
        window=torch.tensor(window, dtype=torch.long),
        num_windows=sum(len(ranges) for ranges in ranges_of_rows),
    )


def _flat(lists: list[list[int]]) -> Int[Tensor, " token"]:
    return torch.tensor([value for values in lists for value in values], dtype=torch.long)


def _row_index(lists: list[list[int]]) -> Int[Tensor, " token"]:
    return torch.tensor([row for row, values in enumerate(lists) for _ in values], dtype=torch.long)
