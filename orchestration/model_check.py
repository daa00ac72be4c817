"""What a run refuses of its models by their configurations and tokenizers alone, before any process starts."""

from typing import TYPE_CHECKING

from actors.models.pretrained import num_token_ids, require_same_tokenizer, resolve_model
from feature_server.packed_forward import require_packable
from orchestration.config import RunConfig

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedConfig


def require_usable_models(config: RunConfig, policy: str) -> None:
    """`policy`: resolved.

    Raises: ValueError, naming the model type and the key, for a model that packed rows do not fit, for documents beyond
    its positions, for a policy with fewer rows than token ids, and for tokenizers that differ; OSError as
    `resolve_model`.
    """
    from transformers import AutoConfig

    policy_config = AutoConfig.from_pretrained(policy, trust_remote_code=False)
    require_packable(policy_config, config.model.attention)
    _require_positions(policy_config, config)
    _require_rows(policy_config, num_token_ids(policy))
    if config.model.feature_model is None:
        return
    feature_model = resolve_model(config.model.feature_model)
    if config.feature.foreign_tokenizer == "refuse":
        require_same_tokenizer(policy, feature_model)
    require_packable(AutoConfig.from_pretrained(feature_model, trust_remote_code=False), config.model.attention)


def _require_positions(policy: "PreTrainedConfig", config: RunConfig) -> None:
    text, data = policy.get_text_config(), config.data
    limit, needed = getattr(text, "max_position_embeddings", None), data.longest_tokens
    is_scaled = "factor" in str(getattr(text, "rope_parameters", None))  # the engine knows by how much
    if limit is not None and needed > limit and not is_scaled:
        raise ValueError(
            f"data.document_tokens={data.document_tokens} and data.horizon={data.horizon} need {needed} positions, and "
            f"model type {policy.model_type!r} was made for {limit} (max_position_embeddings); lower "
            "data.document_tokens, or choose a model for longer texts"
        )


def _require_rows(policy: "PreTrainedConfig", num_ids: int) -> None:
    rows = policy.get_text_config().vocab_size
    if rows < num_ids:
        raise ValueError(
            f"the policy's tokenizer has {num_ids} token ids, and model type {policy.model_type!r} has rows for {rows} "
            "of them (vocab_size): they do not belong together; give model.policy a folder whose tokenizer is its own"
        )
