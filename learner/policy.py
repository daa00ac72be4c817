"""The trained network as the learner sees it: packed rows in, log-probabilities out.

Guarantee: the network computes as it does when it samples, in every mode. What its causal model does behind the base
model (a head, a scale, a soft cap) is the causal model's own code, windows are its own (`packed_forward`), and nothing
is random: dropout and its like belong to the training of other objectives.
"""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from actors.config import Dtype
from actors.models.loading import load_causal_lm
from actors.models.pretrained import num_token_ids
from feature_server.forward_check import check_rollout, require_rounding, separate_sequences
from feature_server.packed_forward import packed_forward, require_packable
from feature_server.packing import PackedBatch, Predictions, pack
from learner.logprobs import token_logprobs

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

LOGITS_CHUNK_TOKENS = 1024
"""Positions whose logits stand in memory at once: 0.6 GB in float32 for a vocabulary of 150,000."""


def base_model(causal_lm: "PreTrainedModel") -> tuple[str, "PreTrainedModel"]:
    """Name and module of what maps token ids to hidden states: the one model inside the causal language model.

    Raises: ValueError, naming the model type, if there is none, or more than one.
    """
    from transformers import PreTrainedModel

    inside = [(name, child) for name, child in causal_lm.named_children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise ValueError(
            f"model type {causal_lm.config.model_type!r} has {len(inside)} models inside its causal language model "
            "instead of one base model; choose another model"
        )
    return inside[0]


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
        self.is_sharded = False
        """ZeRO-3 on several ranks: every call of the head gathers it, so all ranks must call it equally often."""
        self._checkpointed: tuple[nn.Module, ...] = ()
        self.train(self.training)

    def train(self, mode: bool = True) -> "PackedPolicy":
        """Set the mode of this module; the network inside stays in evaluation mode, without dropout."""
        super().train(mode)
        self.causal_lm.eval()
        for block in self._checkpointed:
            block.training = mode
        return self

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside blocks; the backward pass computes them again.

        Raises: ValueError if the model's blocks cannot.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = tuple(module for module in self.causal_lm.modules() if isinstance(module, GradientCheckpointingLayer))
        if not blocks:
            raise ValueError(
                f"model type {self.causal_lm.config.model_type!r} has no blocks that can be computed again; "
                "set learner.gradient_checkpointing=false"
            )
        self.causal_lm.gradient_checkpointing_enable()
        for block in blocks:
            _evaluate_inside(block)
        self._checkpointed = blocks
        self.train(self.training)

    def forward(
        self, batch: PackedBatch, temperature: float
    ) -> tuple[Float[Tensor, " completion_token"], Float[Tensor, " document_token"]]:
        """Log-probs [nats] of the sampled tokens, at the sampling temperature, and of the document's, at 1."""
        name, base = base_model(self.causal_lm)
        output = packed_forward(base, batch, self._attention)
        hidden, head = output.last_hidden_state, CausalHead(self.causal_lm, name, output)
        assert hidden is not None, "a base model returns it"
        return (
            self._logprobs(hidden, head, batch.completion_tokens, temperature),
            self._logprobs(hidden, head, batch.document_tokens, 1.0),
        )

    def _logprobs(
        self,
        hidden: Float[Tensor, "row token hidden"],
        head: "CausalHead",
        predictions: Predictions,
        temperature: float,
    ) -> Float[Tensor, " prediction"]:
        num_chunks = self._num_chunks(len(predictions.target), hidden.device)
        if num_chunks == 0:
            return hidden.new_zeros(0, dtype=torch.float32)
        return token_logprobs(
            hidden[predictions.row, predictions.predictor],
            predictions.target,
            head=lambda hidden_chunk: head(hidden_chunk)[..., : self.num_token_ids],
            temperature=temperature,
            num_chunks=num_chunks,
        )

    def _num_chunks(self, num_predictions: int, device: torch.device) -> int:
        """As many as bound the memory; where the head is sharded, as many as any rank needs."""
        own = -(-num_predictions // self._chunk_tokens)
        if not self.is_sharded:
            return own
        most = torch.tensor(own, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)


def load_policy(folder: str, *, dtype: Dtype, attention: str) -> PackedPolicy:
    """The initial policy, in a resolved model's folder.

    Raises: ValueError, naming the model type, for a model that packed rows do not fit, or the tensors that its files
    lack or hold beside its own.
    """
    from transformers import AutoConfig

    require_packable(AutoConfig.from_pretrained(folder, trust_remote_code=False), attention)
    causal_lm = load_causal_lm(folder, dtype=dtype, attention=attention)
    # Where EOS is also the padding token, transformers would drop the gradient of its embedding; rows are padded by
    # mask here, so no token is padding.
    cast(nn.Embedding, causal_lm.get_input_embeddings()).padding_idx = None
    return PackedPolicy(causal_lm, attention=attention, num_token_ids=num_token_ids(folder))


def saved_buffers(causal_lm: "PreTrainedModel") -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds, such as a router's bias."""
    saved = causal_lm.state_dict().keys()
    return [(name, buffer) for name, buffer in causal_lm.named_buffers() if name in saved]


class CausalHead:
    """All that a causal language model computes behind its base model, by its own forward: hidden states to logits."""

    def __init__(self, causal_lm: "PreTrainedModel", base_name: str, output: "BaseModelOutput") -> None:
        """`base_name`: as `base_model` says. `output`: of it, whose other fields the forward may read."""
        self._output, self._base = output, _HandsOn()
        # A copy shares every parameter, buffer and other module with the model, and their hooks; it leaves the model
        # itself as it is.
        self._causal_lm = copy.copy(causal_lm)
        modules = {**causal_lm._modules, base_name: self._base}
        self._causal_lm._modules = cast("dict[str, nn.Module | None]", modules)

    def __call__(self, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        self._base.output = replace(self._output, last_hidden_state=cast("torch.FloatTensor", hidden[None]))
        return self._causal_lm.forward(inputs_embeds=hidden[None], use_cache=False).logits[0]


class _HandsOn:
    """Stands where the base model was, and for whatever part of it a causal model calls instead of the whole."""

    output: "BaseModelOutput"

    def __call__(self, *inputs: object, **settings: object) -> "BaseModelOutput":
        return self.output

    def __getattr__(self, name: str) -> "_HandsOn":
        return self


def _evaluate_inside(block: nn.Module) -> None:
    """Transformers computes again what is in training mode; so it sees such a block, and the block's forward does not.

    The mode is set back even when the second forward ends early, as it does once all activations are there again.
    """
    modes: list[bool] = []

    def enter(module: nn.Module, inputs: tuple[object, ...]) -> None:
        modes.append(module.training)
        module.training = False

    def leave(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        module.training = modes.pop()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)


def causal_logprobs(
    policy: PackedPolicy, token_ids: Int[Tensor, "text token"], *, first: int = 1, temperature: float = 1.0
) -> Float[Tensor, "text token-{first}"]:
    """Log-probabilities [nats] of the tokens from `first` on of plain texts, by the model's own causal forward.

    What follows a text in its row changes nothing before it, so texts of unequal lengths are filled up with any token.
    """
    keep = token_ids.shape[1] - first + 1
    logits = policy.causal_lm(input_ids=token_ids, use_cache=False, logits_to_keep=keep).logits
    logits = logits[:, -keep:-1, : policy.num_token_ids].float() / temperature
    return logits.log_softmax(-1).gather(-1, token_ids[:, first:, None])[..., 0]


@torch.no_grad()
def check_policy(
    policy: PackedPolicy, *, num_tokens: int, temperature: float, dtype: str, device: torch.device
) -> None:
    """The packed forward, in the mode it is in, against the model's own in evaluation mode, up to that length.

    Raises: ValueError, naming the model type, if their log-probs differ by more than rounding.
    Test: test_packed_forward.py::test_a_model_whose_packed_forward_is_another_is_refused
    """
    config = policy.causal_lm.config
    vocab_size = config.get_text_config().vocab_size
    if policy.num_token_ids is not None:
        vocab_size = min(vocab_size, policy.num_token_ids)
    completions = check_rollout(num_tokens=num_tokens, vocab_size=vocab_size)
    packed, _ = policy(pack([completions]).to(device), temperature)
    own = [
        causal_logprobs(policy, sequence[None].to(device), first=num_context, temperature=temperature)[0]
        for num_context, sequence in separate_sequences(completions)
    ]
    # The temperature divides logits, so their rounding too.
    errors = (packed - torch.cat(own)).abs() * min(1.0, temperature)
    require_rounding(errors, model_type=config.model_type, dtype=dtype, what="log-probs [nats]")
