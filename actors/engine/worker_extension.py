"""What vLLM loads into every process of the engine, by name: the side of a weight update that touches the model.

It imports nothing of this project but the module beside it, so that it can be imported wherever vLLM starts a process.
"""

import torch

from actors.engine.shadow_weights import PACKED, exchange, make_twin

WEIGHT_RECEIVER = "actors.engine.worker_extension.WeightReceiver"
"""Import path of the worker extension: vLLM imports it by name in every process of the engine."""


class WeightReceiver:
    """vLLM worker extension: its methods run inside each process of the engine.

    Either `receive_weights` between two engine steps; or, on CPU, `prepare_weights` while the engine steps, and
    `exchange_weights` between two steps.
    """

    def receive_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Replace the engine's weights in place by these named tensors.

        `reload_weights` undoes and redoes vLLM's own processing of the weights (on CPU every linear layer is packed);
        loading into the processed parameters would leave the engine half updated.
        """
        if hasattr(self, "_twin"):
            raise RuntimeError(
                "this model has a twin, which vLLM can reload in its place only: use prepare_weights and "
                "exchange_weights"
            )
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        _repack_tied_head(self.model_runner.get_model())

    def prepare_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Load these named tensors into a twin of the model, which the engine does not use."""
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        if not hasattr(self, "_twin"):
            self._twin = make_twin(self.model_runner.get_model())
        with torch.inference_mode():
            reload_weights(
                self.model_runner.vllm_config,
                self._twin,
                weights_iterator=iter(tensors),
                weights_path=None,
                is_checkpoint_format=True,
            )
            _repack_tied_head(self._twin)

    def exchange_weights(self) -> None:
        """Let the engine use what was prepared; the twin keeps what the engine used."""
        exchange(self.model_runner.get_model(), self._twin)


def _repack_tied_head(model: torch.nn.Module) -> None:
    # vLLM 0.32 on CPU reloads the embedding of a tied model but keeps the head's packed copy of the old one: the logits
    # would come from old weights on top of new hidden states. It has packed the embedding as well, to no use but this.
    head = getattr(model, "lm_head", None)
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and next(model.parameters()).device.type == "cpu":
        for embedding in model.modules():
            if embedding is not head and getattr(embedding, "weight", None) is head.weight:
                setattr(head, PACKED, getattr(embedding, PACKED))
