"""Packed rows against a transcription that knows each token by (rollout, group, completion, step)."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.rollout import Document, Rollout
from feature_server.packing import PackedBatch, attention_mask, dense_mask, first_fit, may_attend, pack

Piece = Rollout | Document


class Token(NamedTuple):
    """One place of a packed row; group -1 is the document, and then step is the position in it."""

    rollout: int
    group: int
    completion: int
    step: int
    token_id: int


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Piece]:
    """Pieces of 13, 31, 8, 26 and 7 tokens, in rows {0, 2, 4}, {1} and {3}: variable lengths, ground truth cut by the
    document's end, separate texts (one of a single token), no completion."""
    pair = make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 3]], horizon=5, seed=2, num_prompt_tokens=6)
    strided = make_rollout(
        num_tokens=12, anchors=[2, 5, 10], lengths=[[4, 1, 2], [3, 4, 1], [1, 2, 1]], horizon=4, seed=1
    )
    document = make_rollout(num_tokens=8, anchors=[3], lengths=[[2]], horizon=2, seed=3).document
    texts = make_rollout(num_tokens=14, anchors=[2, 9, 11], lengths=[[3, 1], [2, 3], [1, 2]], horizon=3, seed=6)
    texts = replace(texts, document=replace(texts.document, text_starts=np.array([0, 5, 6])))
    prompted = make_rollout(num_tokens=7, anchors=[3], lengths=[[2]], horizon=2, num_prompt_tokens=3).document
    return [pair, strided, document, texts, prompted]


ROWS = [[0, 2, 4], [1], [3]]
"""Rollouts of each row of the batch."""


def document_of(piece: Piece) -> Document:
    return piece if isinstance(piece, Document) else piece.document


def tokens_of(rollouts: list[Piece], index: int) -> list[Token]:
    rollout = rollouts[index]
    tokens = [Token(index, -1, -1, step, int(token)) for step, token in enumerate(document_of(rollout).token_ids)]
    if isinstance(rollout, Document):
        return tokens
    num_groups, num_completions = rollout.completion_lengths.shape
    for group in range(num_groups):
        for completion in range(num_completions):
            for step in range(rollout.completion_lengths[group, completion]):
                token_id = int(rollout.completion_ids[group, completion, step])
                tokens.append(Token(index, group, completion, step, token_id))
    return tokens


def rows_of(rollouts: list[Piece]) -> list[list[Token]]:
    return [[token for index in row for token in tokens_of(rollouts, index)] for row in ROWS]


def place_of(rollouts: list[Piece], token: Token) -> tuple[int, int]:
    """Row and column."""
    for row, tokens in enumerate(rows_of(rollouts)):
        if token in tokens:
            return row, tokens.index(token)
    raise AssertionError(f"{token} is in no row")


def document_token(rollouts: list[Piece], index: int, position: int) -> Token:
    return Token(index, -1, -1, position, int(document_of(rollouts[index]).token_ids[position]))


def text_of(document: Document, position: int) -> int:
    """How many texts start before or at the position."""
    return sum(1 for start in document.text_starts.tolist() if start <= position)


def slow_position(document: Document, position: int) -> int:
    """Tokens of the same text before it."""
    return sum(1 for before in range(position) if text_of(document, before) == text_of(document, position))


def slow_may_attend(rollouts: list[Piece], query: Token, key: Token) -> bool:
    if query.rollout != key.rollout:
        return False
    document = document_of(rollouts[query.rollout])
    if key.group == -1:
        last_seen = query.step if query.group == -1 else int(document.anchors[query.group]) - 1
        return key.step <= last_seen and text_of(document, key.step) == text_of(document, last_seen)
    same_completion = (query.group, query.completion) == (key.group, key.completion)
    return same_completion and key.step <= query.step


