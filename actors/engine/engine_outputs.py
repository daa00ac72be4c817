"""From the finished requests of vLLM to the arrays and messages of this project."""

from collections.abc import Sequence

import numpy as np

from actors.rollout import Rollout, Ticket, WeightSteps


def prompt_logprobs(output: object) -> np.ndarray:
    """[T - 1] float32, nats: tokens 1..T-1 of the prompt of a vLLM request that asked for them."""
    positions = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return np.array([position[token].logprob for position, token in positions], dtype=np.float32)


def rollout_of(ticket: Ticket, outputs: Sequence, *, sample_s: float, weight_steps: WeightSteps) -> Rollout:
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


def completion_logprobs(completion: object, *, ticket: Ticket, group: int) -> Sequence[float]:
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
