"""Anchors against the published numbers, and against the rule that blocks tile the document."""

import re
from itertools import pairwise

import numpy as np
import pytest

from actors.data.blocks import anchors_within_texts, num_blocks, strided_anchors


@pytest.mark.parametrize(
    ("document_tokens", "context_tokens", "horizon", "stride", "blocks"),
    [(1024, 8, 8, 8, 127), (1024, 4, 4, 2, 509), (6, 2, 2, 2, 2), (12, 8, 4, 4, 1)],
)
def test_published_numbers_of_blocks(document_tokens, context_tokens, horizon, stride, blocks):
    assert num_blocks(document_tokens, context_tokens, horizon, stride) == blocks


def test_anchors_of_the_smallest_example():
    assert strided_anchors(6, 2, 2, 2).tolist() == [2, 4]


@pytest.mark.parametrize(("document_tokens", "context_tokens", "horizon", "stride"), [(1024, 8, 8, 8), (21, 3, 5, 1)])
def test_blocks_start_at_the_context_and_end_with_the_document(document_tokens, context_tokens, horizon, stride):
    anchors = strided_anchors(document_tokens, context_tokens, horizon, stride).tolist()
    assert anchors[0] == context_tokens
    assert anchors[-1] + horizon == document_tokens
    assert {after - before for before, after in pairwise(anchors)} == {stride}


@pytest.mark.parametrize(
    ("document_tokens", "context_tokens", "horizon", "stride"),
    [(1023, 8, 8, 8), (1025, 8, 8, 8), (7, 2, 2, 2), (3, 2, 2, 2), (10, 8, 8, 8)],
)
def test_lengths_that_do_not_fit_are_refused_with_near_ones_that_do(document_tokens, context_tokens, horizon, stride):
    with pytest.raises(ValueError, match="would fit") as refusal:
        strided_anchors(document_tokens, context_tokens, horizon, stride)
    lower, upper = map(int, re.search(r"document_tokens=(\d+) or (\d+) would fit", str(refusal.value)).groups())
    assert upper - lower == stride
    assert lower < document_tokens < upper or document_tokens < lower == context_tokens + horizon
    for fitting in (lower, upper):
        assert num_blocks(fitting, context_tokens, horizon, stride) >= 1


@pytest.mark.parametrize("seed", range(20))
def test_kept_blocks_are_those_that_a_loop_over_tokens_keeps(seed):
    random = np.random.default_rng(seed)
    num_tokens, context_tokens, horizon = 40, int(random.integers(1, 6)), int(random.integers(1, 6))
    starts = [0, *sorted(random.choice(np.arange(1, num_tokens), size=4, replace=False).tolist())]
    text_of = [sum(1 for start in starts if start <= position) for position in range(num_tokens)]
    anchors = np.arange(context_tokens, num_tokens - horizon + 1)
    kept = anchors_within_texts(
        anchors, np.array(starts), document_tokens=num_tokens, context_tokens=context_tokens, horizon=horizon
    )
    expected = [a for a in anchors.tolist() if len(set(text_of[a - context_tokens : a + horizon])) == 1]
    assert kept.tolist() == expected
    assert 0 < len(expected) < len(anchors)


def test_a_text_that_holds_one_block_exactly_keeps_it():
    limits = {"document_tokens": 12, "context_tokens": 3, "horizon": 2}
    anchors = np.arange(3, 11)
    assert anchors_within_texts(anchors, np.array([0, 5, 9]), **limits).tolist() == [3]
    assert anchors_within_texts(anchors, np.array([0, 4, 9]), **limits).tolist() == [7]
    assert anchors_within_texts(anchors, np.array([0, 4, 8]), **limits).tolist() == []
    assert anchors_within_texts(anchors, np.array([0]), **limits).tolist() == anchors.tolist()