def slow_predictor(rollouts: list[Piece], token: Token) -> Token:
    """What stood immediately before the token when it was sampled."""
    rollout = rollouts[token.rollout]
    if token.step == 0:
        return document_token(rollouts, token.rollout, int(rollout.document.anchors[token.group]) - 1)
    previous_id = int(rollout.completion_ids[token.group, token.completion, token.step - 1])
    return token._replace(step=token.step - 1, token_id=previous_id)


def test_the_example_of_the_paper() -> None:
    """P=6, ctx=2, G=2, s=2, one completion: blocks at 2 and 4.

    The authors lay rollout tokens out step by step (token (k, t) in column P + t*B + k), these rows completion
    by completion (column P + k*G + t): the same tokens, positions and predictors in another order.
    """
    rollout = Rollout(
        ticket_id=0,
        document=Document(
            document_id="d",
            token_ids=np.arange(10, 16),
            anchors=np.array([2, 4]),
            horizon=2,
            ends_with_eos=False,
        ),
        completion_ids=np.array([[[20, 21]], [[30, 31]]]),
        completion_lengths=np.array([[2], [2]]),
        behavior_logprobs=np.full((2, 1, 2), -1.0, dtype=np.float32),
        token_versions=np.zeros((2, 1, 2), dtype=np.int64),
    )
    batch = pack([rollout])
    assert batch.token_ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 30, 31]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert batch.run_start.tolist() == [[0, 0, 0, 0, 0, 0, 6, 6, 8, 8]]
    assert batch.prefix_start.tolist() == [[0] * 10]
    assert batch.prefix_end.tolist() == [[0, 0, 0, 0, 0, 0, 2, 2, 4, 4]]
    assert batch.completion_tokens.predictor.tolist() == [1, 6, 3, 8]
    assert batch.completion_tokens.target.tolist() == [20, 21, 30, 31]
    assert batch.completions.window.tolist() == [0, 0, 1, 1]
    assert batch.ground_truth.column.tolist() == [2, 3, 4, 5]
    assert batch.ground_truth.window.tolist() == [0, 0, 1, 1]
    step_major = [6 + block * 2 + step for step in range(2) for block in range(2)]
    assert batch.positions[0, step_major].tolist() == [2, 4, 3, 5]
    predictor_of = dict(zip(batch.completions.column.tolist(), batch.completion_tokens.predictor.tolist(), strict=True))
    assert [predictor_of[column] for column in step_major] == [
        1,
        3,
        6,
        8,
    ]  # then 6, 8: their own first tokens
    visible = "".join("x" if allowed else "." for allowed in dense_mask(batch)[0, 0].flatten())
    assert [visible[i : i + 10] for i in range(0, 100, 10)] == [
        "x.........", "xx........", "xxx.......", "xxxx......", "xxxxx.....", "xxxxxx....",
        "xx....x...", "xx....xx..", "xxxx....x.", "xxxx....xx",
    ]  # fmt: skip


