"""Packed rows against a transcription that knows each token by (rollout, group, completion, step)."""

from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.rollout import Document, Rollout, unsampled
from feature_server.packing import PackedBatch, attention_mask, dense_mask, may_attend, pack


class Token(NamedTuple):
    """One place of a packed row; group -1 is the document, and then step is the position in it."""

    group: int
    completion: int
    step: int
    token_id: int


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    """Rows of 31, 13, 8 and 7 tokens: variable lengths, ground truth cut by the document's end, no completion."""
    strided = make_rollout(
        num_tokens=12, anchors=[2, 5, 10], lengths=[[4, 1, 2], [3, 4, 1], [1, 2, 1]], horizon=4, seed=1
    )
    pair = make_rollout(num_tokens=9, anchors=[6], lengths=[[1, 3]], horizon=5, seed=2, num_prompt_tokens=6)
    document = make_rollout(num_tokens=8, anchors=[3], lengths=[[2]], horizon=2, seed=3).document
    prompted = make_rollout(num_tokens=7, anchors=[3], lengths=[[2]], horizon=2, num_prompt_tokens=3).document
    return [strided, pair, unsampled(document), unsampled(prompted)]


def row_tokens(rollout: Rollout) -> list[Token]:
    tokens = [Token(-1, -1, step, int(token)) for step, token in enumerate(rollout.document.token_ids)]
    num_groups, num_completions = rollout.completion_lengths.shape
    for group in range(num_groups):
        for completion in range(num_completions):
            for step in range(rollout.completion_lengths[group, completion]):
                token_id = int(rollout.completion_ids[group, completion, step])
                tokens.append(Token(group, completion, step, token_id))
    return tokens


def slow_may_attend(rollout: Rollout, query: Token, key: Token) -> bool:
    if key.group == -1:
        last_seen = query.step if query.group == -1 else int(rollout.document.anchors[query.group]) - 1
        return key.step <= last_seen
    same_completion = (query.group, query.completion) == (key.group, key.completion)
    return same_completion and key.step <= query.step


def slow_predictor(rollout: Rollout, tokens: list[Token], token: Token) -> int:
    """Column of what stood immediately before the token when it was sampled."""
    if token.step > 0:
        return tokens.index(token._replace(step=token.step - 1, token_id=previous_id(rollout, token)))
    return int(rollout.document.anchors[token.group]) - 1


def previous_id(rollout: Rollout, token: Token) -> int:
    return int(rollout.completion_ids[token.group, token.completion, token.step - 1])


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
        min_policy_version=0,
        max_policy_version=0,
    )
    batch = pack([rollout])
    assert batch.token_ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 30, 31]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 2, 2]]
    assert batch.visible_prefix.tolist() == [[1, 2, 3, 4, 5, 6, 2, 2, 4, 4]]
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


def test_mask_equals_a_loop_over_tokens(rollouts: list[Rollout]) -> None:
    mask = dense_mask(pack(rollouts))
    assert mask.shape == (4, 1, 31, 31)
    for row, rollout in enumerate(rollouts):
        tokens = row_tokens(rollout)
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                expected = slow_may_attend(rollout, query, key)
                assert mask[row, 0, i, j] == expected, f"row {row}: {query} -> {key}"


def test_padding_is_seen_by_padding_only_and_no_query_is_blind(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts)
    mask = dense_mask(batch)[:, 0]
    for row, rollout in enumerate(rollouts):
        length = len(row_tokens(rollout))
        assert (batch.segment[row, length:] == -1).all()
        assert not mask[row, :length, length:].any()
        assert not mask[row, length:, :length].any()
    assert mask.any(-1).all()  # a softmax over nothing is NaN, and spreads


def test_tokens_positions_and_predictors_equal_the_transcription(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts)
    expected_windows, expected_predictions = [], []
    window = -1
    for row, rollout in enumerate(rollouts):
        tokens = row_tokens(rollout)
        assert batch.token_ids[row, : len(tokens)].tolist() == [token.token_id for token in tokens]
        anchors = rollout.document.anchors
        positions = [t.step if t.group == -1 else int(anchors[t.group]) + t.step for t in tokens]
        assert batch.positions[row, : len(tokens)].tolist() == positions
        for column, token in enumerate(tokens):
            if token.group >= 0:
                window += token.step == 0
                expected_windows.append((row, column, window))
                expected_predictions.append((row, slow_predictor(rollout, tokens, token), token.token_id))
    windows, predictions = batch.completions, batch.completion_tokens
    assert triples(windows.row, windows.column, windows.window) == expected_windows
    assert windows.num_windows == window + 1 == 11
    assert triples(predictions.row, predictions.predictor, predictions.target) == expected_predictions


