"""Packed rows: a document once, then the tokens of all its groups and all their completions (pure).

A completion token (group k, completion j, step t) sees what precedes the anchor a_k in the anchor's text, its own
completion up to itself, and nothing else. Positions count from the start of the text, so its own is a_k - start + t.
It is predicted by document token a_k - 1 when t = 0 and by its own previous token otherwise, never by its neighbour
in memory. So a packed forward equals one forward for each sequence, while the prefix is computed once for all blocks
and all samples (arXiv:2603.12248, block-parallel sampling). Short pieces share a row, unseen by each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actors.rollout import Completions, Document

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) -> bool, broadcasting over index tensors."""

Place = tuple[int, int]
"""Row and first column of a piece in the packed batch."""


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
    """Rows of equal length and the indices needed to read them."""

    token_ids: Int[Tensor, "row token"]
    positions: Int[Tensor, "row token"]
    run_start: Int[Tensor, "row token"]
    """First column of the run that the token belongs to: one text of a document, or one completion. It sees the run up
    to itself. A token of padding is a run of its own."""
    prefix_start: Int[Tensor, "row token"]
    prefix_end: Int[Tensor, "row token"]
    """Columns [prefix_start, prefix_end) are visible as well: a completion's context. Empty for all other tokens."""
    completions: Windows
    """One window for each completion, in the order (piece, group, completion)."""
    ground_truth: Windows
    """One window for each group, in the order (piece, group)."""
    completion_tokens: Predictions
    """Aligned with `completions`."""
    document_tokens: Predictions
    """`Document.predicted_positions`."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        names = ("token_ids", "positions", "run_start", "prefix_start", "prefix_end")
        moved = {name: getattr(self, name).to(device) for name in names}
        for name in ("completions", "ground_truth", "completion_tokens", "document_tokens"):
            part = getattr(self, name)
            tensors = {f: getattr(part, f).to(device) for f in part.__slots__ if f != "num_windows"}
            moved[name] = replace(part, **tensors)
        return PackedBatch(**moved)


class _Piece:
    """One document's part of a row, and the places in it that are read afterwards; columns count from its first."""

    def __init__(self, document: Document) -> None:
        num_tokens = len(document.token_ids)
        run_start = np.repeat(document.text_starts, np.diff(document.text_starts, append=num_tokens))
        self.token_ids: list[int] = document.token_ids.tolist()
        self.positions: list[int] = (np.arange(num_tokens) - run_start).tolist()
        self.run_start: list[int] = run_start.tolist()
        self.prefix_start, self.prefix_end = [0] * num_tokens, [0] * num_tokens
        self.document_predictors: list[int] = (document.predicted_positions - 1).tolist()
        self.ground_truth: list[range] = []
        self.completions: list[range] = []
        self.predictors: list[int] = []

    def add(self, completions: Completions) -> None:
        """The completions of all anchors, and the ground truth that each group is compared with."""
        document, num_tokens = completions.document, len(self.token_ids)
        anchors, context_starts = document.anchors.tolist(), document.context_starts.tolist()
        self.ground_truth = [range(anchor, min(anchor + document.horizon, num_tokens)) for anchor in anchors]
        for group, context in enumerate(zip(context_starts, anchors, strict=True)):
            ids_and_lengths = zip(completions.completion_ids[group], completions.completion_lengths[group], strict=True)
            for ids, length in ids_and_lengths:
                self._append(ids[:length].tolist(), *context)

    def _append(self, ids: list[int], context_start: int, anchor: int) -> None:
        start, length = len(self.token_ids), len(ids)
        self.completions.append(range(start, start + length))
        self.predictors += [anchor - 1, *range(start, start + length - 1)]
        self.token_ids += ids
        self.positions += range(anchor - context_start, anchor - context_start + length)
        self.run_start += [start] * length
        self.prefix_start += [context_start] * length
        self.prefix_end += [anchor] * length


def pack(documents: Sequence[Document | Completions]) -> PackedBatch:
    """Rows as long as the longest piece, a document with its completions or a bare one; several share a row that fits.

    A bare document has no ground-truth windows either: nothing is compared with them.

    Source: EBFT (arXiv:2603.12248), block-parallel sampling. Test: test_packed_forward.py
    """
    pieces = [_piece(document) for document in documents]
    places = first_fit([len(piece.token_ids) for piece in pieces])
    token_ids, positions, run_start, prefix_start, prefix_end = _rows(pieces, places)
    completions = _windows([piece.completions for piece in pieces], places)
    document_row, document_predictor = _flat([piece.document_predictors for piece in pieces], places)
    return PackedBatch(
        token_ids=token_ids,
        positions=positions,
        run_start=run_start,
        prefix_start=prefix_start,
        prefix_end=prefix_end,
        completions=completions,
        ground_truth=_windows([piece.ground_truth for piece in pieces], places),
        completion_tokens=Predictions(
            row=completions.row,
            predictor=_flat([piece.predictors for piece in pieces], places)[1],
            target=token_ids[completions.row, completions.column],
        ),
        document_tokens=Predictions(
            row=document_row, predictor=document_predictor, target=token_ids[document_row, document_predictor + 1]
        ),
    )


