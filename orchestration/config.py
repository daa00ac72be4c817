"""The whole configuration: one frozen tree, checked across its sections before anything starts."""

from pathlib import PurePath
from typing import Literal

import tomli_w
from pydantic import Field, field_validator, model_validator

from actors.config import DataConfig, ModelConfig, RolloutConfig, Settings
from feature_server.config import FeatureConfig, VerifierConfig
from learner.config import LearnerConfig
from orchestration.asynchrony_config import AsynchronyConfig
from orchestration.supervision_config import Chaos, CheckpointConfig, RecoveryConfig, parse_chaos


class RoleSize(Settings):
    """How many processes one role has."""

    count: int = Field(1, gt=0)
    """Processes of this role: rollout workers, feature servers, learner ranks."""


class RoleConfig(RoleSize):
    """Processes of one role, and what each of them reserves."""

    num_cpus: float = Field(1.0, gt=0)
    """CPU cores each reserves; on CPU its tensor kernels take as many threads, but at least one."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs each reserves; a fraction lets several processes share a device."""

    @property
    def threads(self) -> int:
        """Threads of each process's tensor kernels on CPU: more than the free cores would slow all of them down."""
        return max(1, int(self.num_cpus))


class PlacementConfig(Settings):
    """What runs where."""

    rollout: RoleConfig = RoleConfig(num_cpus=1.0)
    """Rollout workers."""
    feature: RoleConfig = RoleConfig(num_cpus=0.25)
    """Feature servers."""
    verifier: RoleConfig = RoleConfig(num_cpus=0.25)
    """Verifier servers; started for the objective `rlvr` only."""
    learner: RoleConfig = RoleConfig(num_cpus=0.5)
    """Learner ranks."""
    tensor_parallel_size: int = Field(1, gt=0)
    """Devices that share one rollout engine; each rollout worker then reserves that many whole GPUs."""
    one_process: bool = False
    """True: everything in the process of the command, one call after the other, without Ray: for debugging.
    Not with a model that vLLM runs by its transformers backend (SmolLM3), which changes classes that the others use."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy over the nodes."""


class EvaluationConfig(Settings):
    """What is measured on held-out documents, before, during and after training."""

    every_steps: int = Field(50, ge=0)
    """Steps between two evaluations; 0: only before and after."""
    documents: int = Field(96, ge=0)
    """Held-out documents; 0: no evaluation at all."""
    split: Literal["validation", "test"] = "validation"
    """`validation` while settings are chosen, `test` for a final confirmation."""


class LoggingConfig(Settings):
    """Where a run writes its results."""

    output_dir: str = "outputs"
    """Folder of all runs; each run makes a folder of its own in it."""
    run_name: str | None = None
    """Name of this run's folder; None: the time of its start."""
    worker_output: bool = False
    """True: also show what the engines print; it is in Ray's session folder in any case."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: not at all, into local files, or to its server. WANDB_PROJECT in the environment names the
    project; without it, async-ebft."""

    @field_validator("run_name")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and (PurePath(name).name != name or name in ("", ".", "..")):
            raise ValueError(
                f"run_name={name!r} must be the name of a folder, without a path; it is made in logging.output_dir"
            )
        return name


