"""The trained network as the learner sees it: packed rows in, log-probabilities out."""

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from feature_server.packing import PackedBatch, Predictions, attention_mask
from learner.logprobs import token_logprobs

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedModel

LOGITS_CHUNK_TOKENS = 1024
"""Positions whose logits stand in memory at once: 0.6 GB in float32 for a vocabulary of 150,000."""


class PackedPolicy(nn.Module):
    """A causal language model of transformers whose forward returns log-probabilities of chosen tokens.

    Parameter names are those of the wrapped model behind the prefix `causal_lm.`.
    """

    causal_lm: "PreTrainedModel"

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        attention: str,
        logits_chunk_tokens: int = LOGITS_CHUNK_TOKENS,
        num_token_ids: int | None = None,
    ) -> None:
        """`num_token_ids`: ids from this one on have no probability, as in the engine; None: all have."""
        super().__init__()
        self.num_token_ids = num_token_ids
        self.causal_lm = cast("PreTrainedModel", causal_lm)
        self._attention = attention
        self._chunk_tokens = logits_chunk_tokens

    def forward(
        self, batch: PackedBatch, temperature: float
    ) -> tuple[Float[Tensor, " completion_token"], Float[Tensor, " document_token"]]:
        """Log-probs [nats] of the sampled tokens, at the sampling temperature, and of the document's, at 1."""
        hidden = self.causal_lm.base_model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=attention_mask(batch, self._attention),
            use_cache=False,
        ).last_hidden_state
        return (
            self._logprobs(hidden, batch.completion_tokens, temperature),
            self._logprobs(hidden, batch.document_tokens, 1.0),
        )

    def _logprobs(
        self, hidden: Float[Tensor, "row token hidden"], predictions: Predictions, temperature: float
    ) -> Float[Tensor, " prediction"]:
        if len(predictions.target) == 0:
            return hidden.new_zeros(0, dtype=torch.float32)
        head = self.causal_lm.get_output_embeddings()
        assert head is not None, "a causal language model has one"
        return token_logprobs(
            hidden[predictions.row, predictions.predictor],
            predictions.target,
            head=lambda hidden_chunk: head(hidden_chunk)[..., : self.num_token_ids],
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
        )


def causal_logprobs(policy: PackedPolicy, token_ids: Int[Tensor, "text token"]) -> Float[Tensor, "text token-1"]:
    """Log-probabilities of tokens 1..T-1 of plain texts, by the model's own causal forward.

    What follows a text in its row changes nothing before it, so texts of unequal lengths are filled up with any token.
    """
    logits = policy.causal_lm(input_ids=token_ids, use_cache=False).logits[:, :-1, : policy.num_token_ids].float()
    return logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
