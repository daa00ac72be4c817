"""LearnerWorker: one data-parallel rank; every rank is called with the same verbs in the same order.

Lifecycle: construct -> connect -> (train_step -> publish)*, with cross_entropy at any point between.
"""

import socket
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.pretrained import resolve_model
from actors.rollout import Document, unsampled
from actors.weights import WeightManifest
from feature_server.packing import pack
from feature_server.scored_rollout import ScoredRollout
from learner.batch import Judged, MicroBatch, judge, make_micro_batches
from learner.config import LearnerConfig
from learner.engine import LearnerEngine, connect_ranks
from learner.loss import cross_entropy_loss, policy_gradient_loss
from learner.off_policy import CORRECTIONS, effective_sample_frac, sequence_log_ratio
from learner.policy import PackedPolicy
from learner.publish import publish
from learner.reward import cfm_unbiased
from learner.step_metrics import StepMetrics


class LearnerWorker:
    """One rank of the learner."""

    def __init__(self, *, model: str, config: LearnerConfig, dtype: str, temperature: float, seed: int) -> None:
        """Load the initial policy; `connect` must follow before anything else."""
        start = time.perf_counter()
        import deepspeed  # noqa: F401  heavy (3 s), needed by `connect`
        from transformers import AutoModelForCausalLM  # heavy (8 s)

        imported = time.perf_counter()
        torch.manual_seed(seed)
        self._config, self._dtype, self._temperature = config, dtype, temperature
        causal_lm = AutoModelForCausalLM.from_pretrained(
            resolve_model(model), dtype=getattr(torch, dtype), attn_implementation=config.attention
        )
        # Where EOS is also the padding token, transformers would drop the gradient of its embedding; rows are padded
        # by mask here, so no token is padding.
        causal_lm.get_input_embeddings().padding_idx = None
        if config.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable()
        self._policy = PackedPolicy(
            causal_lm, attention=config.attention, logits_chunk_tokens=config.logits_chunk_tokens
        )
        self._policy_version = 0
        self.startup_s = {"imports": imported - start, "model": time.perf_counter() - imported}

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this rank's machine, for all ranks to meet at."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return socket.gethostbyname(socket.gethostname()), listener.getsockname()[1]

    def connect(self, *, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
        """Meet the other ranks and build the DeepSpeed engine."""
        start = time.perf_counter()
        connect_ranks(rank=rank, world_size=world_size, address=address, port=port, timeout_s=timeout_s)
        self._rank, self._world_size = rank, world_size
        self._engine = LearnerEngine(self._policy, self._config, dtype=self._dtype)
        self.startup_s["deepspeed"] = time.perf_counter() - start

    def train_step(self, *scored: ScoredRollout) -> dict[str, float]:
        """One optimizer step; `scored` is this rank's share. Returns the whole step's metrics, equal on all ranks.

        Raises: FloatingPointError if the loss is not finite (the step is then not applied).
        """
        start = time.perf_counter()
        judged = [judge(s, self._config) for s in scored]
        batches = make_micro_batches(scored, judged, documents=self._config.micro_batch_documents)
        metrics = StepMetrics()
        self._describe(scored, judged, metrics)
        learning_rate = self._engine.learning_rate
        num_sampled, num_document = self._totals(batches)
        for batch in batches:
            loss = self._loss(batch, num_sampled=num_sampled, num_document=num_document, metrics=metrics)
            self._engine.accumulate(loss)
        self._policy_version += 1
        return metrics.reduce(self._engine.device) | {
            "optim/grad_norm": self._engine.grad_norm(),
            "optim/learning_rate": learning_rate,
            "time/train_s": time.perf_counter() - start,
        }

    def publish(self, probe_ids: list[list[int]]) -> tuple[WeightManifest, list[np.ndarray]] | tuple[None, None]:
        """The current weights, their manifest and probe log-probs: copies, so training goes on at once.

        Every rank must be called (ZeRO-3 gathers); rank 0 returns the weights, the others nothing.
        """
        return publish(self._engine, policy_version=self._policy_version, probe_ids=probe_ids, rank=self._rank)

    @torch.no_grad()
    def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        """Mean cross-entropy [nats per token] of each document's ground truth, in order, under the current weights.

        Every rank computes all of them: ZeRO-3 needs the ranks to run the same forwards.
        """
        policy = self._engine.policy.eval()
        values = []
        for document in documents:
            batch = pack([unsampled(document)]).to(self._engine.device)
            values.append(-policy(batch, self._temperature)[1].mean().item())
        policy.train()
        return values

    def _loss(self, batch: MicroBatch, *, num_sampled: int, num_document: int, metrics: StepMetrics) -> Tensor:
        """This micro-batch's part of the step's loss."""
        config, packed = self._config, batch.packed.to(self._engine.device)
        sampled_logprobs, document_logprobs = self._engine(packed, self._temperature)
        metrics.mean("loss/cross_entropy", -document_logprobs)
        loss = sampled_logprobs.sum() * 0
        if config.cross_entropy_coef:
            loss = loss + config.cross_entropy_coef * cross_entropy_loss(document_logprobs, num_tokens=num_document)
        if config.policy_gradient_coef and num_sampled:
            windows = packed.completions
            log_ratio = sequence_log_ratio(
                sampled_logprobs.detach(), batch.behavior_logprobs.to(packed.token_ids.device),
                windows.window, windows.num_windows,
            )  # fmt: skip
            weights = CORRECTIONS[config.correction](log_ratio, max_importance_weight=config.max_importance_weight)
            weighted = (weights * batch.advantage.to(weights.device))[windows.window]
            policy_gradient = policy_gradient_loss(sampled_logprobs, weighted, num_tokens=num_sampled)
            loss = loss + config.policy_gradient_coef * policy_gradient
            self._describe_weights(log_ratio, weights, metrics)
        return loss

    def _totals(self, batches: Sequence[MicroBatch]) -> tuple[int, int]:
        """Sampled tokens and document tokens of the whole step, over all ranks: the loss's denominators."""
        counts = torch.tensor(
            [
                sum(len(b.packed.completion_tokens.target) for b in batches),
                sum(len(b.packed.document_tokens.target) for b in batches),
            ],
            device=self._engine.device,
        )
        torch.distributed.all_reduce(counts)
        return int(counts[0]), int(counts[1])

    def _describe(self, scored: Sequence[ScoredRollout], judged: Sequence[Judged], metrics: StepMetrics) -> None:
        for one, verdict in zip(scored, judged, strict=True):
            if not len(one.rollout.document.anchors):
                continue  # nothing was sampled for it
            lag = torch.tensor([float(self._policy_version - one.rollout.min_policy_version)])
            metrics.mean("lag/mean", lag)
            metrics.max("lag/max", lag)
            metrics.mean("reward/alignment/mean", verdict.alignment)
            metrics.mean("reward/sibling_similarity/mean", verdict.sibling_similarity)
            metrics.mean("reward/total/mean", verdict.reward)
            metrics.mean("reward/advantage_abs/mean", verdict.advantage.abs())
            if one.raw.products.shape[-1] > 1:  # pairs of completions exist
                metrics.mean("reward/cfm_loss/mean", cfm_unbiased(one.raw))

    def _describe_weights(self, log_ratio: Tensor, weights: Tensor, metrics: StepMetrics) -> None:
        metrics.mean("off_policy/weight/mean", weights)
        metrics.max("off_policy/weight/max", weights)
        metrics.mean("off_policy/ess_frac", effective_sample_frac(weights))
        truncated = log_ratio.exp() > self._config.max_importance_weight
        metrics.mean("off_policy/truncated_frac", truncated.double())
        # k3 = r - 1 - log r with r = learner / behavior: non-negative, its mean under the behavior policy is the KL.
        metrics.mean("off_policy/kl_k3/mean", log_ratio.expm1() - log_ratio)
        metrics.max("off_policy/log_ratio_abs/max", log_ratio.abs())
