"""The loss whose gradient is the update (pure).

    loss = - sum_i w_i A_i log pi(token_i) / num_tokens
           - cross_entropy_coef * sum_i log pi(ground truth_i) / num_document_tokens

Denominators are those of the whole optimizer step, over all micro-batches and ranks, and are passed in: how a batch is
cut up cannot change its gradient. A_i and w_i are constants of token i's completion. num_tokens is by default the
number of sampled tokens: EBFT (arXiv:2603.12248), mixed objective, whose gamma is calibrated to that mean. It is itself
drawn where completions end early, and then the expected gradient is not exactly that of the objective; with
`learner.loss_normalization = "horizon"` it is.
"""

from jaxtyping import Float
from torch import Tensor


def policy_gradient_loss(
    logprobs: Float[Tensor, " token"], weighted_advantage: Float[Tensor, " token"], *, num_tokens: int
) -> Float[Tensor, ""]:
    """- sum of weighted_advantage * logprobs over the step's num_tokens sampled tokens; no gradient of advantages."""
    return -(weighted_advantage.detach() * logprobs).sum() / num_tokens


def cross_entropy_loss(logprobs: Float[Tensor, " token"], *, num_tokens: int) -> Float[Tensor, ""]:
    """- sum of the ground truth's log-probabilities over the step's num_tokens document tokens [nats per token]."""
    return -logprobs.sum() / num_tokens