def first_fit(lengths: Sequence[int]) -> list[Place]:
    """Row and first column of each piece, in rows as long as the longest: first fit, longest first.

    Rows stand in the order of their first piece, so pieces that fit with no other stay in theirs.
    Test: test_packing.py::test_first_fit_fills_rows
    """
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = max(lengths) - lengths[index]
        row = next((row for row in rows if sum(lengths[i] for i in row) <= room), None)
        if row is None:
            rows.append([index])
        else:
            row.append(index)
    in_order = sorted(sorted(row) for row in rows)
    places = {i: (r, sum(lengths[j] for j in row if j < i)) for r, row in enumerate(in_order) for i in row}
    return [places[index] for index in range(len(lengths))]


def may_attend(
    run_start: Int[Tensor, "row token"],
    prefix_start: Int[Tensor, "row token"],
    prefix_end: Int[Tensor, "row token"],
) -> MaskFunction:
    """The block mask as a predicate over columns."""

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own_run = (run_start[row, query] <= key) & (key <= query)
        context = (prefix_start[row, query] <= key) & (key < prefix_end[row, query])
        return own_run | context

    return allowed


def within_positions(batch: PackedBatch, within: MaskFunction) -> MaskFunction:
    """The block mask where `within` allows it too: a predicate over the positions of two tokens in their sequence.

    With `within` a window of w tokens, a completion's token sees the last w of context and completion together.
    Test: test_packing.py::test_windows_count_positions
    """
    allowed = may_attend(batch.run_start, batch.prefix_start, batch.prefix_end)
    positions = batch.positions

    def allowed_within(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed(row, head, query, key) & within(row, head, positions[row, query], positions[row, key])

    return allowed_within


def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Positions up to the query's own: no window."""
    return key <= query


def dense_mask(batch: PackedBatch, within: MaskFunction = causal) -> Bool[Tensor, "row 1 token token"]:
    """True where the query (third axis) may attend to the key (last axis)."""
    num_rows, length = batch.token_ids.shape
    index = torch.arange(length, device=batch.token_ids.device)
    row = torch.arange(num_rows, device=batch.token_ids.device)[:, None, None]
    allowed = within_positions(batch, within)
    return allowed(row, row, index[None, :, None], index[None, None, :])[:, None]


def attention_mask(batch: PackedBatch, attention: str, *, within: MaskFunction = causal) -> object:
    """The mask in the form the model's attention kernel takes: a dense tensor, or FlexAttention's BlockMask."""
    if attention == "sdpa":
        return dense_mask(batch, within)
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, length = batch.token_ids.shape
    allowed = within_positions(batch, within)
    return create_block_mask(allowed, num_rows, None, length, length, device=str(batch.token_ids.device))


def _piece(document: Document | Completions) -> _Piece:
    if isinstance(document, Document):
        return _Piece(document)
    piece = _Piece(document.document)
    piece.add(document)
    return piece


def _rows(pieces: Sequence[_Piece], places: Sequence[Place]) -> Int[Tensor, "part row token"]:
    """Token ids, positions, run starts, prefix starts and prefix ends of the whole batch."""
    num_rows, length = 1 + max(row for row, _ in places), max(len(piece.token_ids) for piece in pieces)
    rows = torch.zeros(5, num_rows, length, dtype=torch.long)
    rows[2] = torch.arange(length)  # padding: each token a run of its own
    for piece, (row, offset) in zip(pieces, places, strict=True):
        parts = torch.tensor([piece.token_ids, piece.positions, piece.run_start, piece.prefix_start, piece.prefix_end])
        parts[2:] += offset
        rows[:, row, offset : offset + parts.shape[1]] = parts
    return rows


def _windows(runs_of_pieces: Sequence[list[range]], places: Sequence[Place]) -> Windows:
    runs = list(chain.from_iterable(runs_of_pieces))
    row, column = _flat([list(chain.from_iterable(runs)) for runs in runs_of_pieces], places)
    window = torch.arange(len(runs)).repeat_interleave(torch.tensor([len(run) for run in runs], dtype=torch.long))
    return Windows(row=row, column=column, window=window, num_windows=len(runs))


def _flat(
    columns_of_pieces: Sequence[list[int]], places: Sequence[Place]
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Row and column in the batch of places given by columns of their pieces."""
    sizes = torch.tensor([len(columns) for columns in columns_of_pieces])
    row, offset = torch.tensor(places).repeat_interleave(sizes, dim=0).unbind(-1)
    return row, offset + torch.tensor(list(chain.from_iterable(columns_of_pieces)), dtype=torch.long)
