"""What a document and a rollout refuse to be, and what the sampler refuses to make one of."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from actors.engine.engine_outputs import completion_logprobs
from actors.rollout import Document, Rollout, Ticket


@pytest.fixture
def document() -> Document:
    """Texts of 4 and 6 tokens, a block in each."""
    return Document(
        document_id="train/3",
        token_ids=np.arange(10, 20),
        anchors=np.array([2, 6]),
        horizon=2,
        ends_with_eos=True,
        text_starts=np.array([0, 4]),
    )


@pytest.fixture
def rollout(document: Document) -> Rollout:
    return Rollout(
        ticket_id=7,
        document=document,
        completion_ids=np.arange(8).reshape(2, 2, 2),
        completion_lengths=np.array([[1, 2], [2, 1]]),
        behavior_logprobs=np.full((2, 2, 2), -0.5, dtype=np.float32),
        token_versions=np.array([[[4, 0], [3, 5]], [[6, 6], [5, 0]]]),
    )


def test_contexts_start_with_their_text(document: Document) -> None:
    assert document.context_starts.tolist() == [0, 4]
    assert [document.context_ids(group).tolist() for group in (0, 1)] == [[10, 11], [14, 15]]
    assert [document.ground_truth_ids(group).tolist() for group in (0, 1)] == [[12, 13], [16, 17]]
    last_of_its_text = replace(document, anchors=np.array([3]), horizon=1)
    assert last_of_its_text.context_ids(0).tolist() == [10, 11, 12]
    one_text = replace(document, text_starts=np.array([0]), anchors=np.array([2, 9]))
    assert one_text.context_ids(1).tolist() == list(range(10, 19))
    assert one_text.ground_truth_ids(1).tolist() == [19]  # the document ends there
    assert replace(document, anchors=np.zeros(0, dtype=np.int64)).context_starts.tolist() == []


@pytest.mark.parametrize("starts", [[1, 4], [0, 4, 4], [0, 6, 4], [0, 10]])
def test_texts_that_do_not_divide_the_document_are_refused(document: Document, starts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"document 'train/3': text_starts must ascend from 0 within its 10 tokens"):
        replace(document, text_starts=np.array(starts))


def test_an_anchor_at_the_start_of_a_text_is_refused(document: Document) -> None:
    with pytest.raises(ValueError, match=r"no anchor may be one of text_starts=\[0, 4\], got anchors \[2, 4\]"):
        replace(document, anchors=np.array([2, 4]))


@pytest.mark.parametrize(("lengths", "found"), [([[0, 2], [2, 1]], "0 to 2"), ([[1, 3], [2, 1]], "1 to 3")])
def test_empty_and_overlong_completions_are_refused(rollout: Rollout, lengths: list[list[int]], found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"document 'train/3': completions must have 1 to 2 tokens \(horizon\), got {found}"
    ):
        replace(rollout, completion_lengths=np.array(lengths))


@pytest.mark.parametrize("logprobs", [None, np.full((2, 2, 2), None), np.full((2, 2, 2), "-1.0")])
def test_missing_logprobs_are_refused(rollout: Rollout, logprobs: object) -> None:
    object.__setattr__(rollout, "behavior_logprobs", logprobs)  # past the type check, which only tests have
    with pytest.raises(ValueError, match="ticket 7: every sampled token needs its behavior log-prob"):
        rollout.__post_init__()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-3])
def test_logprobs_that_are_none_are_refused(rollout: Rollout, value: float) -> None:
    logprobs = rollout.behavior_logprobs.copy()
    logprobs[1, 0, 1] = value
    with pytest.raises(ValueError, match="ticket 7: behavior log-probs must be finite and <= 0"):
        replace(rollout, behavior_logprobs=logprobs)


def test_arrays_whose_shapes_do_not_match_are_refused(rollout: Rollout) -> None:
    wrong: dict[str, tuple[np.ndarray, str]] = {
        "completion_lengths": (np.array([[1, 2]]), r"document 'train/3': completion_ids \(2, 2, 2\) and .*\(1, 2\)"),
        "token_versions": (np.zeros((2, 2), dtype=np.int64), r"ticket 7: completion_ids \(2, 2, 2\), .*\(2, 2\)"),
        "behavior_logprobs": (np.zeros((2, 2), dtype=np.float32), r"ticket 7: .*, behavior_logprobs \(2, 2\) and .*"),
    }
    for name, (array, message) in wrong.items():
        broken = replace(rollout)
        object.__setattr__(broken, name, array)  # past the shape check, which only tests have
        with pytest.raises(ValueError, match=f"{message} have shapes that do not match"):
            broken.__post_init__()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("completion_ids", np.zeros((2, 2, 2), dtype=np.int32)),
        ("completion_lengths", np.ones((2, 2, 1), dtype=np.int64)),
        ("behavior_logprobs", np.zeros((2, 2, 2))),
        ("token_versions", np.zeros((2, 2, 3), dtype=np.int64)),
    ],
)
def test_shapes_and_types_of_a_rollouts_arrays_are_checked_in_tests(
    rollout: Rollout, name: str, array: np.ndarray
) -> None:
    with pytest.raises(TypeCheckError, match=name):
        replace(rollout, **{name: array})


def test_negative_versions_are_refused(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="ticket 7: token_versions must be 0 or more, got -1; they count"):
        replace(rollout, token_versions=np.array([[[4, 0], [3, 5]], [[6, -1], [5, 0]]]))


def test_versions_are_those_of_real_tokens(rollout: Rollout, document: Document) -> None:
    """Past a completion's end may stand anything: here versions older and newer than all others."""
    assert rollout.is_token.tolist() == [[[True, False], [True, True]], [[True, True], [True, False]]]
    for past_end in (0, 9):
        versions = np.where(rollout.is_token, rollout.token_versions, past_end)
        one = replace(rollout, token_versions=versions)
        assert one.completion_versions.tolist() == [[4, 3], [6, 5]]
        assert (one.min_policy_version, one.max_policy_version) == (3, 6)
    summary = replace(rollout, weight_steps=((0, 3), (9, 6))).summary()
    assert (summary.min_policy_version, summary.max_policy_version, summary.num_completion_tokens) == (3, 6, 6)
    assert summary.weight_steps == ((0, 3), (9, 6))
    bare = Rollout(
        ticket_id=7,
        document=replace(document, anchors=np.zeros(0, dtype=np.int64)),
        completion_ids=np.zeros((0, 2, 2), dtype=np.int64),
        completion_lengths=np.zeros((0, 2), dtype=np.int64),
        behavior_logprobs=np.zeros((0, 2, 2), dtype=np.float32),
        token_versions=np.zeros((0, 2, 2), dtype=np.int64),
    )
    assert (bare.min_policy_version, bare.max_policy_version, bare.completion_versions.shape) == (0, 0, (0, 2))


