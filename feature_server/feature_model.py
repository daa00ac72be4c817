"""The frozen network behind phi: an ordinary transformers model, cut after the deepest layer that is read."""

import time

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.pretrained import resolve_model
from actors.rollout import Rollout
from feature_server.config import FeatureConfig
from feature_server.features import feature_layers, pool, token_features
from feature_server.packing import Windows, attention_mask, pack

BLOCK_LISTS = ("layers", "h")
FINAL_NORMS = ("norm", "ln_f")
"""Names under which Llama-like and GPT-2-like decoders keep their blocks and their last norm."""


def truncate(decoder: nn.Module, num_blocks: int) -> None:
    """Keep the first blocks only and drop the final norm, so that the last output is the bare residual stream.

    Raises: ValueError if the architecture keeps its blocks under a name unknown here.
    """
    blocks = next((name for name in BLOCK_LISTS if hasattr(decoder, name)), None)
    norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)
    if blocks is None or norm is None:
        raise ValueError(
            f"{type(decoder).__name__} has none of {BLOCK_LISTS} or none of {FINAL_NORMS}; "
            "use a Llama-, Qwen2- or GPT-2-type feature model, or add its names in feature_server/feature_model.py"
        )
    setattr(decoder, blocks, getattr(decoder, blocks)[:num_blocks])
    setattr(decoder, norm, nn.Identity())
    decoder.config.num_hidden_layers = num_blocks


class FeatureModel:
    """Maps packed rollouts to features of completions and of ground truth. Never trained, never updated."""

    def __init__(self, model: str, config: FeatureConfig, *, dtype: str) -> None:
        start = time.perf_counter()
        from transformers import AutoModel  # heavy (8 s)

        imported = time.perf_counter()

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._config = config
        network = AutoModel.from_pretrained(
            resolve_model(model), dtype=getattr(torch, dtype), attn_implementation=config.attention
        )
        self._layers = feature_layers(config.depth_fracs, network.config.num_hidden_layers)
        truncate(network, max(1, *self._layers))
        self._model = network.eval().requires_grad_(False).to(self._device)
        self.startup_s = {"imports": imported - start, "model": time.perf_counter() - imported}

    @torch.inference_mode()
    def __call__(
        self, rollouts: list[Rollout]
    ) -> tuple[list[Float[Tensor, "group completion feature"]], list[Float[Tensor, "group feature"]]]:
        """Features [B, n, d] of the completions and [B, d] of the ground truth of each rollout, float32 on the CPU."""
        batch = pack(rollouts).to(self._device)
        output = self._model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=attention_mask(batch, self._config.attention),
            output_hidden_states=True,
            use_cache=False,
        )
        hidden_states = [output.hidden_states[layer] for layer in self._layers]
        completions = self._pool(hidden_states, batch.completions).cpu()
        ground_truth = self._pool(hidden_states, batch.ground_truth).cpu()
        shapes = [rollout.completion_lengths.shape for rollout in rollouts]
        by_rollout = completions.split([groups * n for groups, n in shapes])
        return (
            [f.unflatten(0, (groups, n)) for f, (groups, n) in zip(by_rollout, shapes, strict=True)],
            list(ground_truth.split([groups for groups, _ in shapes])),
        )

    def _pool(self, hidden_states: list[Tensor], windows: Windows) -> Float[Tensor, "window feature"]:
        tokens = [hidden[windows.row, windows.column] for hidden in hidden_states]
        features = token_features(tokens, normalization=self._config.normalization)
        return pool(features, windows.window, windows.num_windows, pooling=self._config.pooling)