def test_document_tokens_are_predicted_by_their_neighbor_after_the_prompt(rollouts: list[Rollout]) -> None:
    predictions = pack(rollouts).document_tokens
    expected = [
        (row, position - 1, int(rollout.document.token_ids[position]))
        for row, rollout in enumerate(rollouts)
        for position in range(len(rollout.document.token_ids))
        if position >= 1 and position >= rollout.document.num_prompt_tokens
    ]
    assert triples(predictions.row, predictions.predictor, predictions.target) == expected
    assert len(expected) == 11 + 3 + 7 + 4


def test_ground_truth_is_the_document_from_the_anchor_on(rollouts: list[Rollout]) -> None:
    windows = pack(rollouts).ground_truth
    expected, window = [], 0
    for row, rollout in enumerate(rollouts):
        document = rollout.document
        for anchor in document.anchors.tolist():
            in_document = [p for p in range(anchor, anchor + document.horizon) if p < len(document.token_ids)]
            expected += [(row, position, window) for position in in_document]
            window += 1
    assert triples(windows.row, windows.column, windows.window) == expected
    assert windows.num_windows == window == 4
    assert [int((windows.window == w).sum()) for w in range(4)] == [
        4,
        4,
        2,
        3,
    ]  # 2 and 3: cut by the document's end


def test_documents_without_completions_make_plain_causal_rows(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts[2:])
    assert batch.token_ids.shape == (2, 8)
    assert batch.completions.num_windows == batch.ground_truth.num_windows == 0
    assert batch.completion_tokens.target.shape == batch.completions.window.shape == (0,)
    assert torch.equal(dense_mask(batch)[0, 0], torch.ones(8, 8).tril().bool())


def test_rows_do_not_depend_on_their_neighbors(rollouts: list[Rollout]) -> None:
    together, width = pack(rollouts), 13
    alone = pack(rollouts[1:2])
    for name in ("token_ids", "positions", "visible_prefix", "segment"):
        assert torch.equal(getattr(together, name)[1, :width], getattr(alone, name)[0])
    assert torch.equal(dense_mask(together)[1, :, :width, :width], dense_mask(alone)[0])
    assert torch.equal(together.completion_tokens.target[together.completions.row == 1], alone.completion_tokens.target)


def test_predicate_equals_the_dense_mask_on_index_tensors(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts)
    allowed = may_attend(batch.visible_prefix, batch.segment)
    rows, length = batch.token_ids.shape
    indices = torch.cartesian_prod(torch.arange(rows), torch.tensor([5]), *[torch.arange(length)] * 2)
    flat = allowed(*indices.unbind(-1))
    assert torch.equal(flat.reshape(rows, 1, length, length), dense_mask(batch))
    one = [allowed(*index) for index in indices[::97].unsqueeze(-1).unbind(0)]
    assert torch.equal(torch.cat(one), flat[::97])


def test_block_mask_covers_exactly_the_blocks_in_use(
    make_rollout: Callable[..., Rollout], unchecked_packing: ModuleType
) -> None:
    """A block of the sparse mask is computed if and only if some query in it may attend to some key in it."""
    long = make_rollout(
        num_tokens=300, anchors=[20, 150, 280], lengths=[[60, 70], [64, 64], [33, 80]], horizon=80, seed=4
    )
    short = make_rollout(num_tokens=40, anchors=[30], lengths=[[7, 9]], horizon=9, seed=5)
    batch = pack([long, short])
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


def test_moving_a_batch_moves_every_tensor(rollouts: list[Rollout]) -> None:
    moved = pack(rollouts).to("meta")
    tensors = list(tensors_in(moved))
    assert len(tensors) == 4 + 3 + 3 + 3 + 3
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.completions.num_windows, moved.ground_truth.num_windows) == (11, 4)


def tensors_in(batch: PackedBatch) -> list[Tensor]:
    values = [getattr(batch, field.name) for field in fields(batch)]
    parts = [value for value in values if not isinstance(value, Tensor)]
    values += [getattr(part, field.name) for part in parts for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def triples(*columns: Tensor) -> list[tuple[int, ...]]:
    return list(zip(*[column.tolist() for column in columns], strict=True))