def test_two_texts_and_two_rollouts_in_a_row_by_hand() -> None:
    """Texts of 3 and 4 tokens, a block of one token in the second; then a bare document of 2 tokens in the same row."""
    document = Document(
        document_id="d",
        token_ids=np.arange(10, 17),
        anchors=np.array([5]),
        horizon=1,
        ends_with_eos=False,
        text_starts=np.array([0, 3]),
    )
    sampled = Rollout(
        ticket_id=0,
        document=document,
        completion_ids=np.array([[[20], [30]]]),
        completion_lengths=np.array([[1, 1]]),
        behavior_logprobs=np.full((1, 2, 1), -1.0, dtype=np.float32),
        token_versions=np.zeros((1, 2, 1), dtype=np.int64),
    )
    bare = Document(
        document_id="e", token_ids=np.array([40, 41]), anchors=np.array([1]), horizon=1, ends_with_eos=False
    )
    filler = replace(document, document_id="f", token_ids=np.arange(50, 61), text_starts=np.array([0]))
    batch = pack([sampled, filler, bare])
    assert batch.token_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 20, 30, 40, 41], list(range(50, 61))]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 2, 2, 0, 1]
    assert batch.run_start[0].tolist() == [0, 0, 0, 3, 3, 3, 3, 7, 8, 9, 9]
    assert [batch.prefix_start[0, 7:9].tolist(), batch.prefix_end[0, 7:9].tolist()] == [[3, 3], [5, 5]]
    assert batch.completion_tokens.predictor.tolist() == [4, 4]
    in_first_row = batch.document_tokens.row == 0
    assert batch.document_tokens.predictor[in_first_row].tolist() == [0, 1, 3, 4, 5, 9]
    assert batch.document_tokens.target[in_first_row].tolist() == [11, 12, 14, 15, 16, 41]
    visible = "".join("x" if allowed else "." for allowed in dense_mask(batch)[0, 0].flatten())
    assert [visible[i : i + 11] for i in range(0, 121, 11)] == [
        "x..........", "xx.........", "xxx........",
        "...x.......", "...xx......", "...xxx.....", "...xxxx....",
        "...xx..x...", "...xx...x..",
        ".........x.", ".........xx",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "places"),
    [
        ([4, 4, 4], [(0, 0), (1, 0), (2, 0)]),
        ([5, 2, 3, 4], [(0, 0), (1, 0), (1, 2), (2, 0)]),
        ([1, 6, 2, 5, 3], [(0, 0), (1, 0), (2, 0), (0, 1), (2, 2)]),
        ([3, 4, 5], [(0, 0), (1, 0), (2, 0)]),
        ([7], [(0, 0)]),
    ],
)
def test_first_fit_fills_rows(lengths: list[int], places: list[tuple[int, int]]) -> None:
    assert first_fit(lengths) == places


@pytest.mark.parametrize("seed", range(30))
def test_first_fit_divides_rows_without_overlap_and_wastes_no_row(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 20, 12).tolist()
    places = first_fit(lengths)
    used: dict[int, list[tuple[int, int]]] = {}
    for (row, column), length in zip(places, lengths, strict=True):
        used.setdefault(row, []).append((column, column + length))
    for spans in used.values():
        assert sorted(spans)[0][0] == 0 and max(spans)[1] <= max(lengths)
        assert all(end == start for (_, end), (start, _) in pairwise(sorted(spans)))
    assert sorted(used) == list(range(len(used)))
    fillings = sorted(max(spans)[1] for spans in used.values())
    assert len(used) == 1 or fillings[0] + fillings[1] > max(lengths)  # the two emptiest rows would not fit in one


def test_mask_equals_a_loop_over_tokens(rollouts: list[Piece]) -> None:
    mask = dense_mask(pack(rollouts))
    assert mask.shape == (3, 1, 31, 31)
    for row, tokens in enumerate(rows_of(rollouts)):
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                expected = slow_may_attend(rollouts, query, key)
                assert mask[row, 0, i, j] == expected, f"row {row}: {query} -> {key}"


def test_padding_is_seen_by_itself_only_and_no_query_is_blind(rollouts: list[Piece]) -> None:
    batch = pack(rollouts)
    mask = dense_mask(batch)[:, 0]
    assert [len(tokens) for tokens in rows_of(rollouts)] == [28, 31, 26]
    for row, tokens in enumerate(rows_of(rollouts)):
        length = len(tokens)
        assert not mask[row, :length, length:].any()
        assert torch.equal(mask[row, length:], torch.eye(31, dtype=torch.bool)[length:])
    assert mask.any(-1).all()  # a softmax over nothing is NaN, and propagates


def test_tokens_and_positions_equal_the_transcription(rollouts: list[Piece]) -> None:
    batch = pack(rollouts)
    for row, tokens in enumerate(rows_of(rollouts)):
        assert batch.token_ids[row, : len(tokens)].tolist() == [token.token_id for token in tokens]
        for column, token in enumerate(tokens):
            document = document_of(rollouts[token.rollout])
            if token.group == -1:
                expected = slow_position(document, token.step)
            else:
                expected = slow_position(document, int(document.anchors[token.group])) + token.step
            assert batch.positions[row, column] == expected, token


