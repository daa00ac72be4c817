"""How each role is started: its class, its arguments, and what its process finds in its environment."""

import importlib
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from orchestration.config import PlacementConfig, RoleConfig

ROLLOUT_WORKER = "actors.worker:RolloutWorker"
FEATURE_SERVER = "feature_server.features.server:FeatureServer"
VERIFIER_SERVER = "feature_server.verifiers.server:VerifierServer"
LEARNER_WORKER = "learner.worker:LearnerWorker"


def build(target: str, kwargs: dict[str, object]) -> tuple[object, float]:
    """An object of the class at import path `module:Class`, and the time its imports took [s]."""
    start = time.perf_counter()
    module, name = target.split(":")
    worker_class = getattr(importlib.import_module(module), name)
    imports_s = time.perf_counter() - start
    return worker_class(**kwargs), imports_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """All it takes to make one more process of a role."""

    name: str
    """What its processes are called, before their number."""
    role: RoleConfig
    target: str
    """Import path of the class, `module:Class`."""
    kwargs: dict[str, object]
    """Arguments of the class."""
    environment: dict[str, str]
    """What the process finds in its environment."""


def rollout_worker(placement: PlacementConfig, **kwargs: object) -> ProcessSpec:
    """A RolloutWorker; `kwargs` are its constructor's."""
    kwargs |= {
        "tensor_parallel_size": placement.tensor_parallel_size,
        "gpu_share": min(1.0, placement.rollout.num_gpus) or 1.0,
    }
    on_cpu = placement.rollout.num_gpus == 0
    environment = ENGINE_ENVIRONMENT | (CPU_ENGINE_ENVIRONMENT if on_cpu else {})
    return _spec("rollout worker", placement.rollout, ROLLOUT_WORKER, kwargs, environment)


def feature_server(placement: PlacementConfig, **kwargs: object) -> ProcessSpec:
    """A FeatureServer."""
    return _spec("feature server", placement.feature, FEATURE_SERVER, kwargs, {})


def verifier_server(placement: PlacementConfig, **kwargs: object) -> ProcessSpec:
    """A VerifierServer."""
    return _spec("verifier server", placement.verifier, VERIFIER_SERVER, kwargs, {})


def learner_rank(placement: PlacementConfig, **kwargs: object) -> ProcessSpec:
    """A LearnerWorker, not yet connected to the other ranks."""
    accelerator = {} if placement.learner.num_gpus else {"DS_ACCELERATOR": "cpu"}
    return _spec("learner rank", placement.learner, LEARNER_WORKER, kwargs, accelerator)


class RoleStarter(ABC):
    """Who hosts the objects of a run."""

    @abstractmethod
    def start(self, spec: ProcessSpec) -> list:
        """`spec.role.count` objects, each with the verbs of cluster.RemoteObject."""

    @abstractmethod
    async def add(self, spec: ProcessSpec) -> object:
        """One more object while the run lasts.

        Raises: ValueError, with the numbers, if there is no room for it.
        """

    @abstractmethod
    def remove(self, remote: object) -> None:
        """End one of them and give its resources back."""

    @abstractmethod
    def control(self, run: str) -> object | None:
        """Where requests to scale this run are handed in; None: nobody can ask."""

    @abstractmethod
    def put(self, value: object) -> object:
        """A reference to a value, as roles exchange them."""

    @abstractmethod
    async def fetch(self, reference: object) -> object:
        """The value of a reference."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started."""


def _spec(
    name: str, role: RoleConfig, target: str, kwargs: dict[str, object], environment: dict[str, str]
) -> ProcessSpec:
    environment = _process_environment(role) | environment
    return ProcessSpec(name=name, role=role, target=target, kwargs=kwargs, environment=environment)


def _process_environment(role: RoleConfig) -> dict[str, str]:
    """What every process of a role finds in its environment before its first import."""
    # Spinning threads on busy cores are slower than one, up to ten times.
    threads = {"OMP_NUM_THREADS": str(role.threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "ASYNC_EBFT_CACHE") if key in os.environ}
    # Who reserves no GPU must not take one it happens to see.
    no_gpu = {} if role.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return threads | inherited | no_gpu
