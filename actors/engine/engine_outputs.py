"""From the finished requests of vLLM to the arrays and messages of this project.

The protocols are what is read of vLLM's classes, in their words: importing these takes 10 s.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from actors.engine.request_batch import Finished
from actors.rollout import Rollout, Ticket, WeightSteps


@runtime_checkable
class TokenLogprob(Protocol):
    """`Logprob`."""

    logprob: float


@runtime_checkable
class SampledLogprobs(Protocol):
    """`FlatLogprobs` of a request with logprobs=0."""

    logprobs: Sequence[float]
    """One for each token [nats]."""


@runtime_checkable
class VersionSpan(Protocol):
    """`WeightVersionSpan`: tokens start..end-1 were sampled by weights of this version."""

    version: str
    start: int
    end: int


@runtime_checkable
class Completion(Protocol):
    """`CompletionOutput`."""

    index: int
    """Its place in the group."""
    token_ids: Sequence[int]
    logprobs: SampledLogprobs | None
    weight_versions: Sequence[VersionSpan]


@runtime_checkable
class FinishedRequest(Finished, Protocol):
    """`RequestOutput`."""

    prompt_token_ids: Sequence[int]
    prompt_logprobs: Sequence[Mapping[int, TokenLogprob]]
    """By token id; where the first token stands there is None."""
    outputs: Sequence[Completion]


def prompt_logprobs(output: FinishedRequest) -> np.ndarray:
    """[T - 1] float32, nats: tokens 1..T-1 of the prompt of a vLLM request that asked for them."""
    positions = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return np.array([position[token].logprob for position, token in positions], dtype=np.float32)


def rollout_of(
    ticket: Ticket, outputs: Sequence[FinishedRequest], *, sample_s: float, weight_steps: WeightSteps
) -> Rollout:
    """The record of one ticket from the finished vLLM requests of its contexts, in order.

    Raises: ValueError if the engine left out log-probs.
    """
    shape = (len(outputs), ticket.completions_per_context, ticket.document.horizon)
    completion_ids, token_versions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    logprobs = np.zeros(shape, dtype=np.float32)
    lengths = np.zeros(shape[:2], dtype=np.int64)
    for group, output in enumerate(outputs):
        for completion in output.outputs:
            ids, place = completion.token_ids, (group, completion.index)
            lengths[place] = len(ids)
            completion_ids[place][: len(ids)] = ids
            logprobs[place][: len(ids)] = completion_logprobs(completion, ticket=ticket, group=group)
            for span in completion.weight_versions:
                token_versions[place][span.start : span.end] = int(span.version)
    return Rollout(
        ticket_id=ticket.ticket_id,
        document=ticket.document,
        completion_ids=completion_ids,
        completion_lengths=lengths,
        # Rounding may lift a certain token just above 0; anything more is refused by the message itself.
        behavior_logprobs=np.where(logprobs < 1e-5, np.minimum(logprobs, 0), logprobs),
        token_versions=token_versions,
        sample_s=sample_s,
        weight_steps=weight_steps,
    )


def completion_logprobs(completion: Completion, *, ticket: Ticket, group: int) -> Sequence[float]:
    """Log-probabilities [nats] of a vLLM completion's tokens.

    Raises: ValueError if the engine left them out, or some of them.
    """
    num_tokens = len(completion.token_ids)
    if completion.logprobs is None or len(completion.logprobs.logprobs) != num_tokens:
        found = "none" if completion.logprobs is None else len(completion.logprobs.logprobs)
        raise ValueError(
            f"ticket {ticket.ticket_id}: completion {completion.index} of group {group} has {num_tokens} tokens and "
            f"{found} log-probs from the engine; every sampled token needs its own, so use an engine that honours "
            "logprobs=0 and flat_logprobs=True"
        )
    return completion.logprobs.logprobs