def test_windows_and_predictors_stand_in_the_order_of_the_rollouts(rollouts: list[Piece]) -> None:
    batch = pack(rollouts)
    expected_windows, expected_predictions = [], []
    window = -1
    for index in range(len(rollouts)):
        for token in tokens_of(rollouts, index):
            if token.group >= 0:
                row, column = place_of(rollouts, token)
                predictor_row, predictor = place_of(rollouts, slow_predictor(rollouts, token))
                assert predictor_row == row
                window += token.step == 0
                expected_windows.append((row, column, window))
                expected_predictions.append((row, predictor, token.token_id))
    windows, predictions = batch.completions, batch.completion_tokens
    assert triples(windows.row, windows.column, windows.window) == expected_windows
    assert windows.num_windows == window + 1 == 17
    assert triples(predictions.row, predictions.predictor, predictions.target) == expected_predictions


def test_document_tokens_are_predicted_by_their_neighbor_in_the_text_after_the_prompt(rollouts: list[Piece]) -> None:
    predictions = pack(rollouts).document_tokens
    expected = []
    for index, rollout in enumerate(rollouts):
        document = document_of(rollout)
        for position in range(1, len(document.token_ids)):
            same_text = text_of(document, position) == text_of(document, position - 1)
            if same_text and position >= document.num_prompt_tokens:
                row, column = place_of(rollouts, document_token(rollouts, index, position - 1))
                expected.append((row, column, int(document.token_ids[position])))
    assert triples(predictions.row, predictions.predictor, predictions.target) == expected
    assert len(expected) == 3 + 11 + 7 + (4 + 0 + 7) + 4


def test_ground_truth_is_the_document_from_the_anchor_on(rollouts: list[Piece]) -> None:
    windows = pack(rollouts).ground_truth
    expected, window = [], 0
    for index, rollout in enumerate(rollouts):
        document = document_of(rollout)
        for anchor in [] if rollout is document else document.anchors.tolist():
            in_document = [p for p in range(anchor, anchor + document.horizon) if p < len(document.token_ids)]
            expected += [(*place_of(rollouts, document_token(rollouts, index, p)), window) for p in in_document]
            window += 1
    assert triples(windows.row, windows.column, windows.window) == expected
    assert windows.num_windows == window == 7
    # 3 and 2: cut by the document's end
    assert [int((windows.window == w).sum()) for w in range(7)] == [3, 4, 4, 2, 3, 3, 3]


def test_documents_without_completions_make_plain_causal_rows(rollouts: list[Piece]) -> None:
    batch = pack([rollouts[2], rollouts[4]])
    assert batch.token_ids.shape == (2, 8)
    assert batch.completions.num_windows == batch.ground_truth.num_windows == 0
    assert batch.completion_tokens.target.shape == batch.completions.window.shape == (0,)
    assert torch.equal(dense_mask(batch)[0, 0], torch.ones(8, 8).tril().bool())


@pytest.mark.parametrize("index", range(5))
def test_a_rollout_is_packed_alike_alone_and_in_company(index: int, rollouts: list[Piece]) -> None:
    together, alone = pack(rollouts), pack(rollouts[index : index + 1])
    row, first = place_of(rollouts, tokens_of(rollouts, index)[0])
    columns = slice(first, first + alone.token_ids.shape[1])
    for name in ("token_ids", "positions"):
        assert torch.equal(getattr(together, name)[row, columns], getattr(alone, name)[0])
    assert torch.equal(dense_mask(together)[row, :, columns, columns], dense_mask(alone)[0])


def test_rollouts_of_equal_length_keep_a_row_each(rollouts: list[Piece]) -> None:
    batch = pack([rollouts[1]] * 3)
    assert batch.token_ids.shape == (3, 31)
    assert batch.completions.row.tolist() == [row for row in range(3) for _ in range(19)]


