"""LearnerWorker: one data-parallel rank; every rank is called with the same verbs in the same order.

Lifecycle: construct -> connect [-> restore_state] -> (train_step -> publish)*, with cross_entropy and copy_state at any
point between.
"""

import math
import socket
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.config import Dtype, WeightTransport
from actors.models.pretrained import resolve_model
from actors.rollout import Document
from actors.weights.channel import Rendezvous
from actors.weights.host_ip import host_ip
from actors.weights.manifest import Probe, WeightManifest
from actors.weights.object_store import ArrayPart
from actors.weights.parts import Part, unpacked
from actors.weights.sent import ChannelTransport
from actors.weights.transport import KeepingTransport
from actors.weights.transports import TRANSPORTS
from feature_server.packing import pack
from feature_server.scored_rollout import ScoredRollout
from learner.agreement import Agreement
from learner.batch import Example, MicroBatch, make_micro_batches, policy_gradient_tokens
from learner.config import LearnerConfig
from learner.credit import assign_credit
from learner.engine import LearnerEngine, connect_ranks
from learner.loss import cross_entropy_loss, policy_gradient_loss
from learner.objective.importance import ess_learning_rate_scale
from learner.policy import check_policy, load_policy
from learner.publish import publish
from learner.step_metrics import LAG_0, StepMetrics, describe_agreement, describe_credit, describe_weights
from learner.training_state import Progress, TrainingState, copy_training_state, restore_training_state

LEARNER_FOLDER = "learner"
"""Of a checkpoint: what the ranks of the learner write."""


