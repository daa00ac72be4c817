"""How closely vLLM and the learner agree at equal weights: log-probs of the same sampled tokens, both ways.

    python benchmarks/engine_agreement.py [--model embedded] [--documents 16] [--temperature 1.0]

The engine samples the completions of held-out documents; the learner computes the log-probs of the same tokens in
packed rows. Printed: mean and largest absolute difference [nats], and the number of tokens.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import tyro  # noqa: E402

from actors.config import DataConfig, RolloutConfig  # noqa: E402
from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT  # noqa: E402
from actors.rollout import Rollout, Ticket  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Compare engine and learner."""

    model: str = "embedded"
    """As `model.policy`."""
    documents: int = 16
    """Held-out documents."""
    temperature: float = 1.0
    """Sampling temperature."""
    dtype: str = "float32"
    """Precision of both."""


def sample(settings: Agreement) -> list[Rollout]:
    """Completions of held-out documents, by a rollout worker in this process."""
    from actors.data.documents import load_documents
    from actors.models.pretrained import load_tokenizer, resolve_model
    from actors.worker import RolloutWorker

    data = DataConfig()
    documents = load_documents(data, load_tokenizer(resolve_model(settings.model))).test
    worker = RolloutWorker(
        model=settings.model,
        config=RolloutConfig(temperature=settings.temperature),
        dtype=settings.dtype,
        max_tokens=data.longest_tokens,
    )
    tickets = [
        Ticket(ticket_id=index, document=documents[index], seed=index, completions_per_context=4, min_policy_version=0)
        for index in range(settings.documents)
    ]
    return worker.sample(tickets)


@torch.no_grad()
def differences(settings: Agreement, rollouts: list[Rollout]) -> torch.Tensor:
    """|engine - learner| of every sampled token [nats]."""
    from transformers import AutoModelForCausalLM

    from actors.models.pretrained import num_token_ids, resolve_model
    from feature_server.packing import pack
    from learner.policy import PackedPolicy

    folder = resolve_model(settings.model)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    policy = PackedPolicy(network, attention="sdpa", num_token_ids=num_token_ids(folder)).eval()
    found = []
    for rollout in rollouts:
        learner, _ = policy(pack([rollout]), settings.temperature)
        found.append((learner - torch.tensor(rollout.behavior_logprobs).flatten()).abs())
    return torch.cat(found)


def main(settings: Agreement) -> None:
    """Print the agreement."""
    os.environ.update(ENGINE_ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENGINE_ENVIRONMENT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = differences(settings, sample(settings))
    print(
        f"{settings.model} {settings.dtype} T={settings.temperature:g}: {found.numel()} sampled tokens, "
        f"|engine - learner| mean {found.mean():.2e}, max {found.max():.2e} nats"
    )


if __name__ == "__main__":
    main(tyro.cli(Agreement))