def test_predicate_equals_the_dense_mask_on_index_tensors(rollouts: list[Piece]) -> None:
    batch = pack(rollouts)
    allowed = may_attend(batch.run_start, batch.prefix_start, batch.prefix_end)
    rows, length = batch.token_ids.shape
    indices = torch.cartesian_prod(torch.arange(rows), torch.tensor([5]), *[torch.arange(length)] * 2)
    flat = allowed(*indices.unbind(-1))
    assert torch.equal(flat.reshape(rows, 1, length, length), dense_mask(batch))
    one = [allowed(*index) for index in indices[::97].unsqueeze(-1).unbind(0)]
    assert torch.equal(torch.cat(one), flat[::97])


@pytest.mark.parametrize("window", [1, 3, 6, 100])
def test_windows_count_positions(window: int, rollouts: list[Piece]) -> None:
    """The last tokens of the own sequence, context and completion, wherever they lie in the row."""
    batch = pack(rollouts)
    mask = dense_mask(batch, lambda row, head, query, key: (key <= query) & (key > query - window))
    whole = dense_mask(batch)
    for row, queries in enumerate(ROWS):
        own = [token for index in queries for token in tokens_of(rollouts, index)]
        for query in range(len(own)):
            visible = whole[row, 0, query].nonzero()[:, 0].tolist()  # in the order of the own sequence
            assert mask[row, 0, query].nonzero()[:, 0].tolist() == visible[-window:]


def test_block_mask_covers_exactly_the_blocks_in_use(
    make_rollout: Callable[..., Rollout], unchecked_packing: ModuleType
) -> None:
    """A block of the sparse mask is computed if and only if some query in it may attend to some key in it."""
    long = make_rollout(
        num_tokens=300, anchors=[20, 150, 280], lengths=[[60, 70], [64, 64], [33, 80]], horizon=80, seed=4
    )
    long = replace(long, document=replace(long.document, text_starts=np.array([0, 140])))
    shorts = [make_rollout(num_tokens=n, anchors=[30], lengths=[[7, 9]], horizon=9, seed=n) for n in (200, 250)]
    batch = pack([long, *shorts])
    block_mask = unchecked_packing.attention_mask(batch, "flex_attention")
    dense = dense_mask(batch)
    length = dense.shape[-1]
    assert length == 300 + 371
    rows, index = torch.arange(2)[:, None, None], torch.arange(length)
    head = torch.zeros((), dtype=torch.long)
    assert torch.equal(block_mask.mask_mod(rows, head, index[None, :, None], index[None, None, :]), dense[:, 0])
    size = block_mask.BLOCK_SIZE[0]
    in_use = block_mask.to_dense().bool()[:, 0]
    assert size < length / 4 and in_use.shape == (2, -(-length // size), -(-length // size))
    for row, i, j in torch.cartesian_prod(*[torch.arange(n) for n in in_use.shape]).tolist():
        some = dense[row, 0, i * size : (i + 1) * size, j * size : (j + 1) * size].any()
        assert in_use[row, i, j] == some, f"row {row}, query block {i}, key block {j}"
    assert not in_use.all() and in_use.any()
    assert attention_mask(batch, "sdpa").equal(dense)


def test_moving_a_batch_moves_every_tensor(rollouts: list[Piece]) -> None:
    moved = pack(rollouts).to("meta")
    tensors = list(tensors_in(moved))
    assert len(tensors) == 5 + 3 + 3 + 3 + 3
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.completions.num_windows, moved.ground_truth.num_windows) == (17, 7)


def tensors_in(batch: PackedBatch) -> list[Tensor]:
    values = [getattr(batch, field.name) for field in fields(batch)]
    parts = [value for value in values if not isinstance(value, Tensor)]
    values += [getattr(part, field.name) for part in parts for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def triples(*columns: Tensor) -> list[tuple[int, ...]]:
    return list(zip(*[column.tolist() for column in columns], strict=True))
