"""Anchors against the published numbers, and against the rule that blocks tile the document."""

import re
from itertools import pairwise

import pytest

from actors.blocks import num_blocks, strided_anchors


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
