"""How each process of a run is made from the configuration: its worker, the worker's arguments, its environment.

Worker classes are imported here; the engines that they start are not, before they start them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from actors.models.pretrained import portable_name
from actors.worker import RolloutWorker
from feature_server.features.server import FeatureServer
from feature_server.verifiers.server import VerifierServer
from learner.worker import LearnerWorker
from orchestration.config import RoleConfig, RunConfig

Worker = TypeVar("Worker", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec(Generic[Worker]):
    """Everything needed to start one more process of a role."""

    name: str
    """What its processes are called, before their number."""
    role: RoleConfig
    build: Callable[[], Worker]
    """Builds the worker, in its process: a partial of its class with all its arguments, so that a type checker sees one
    that is missing."""
    environment: dict[str, str]
    """Environment variables of the process."""

    @property
    def worker_class(self) -> str:
        """Name of the worker's class."""
        built = self.build.func if isinstance(self.build, partial) else self.build
        return built.__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpecs:
    """How to make one more process of each role of this run."""

    worker: ProcessSpec[RolloutWorker]
    server: ProcessSpec[FeatureServer]
    verifier: ProcessSpec[VerifierServer] | None
    """None unless the objective has a verifier."""
    rank: ProcessSpec[LearnerWorker]


def process_specs(config: RunConfig) -> ProcessSpecs:
    """The roles' arguments; each role receives what it needs of the configuration."""
    return ProcessSpecs(
        worker=_rollout_worker(config),
        server=_feature_server(config),
        verifier=_verifier_server(config) if config.verifies else None,
        rank=_learner_rank(config),
    )


def _rollout_worker(config: RunConfig) -> ProcessSpec[RolloutWorker]:
    placement, role = config.placement, config.placement.rollout
    build = partial(
        RolloutWorker,
        model=portable_name(config.model.policy),
        config=config.rollout,
        dtype=config.model.dtype,
        max_tokens=config.data.longest_tokens,
        seed=config.seed,
        tensor_parallel_size=placement.tensor_parallel_size,
        gpu_share=min(1.0, role.num_gpus) or 1.0,
    )
    environment = ENGINE_ENVIRONMENT | ({} if role.num_gpus else CPU_ENGINE_ENVIRONMENT)
    return ProcessSpec(
        name="rollout worker", role=role, build=build, environment=_process_environment(role) | environment
    )


def _feature_server(config: RunConfig) -> ProcessSpec[FeatureServer]:
    role, policy = config.placement.feature, config.model.policy
    build = partial(
        FeatureServer,
        model=portable_name(config.model.feature_model or policy),
        policy=portable_name(policy),
        config=config.feature,
        dtype=config.model.dtype,
        attention=config.model.attention,
        max_tokens=config.data.longest_tokens,
    )
    return ProcessSpec(name="feature server", role=role, build=build, environment=_process_environment(role))


def _verifier_server(config: RunConfig) -> ProcessSpec[VerifierServer]:
    role = config.placement.verifier
    build = partial(VerifierServer, model=portable_name(config.model.policy), config=config.verifier)
    return ProcessSpec(name="verifier server", role=role, build=build, environment=_process_environment(role))


def _learner_rank(config: RunConfig) -> ProcessSpec[LearnerWorker]:
    role = config.placement.learner
    build = partial(
        LearnerWorker,
        model=portable_name(config.model.policy),
        config=config.learner,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        probe_tolerance=config.rollout.probe_tolerance,
        seed=config.seed,
        attention=config.model.attention,
        max_tokens=config.data.longest_tokens,
        weight_transport=config.asynchrony.weight_transport,
        weight_folder=config.asynchrony.weight_folder,
    )
    accelerator = {} if role.num_gpus else {"DS_ACCELERATOR": "cpu"}
    return ProcessSpec(
        name="learner rank", role=role, build=build, environment=_process_environment(role) | accelerator
    )


def _process_environment(role: RoleConfig) -> dict[str, str]:
    """Environment variables of every process of a role, set before its first import."""
    # Spinning threads on busy cores are slower than one, up to ten times.
    threads = {"OMP_NUM_THREADS": str(role.threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "ASYNC_EBFT_CACHE") if key in os.environ}
    # A process that reserves no GPU must not use one that it happens to see.
    no_gpu = {} if role.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return threads | inherited | no_gpu