class RunConfig(Settings):
    """Asynchronous Energy-Based Fine-Tuning. Without any argument: the embedded model and data on two CPU cores."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the order of the documents and every completion."""
    replay: str | None = None
    """events.jsonl of an earlier run of this configuration: repeat that run bit for bit, whatever the timing."""
    resume: str | None = None
    """Go on from a checkpoint: `auto` continues the run that logging.run_name names, from its newest, or begins it if
    there is none; a path is a run's folder or one checkpoint in it."""
    chaos: str | None = None
    """SEED[:RATE]: faults on purpose, RATE of them per minute (1): processes of the run are killed, stopped or made to
    fail at moments that the seed draws, to see that it survives."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    feature: FeatureConfig = FeatureConfig()
    verifier: VerifierConfig = VerifierConfig()
    learner: LearnerConfig = LearnerConfig()
    asynchrony: AsynchronyConfig = AsynchronyConfig()
    placement: PlacementConfig = PlacementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def faults(self) -> Chaos | None:
        """Those on purpose."""
        return parse_chaos(self.chaos) if self.chaos is not None else None

    @field_validator("chaos")
    @classmethod
    def _a_schedule(cls, chaos: str | None) -> str | None:
        if chaos is not None:
            parse_chaos(chaos)
        return chaos

    @model_validator(mode="after")
    def _chaos_has_victims(self) -> "RunConfig":
        if self.chaos is not None and (self.placement.one_process or self.replay is not None):
            raise ValueError(
                f"chaos={self.chaos!r} ends processes of a run, which one_process and a replay do not survive; leave "
                "it out, or the other"
            )
        return self

    @property
    def verifies(self) -> bool:
        """A verifier scores the completions."""
        return self.learner.objective == "rlvr"

    @model_validator(mode="after")
    def _groups_suffice(self) -> "RunConfig":
        n, coef, objective = self.rollout.completions_per_context, self.learner.diversity_coef, self.learner.objective
        if objective == "ebft" and coef > 0 and n < 3:
            raise ValueError(
                f"learner.diversity_coef={coef} needs rollout.completions_per_context >= 3 (pairs of completions "
                f"without the completion itself), got {n}; raise it, or set learner.diversity_coef=0"
            )
        if objective in ("rlvr", "self_likelihood") and n < 2:
            raise ValueError(
                f"learner.objective={objective!r} needs rollout.completions_per_context >= 2 (the baseline is the mean "
                f"of a completion's siblings), got {n}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _verifier_has_whole_completions(self) -> "RunConfig":
        if self.learner.objective == "rlvr" and self.data.mode != "completion":
            raise ValueError(
                f"learner.objective='rlvr' needs data.mode='completion' (a verifier scores whole completions), got "
                f"{self.data.mode!r}; set --data.mode completion and a data.source of prompts with answers"
            )
        return self

    @model_validator(mode="after")
    def _pool_is_used(self) -> "RunConfig":
        if self.feature.pooled_moment != "initial" and self.learner.whitening != "pooled":
            raise ValueError(
                f"feature.pooled_moment={self.feature.pooled_moment!r} needs learner.whitening='pooled', got "
                f"{self.learner.whitening!r}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _step_divides(self) -> "RunConfig":
        ranks, micro = self.placement.learner.count, self.learner.micro_batch_documents
        if self.learner.documents_per_step % (ranks * micro):
            raise ValueError(
                f"learner.documents_per_step={self.learner.documents_per_step} must be a multiple of "
                f"placement.learner.count={ranks} x learner.micro_batch_documents={micro} = {ranks * micro}: each rank "
                "takes the same number of whole micro-batches; change one of the three"
            )
        return self

    @model_validator(mode="after")
    def _reuse_divides(self) -> "RunConfig":
        uses, documents = self.asynchrony.max_uses, self.learner.documents_per_step
        if documents % uses:
            raise ValueError(
                f"learner.documents_per_step={documents} must be a multiple of asynchrony.max_uses={uses}: one in "
                f"{uses} documents of a step is fresh; change one of the two"
            )
        if uses > 1 and not self.learner.samples:
            raise ValueError(
                f"asynchrony.max_uses={uses} needs rollouts to use again, and learner.objective='sft' samples none; "
                "leave it out"
            )
        return self

    @property
    def without_run_name(self) -> "RunConfig":
        """What repeats the run, from its start, in a folder of its own."""
        return self.model_copy(
            update={"resume": None, "logging": self.logging.model_copy(update={"run_name": None})},
        )

    @model_validator(mode="after")
    def _resume_is_possible(self) -> "RunConfig":
        if self.resume is not None and self.replay is not None:
            raise ValueError("a replay repeats a run from its start, and resume continues one; give one of the two")
        if self.resume == "auto" and self.logging.run_name is None:
            raise ValueError(
                "resume='auto' continues the run that logging.run_name names, which is not given; name it, or give the "
                "path of a run's folder"
            )
        return self

    @model_validator(mode="after")
    def _devices_add_up(self) -> "RunConfig":
        size, gpus = self.placement.tensor_parallel_size, self.placement.rollout.num_gpus
        if max(size, gpus) > 1 and gpus != size:
            raise ValueError(
                f"placement.tensor_parallel_size={size} needs placement.rollout.num_gpus={size} (a whole GPU for each "
                f"part of the engine), got {gpus:g}; set them equal"
            )
        for name, role in (("feature", self.placement.feature), ("learner", self.placement.learner)):
            if role.num_gpus > 1:
                raise ValueError(
                    f"placement.{name}.num_gpus={role.num_gpus:g} must be at most 1: a process of this role uses one "
                    f"device; raise placement.{name}.count instead"
                )
        return self

    @model_validator(mode="after")
    def _weights_reach_workers(self) -> "RunConfig":
        transport, placement = self.asynchrony.weight_transport, self.placement
        learner, rollout = placement.learner.num_gpus, placement.rollout.num_gpus
        given = f"placement.learner.num_gpus={learner:g} and placement.rollout.num_gpus={rollout:g}"
        if transport not in ("object_store", "files") and placement.one_process:
            raise ValueError(
                f"asynchrony.weight_transport={transport!r} connects processes, and placement.one_process=True has "
                "only one; leave out one of the two"
            )
        if transport == "nccl" and not (learner and rollout):
            raise ValueError(
                f"asynchrony.weight_transport='nccl' connects GPUs, got {given}; give both roles GPUs, or set "
                "asynchrony.weight_transport='gloo'"
            )
        if transport == "ipc" and (bool(learner) != bool(rollout) or learner + rollout > 1):
            raise ValueError(
                f"asynchrony.weight_transport='ipc' needs learner and rollout workers on one device, the CPU or shares "
                f"of one GPU, got {given}; set shares that add up to at most 1, or another transport"
            )
        return self


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as TOML that the command reads back to an equal tree."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