class LearnerWorker:
    """One rank of the learner."""

    def __init__(
        self,
        *,
        model: str,
        config: LearnerConfig,
        dtype: Dtype,
        temperature: float,
        seed: int,
        max_tokens: int,
        attention: str = "sdpa",
        probe_tolerance: float | None = None,
        weight_transport: WeightTransport = "object_store",
        weight_folder: str | None = None,
    ) -> None:
        """Load the initial policy; `connect` must follow before anything else.

        `max_tokens`: of the longest context and completion together. `probe_tolerance`: as in RolloutConfig.
        `weight_folder`: of `files`.
        Raises: ValueError, naming the model type, for a model that packed rows do not fit, or the tensors that its
        files lack or hold beside its own.
        """
        start = time.perf_counter()
        import deepspeed  # noqa: F401  heavy (3 s), needed by `connect`
        import transformers  # noqa: F401  heavy (8 s)

        imported = time.perf_counter()
        torch.manual_seed(seed)
        self._config, self._dtype, self._temperature = config, dtype, temperature
        self._max_tokens = max_tokens
        self._policy = load_policy(resolve_model(model), dtype=dtype, attention=attention)
        if config.gradient_checkpointing:
            self._policy.checkpoint_gradients()
        self._policy_version = 0
        model_type = self._policy.causal_lm.config.model_type
        self._agreement = Agreement(
            dtype=dtype, temperature=temperature, configured=probe_tolerance, model_type=model_type
        )
        self._initial_probe: Probe | None = None
        self._copied_state: TrainingState | None = None
        self._transport_class, self._weight_folder = TRANSPORTS[weight_transport], weight_folder
        self.startup_s = {"imports": imported - start, "model": time.perf_counter() - imported}

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this rank's machine, for the rendezvous of all ranks."""
        with socket.socket() as listener:
            listener.bind((host_ip(), 0))
            return listener.getsockname()

    def connect(self, *, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
        """Join the other ranks, build the DeepSpeed engine, and check the packed forward under it.

        Raises: ValueError as `check_policy`.
        """
        start = time.perf_counter()
        connect_ranks(rank=rank, world_size=world_size, address=address, port=port, timeout_s=timeout_s)
        self._rank = rank
        self._engine = LearnerEngine(self._policy, self._config, dtype=self._dtype)
        self._transport = self._transport_class(device=self._engine.device, folder=self._weight_folder)
        built = time.perf_counter()
        self.startup_s["deepspeed"] = built - start
        check_policy(
            self._policy,
            num_tokens=self._max_tokens,
            temperature=self._temperature,
            dtype=self._dtype,
            device=self._engine.device,
        )
        self.startup_s["forward check"] = time.perf_counter() - built

    def train_step(self, *examples: Example, lags: Sequence[int]) -> dict[str, float]:
        """One optimizer step; `examples` is this rank's share. Returns the whole step's metrics, equal on all ranks.

        `lags`: of each document, the learner steps since the oldest weights that sampled it, as the sender counts.
        Raises: RuntimeError if a rollout's own versions say otherwise; WeightMismatchError as `Agreement`; on every
        rank, StepNotApplied if the loss or the gradient is not finite: the step is then no version, and the next one
        trains as if it had not been.
        """
        start = time.perf_counter()
        self._check_lags(examples, lags)
        batches = make_micro_batches(examples, documents=self._config.micro_batch_documents)
        num_sampled, num_document = self._denominators(batches)
        metrics = StepMetrics()
        for batch in batches:
            sampled_logprobs, document_logprobs = self._engine(batch.packed.to(self._engine.device), self._temperature)
            metrics.mean("loss/cross_entropy", -document_logprobs)
            loss = self._document_loss(document_logprobs, num_tokens=num_document)
            if batch.scored:
                credit = assign_credit(batch, sampled_logprobs, self._config, policy_version=self._policy_version)
                factor = credit.factor.to(sampled_logprobs)
                loss = loss + policy_gradient_loss(sampled_logprobs, factor, num_tokens=num_sampled)
                describe_credit(credit, metrics)
                describe_agreement(batch, sampled_logprobs, metrics, policy_version=self._policy_version)
            metrics.add_loss(loss)
            self._engine.accumulate(loss)
        metrics = metrics.of_all_ranks()
        if math.isfinite(metrics.loss):  # or else `apply` refuses the step
            self._agreement.judge(*metrics.sum_and_count(LAG_0), step=self._policy_version + 1)
        log_ratio = metrics.log_ratios()
        scale = ess_learning_rate_scale(log_ratio) if self._config.ess_learning_rate else 1.0
        learning_rate = self._engine.apply(loss=metrics.loss, learning_rate_scale=scale)
        self._policy_version += 1
        values = metrics.values() | describe_weights(log_ratio, self._config.max_importance_weight)
        return values | {
            "optim/grad_norm": self._engine.grad_norm(),
            "optim/learning_rate": learning_rate,
            "time/train_s": time.perf_counter() - start,
        }

    def publish(self, probe_ids: list[list[int]], part_bytes: int) -> Generator[Part, None, WeightManifest | None]:
        """The current weights in parts; returns their manifest with the probe's log-probs (`learner.publish.publish`).

        Every rank must be called, and read to the end; rank 0 yields the weights and returns a manifest.
        """
        manifest = yield from publish(
            self._engine,
            policy_version=self._policy_version,
            probe_ids=probe_ids,
            rank=self._rank,
            part_bytes=part_bytes,
            transport=self._transport,
            initial_probe=self._initial_probe,
        )
        if manifest is not None:
            self._initial_probe = manifest.initial_probe
        return manifest

    def copy_state(self) -> None:
        """Copy into host memory what the learner needs to go on; every rank must be called, between two steps."""
        progress = Progress(
            policy_version=self._policy_version,
            initial_probe=self._initial_probe,
            agreement=self._agreement.memory,
        )
        self._copied_state = copy_training_state(self._engine, progress)

    def write_state(self, folder: str) -> None:
        """Write this rank's share of what was copied last into `folder`/learner, concurrently with other calls.

        Raises: OSError if it cannot be written; RuntimeError if nothing was copied since the last call.
        """
        copied, self._copied_state = self._copied_state, None  # its memory is free when it is written
        if copied is None:
            raise RuntimeError("the learner's state was not copied since it was last written; call copy_state first")
        copied.write(Path(folder) / LEARNER_FOLDER)

    def restore_state(self, folder: str) -> None:
        """Go on from what `write_state` wrote, after `connect`; every rank must be called.

        Raises: ValueError as `restore_training_state`.
        """
        progress = restore_training_state(self._engine, Path(folder) / LEARNER_FOLDER)
        self._policy_version, self._initial_probe = progress.policy_version, progress.initial_probe
        self._agreement.memory = progress.agreement

    def send_weights(self, policy_version: int, rendezvous: Rendezvous) -> None:
        """Send a published version to the worker that connects at this rendezvous, concurrently with other calls.

        Raises: what `ChannelTransport.send` raises.
        """
        assert isinstance(self._transport, ChannelTransport)
        self._transport.send(policy_version, rendezvous)

    def kept_part(self, policy_version: int, index: int) -> Part:
        """The bytes of one part of a version that stays here, for a process that can neither map nor receive it."""
        assert isinstance(self._transport, KeepingTransport)
        kept = self._transport.kept(policy_version)[index]
        return ArrayPart(unpacked(kept.packed, kept.sizes))

    def discard_weights(self, policy_version: int) -> None:
        """This version will not be requested any more."""
        self._transport.discard(policy_version)

    def discard_all_weights(self) -> None:
        """The run is over: free what is still kept or stored."""
        self._transport.discard_all()

    def close_channel(self, worker: str) -> None:
        """This worker has left."""
        assert isinstance(self._transport, ChannelTransport)
        self._transport.close_channel(worker)

    @torch.no_grad()
    def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        """Mean cross-entropy [nats per token] of each document's ground truth, in order, under the current weights.

        Every rank computes all of them: ZeRO-3 needs the ranks to run the same forwards.
        """
        policy = self._engine.policy.eval()
        values = []
        for document in documents:
            batch = pack([document]).to(self._engine.device)
            values.append(-policy(batch, self._temperature)[1].mean().item())
        policy.train()
        return values

    def _document_loss(self, logprobs: Tensor, *, num_tokens: int) -> Tensor:
        """The cross-entropy's part of the loss; without a weight it is 0 and costs no backward pass."""
        weight = self._config.cross_entropy_weight
        return weight * cross_entropy_loss(logprobs, num_tokens=num_tokens) if weight else logprobs.new_zeros(())

    def _check_lags(self, examples: Sequence[Example], lags: Sequence[int]) -> None:
        for example, promised in zip(examples, lags, strict=True):
            if not isinstance(example, ScoredRollout):
                continue
            rollout = example.rollout
            lag = self._policy_version - rollout.min_policy_version
            if lag != promised:
                raise RuntimeError(
                    f"ticket {rollout.ticket_id} was sampled by version {rollout.min_policy_version} and is trained on "
                    f"at version {self._policy_version}: its lag is {lag}, but the sender counted {promised}"
                )

    def _denominators(self, batches: Sequence[MicroBatch]) -> tuple[int, int]:
        """Of the policy gradient and of the cross-entropy, for the whole step, over all ranks."""
        counts = torch.tensor(
            [
                sum(policy_gradient_tokens(b, self._config.loss_normalization) for b in batches),
                sum(len(b.packed.document_tokens.target) for b in batches),
            ],
            device=self._engine.device,
        )
        torch.distributed.all_reduce(counts)
        return int(counts[0]), int(counts[1])