@pytest.mark.parametrize(
    ("oldest", "newest", "allowed"), [(0, None, {0, 1, 2, 3, 4}), (2, None, {2, 3, 4}), (2, 3, {2, 3}), (3, 3, {3})]
)
def test_a_ticket_names_the_weights_that_may_sample_it(
    document: Document, oldest: int, newest: int | None, allowed: set[int]
) -> None:
    ticket = Ticket(
        ticket_id=7,
        document=document,
        seed=0,
        completions_per_context=2,
        min_policy_version=oldest,
        max_policy_version=newest,
    )
    for version in range(5):
        assert ticket.allows(version) == (version in allowed)
        if version in allowed:
            ticket.require_allowed(version)
        elif version < oldest:
            message = f"ticket 7 needs weights of version {oldest} or newer, this worker has {version}; send it the new"
            with pytest.raises(RuntimeError, match=message):
                ticket.require_allowed(version)
        else:
            message = f"ticket 7 needs weights of version {newest} or older, this worker has {version}; send it these"
            with pytest.raises(RuntimeError, match=message):
                ticket.require_allowed(version)


@pytest.mark.parametrize(
    ("flat", "found"), [(None, "none"), (SimpleNamespace(logprobs=[-1.0]), "1"), (SimpleNamespace(logprobs=[]), "0")]
)
def test_completions_without_logprobs_from_the_engine_are_refused(document: Document, flat: object, found: str) -> None:
    ticket = Ticket(ticket_id=7, document=document, seed=0, completions_per_context=2, min_policy_version=0)
    completion = SimpleNamespace(index=1, token_ids=[5, 6], logprobs=flat, weight_versions=[])
    with pytest.raises(ValueError, match=rf"ticket 7: completion 1 of group 0 has 2 tokens and {found} log-probs"):
        completion_logprobs(completion, ticket=ticket, group=0)
    completion.logprobs = SimpleNamespace(logprobs=[-1.0, -2.0])
    assert completion_logprobs(completion, ticket=ticket, group=0) == [-1.0, -2.0]
