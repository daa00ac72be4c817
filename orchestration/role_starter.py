"""How each role is started: its class, its arguments, and what its process finds in its environment."""

import importlib
import os
import time
from abc import ABC, abstractmethod

from actors.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from orchestration.config import PlacementConfig, RoleConfig

ROLLOUT_WORKER = "actors.worker:RolloutWorker"
FEATURE_SERVER = "feature_server.server:FeatureServer"
VERIFIER_SERVER = "feature_server.verifier_server:VerifierServer"
LEARNER_WORKER = "learner.worker:LearnerWorker"


def build(target: str, kwargs: dict[str, object]) -> tuple[object, float]:
    """An object of the class at import path `module:Class`, and the time its imports took [s]."""
    start = time.perf_counter()
    module, name = target.split(":")
    worker_class = getattr(importlib.import_module(module), name)
    imports_s = time.perf_counter() - start
    return worker_class(**kwargs), imports_s


class RoleStarter(ABC):
    """Starts every role of a run; who hosts the objects is up to the subclass."""

    def __init__(self, placement: PlacementConfig) -> None:
        self._placement = placement

    def start_rollout_workers(self, **kwargs: object) -> list:
        """One RolloutWorker for each place; `kwargs` are its constructor's."""
        kwargs |= {
            "tensor_parallel_size": self._placement.tensor_parallel_size,
            "gpu_share": min(1.0, self._placement.rollout.num_gpus) or 1.0,
        }
        on_cpu = self._placement.rollout.num_gpus == 0
        environment = ENGINE_ENVIRONMENT | (CPU_ENGINE_ENVIRONMENT if on_cpu else {})
        return self._start("rollout worker", self._placement.rollout, ROLLOUT_WORKER, kwargs, environment)

    def start_feature_servers(self, **kwargs: object) -> list:
        """One FeatureServer for each place."""
        return self._start("feature server", self._placement.feature, FEATURE_SERVER, kwargs, {})

    def start_verifier_servers(self, **kwargs: object) -> list:
        """One VerifierServer for each place."""
        return self._start("verifier server", self._placement.verifier, VERIFIER_SERVER, kwargs, {})

    def start_learner_ranks(self, **kwargs: object) -> list:
        """One LearnerWorker for each place, not yet connected to each other."""
        accelerator = {} if self._placement.learner.num_gpus else {"DS_ACCELERATOR": "cpu"}
        return self._start("learner rank", self._placement.learner, LEARNER_WORKER, kwargs, accelerator)

    @abstractmethod
    def put(self, value: object) -> object:
        """A reference to a value, as roles exchange them."""

    @abstractmethod
    async def fetch(self, reference: object) -> object:
        """The value of a reference."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started."""

    @abstractmethod
    def _host(
        self, name: str, role: RoleConfig, target: str, kwargs: dict[str, object], environment: dict[str, str]
    ) -> list:
        """`role.count` objects, each with the verbs of cluster.RemoteObject."""

    def _start(
        self, name: str, role: RoleConfig, target: str, kwargs: dict[str, object], environment: dict[str, str]
    ) -> list:
        return self._host(name, role, target, kwargs, _process_environment(role) | environment)


def _process_environment(role: RoleConfig) -> dict[str, str]:
    """What every process of a role finds in its environment before its first import."""
    # Spinning threads on busy cores are slower than one, up to ten times.
    threads = {"OMP_NUM_THREADS": str(role.threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {key: os.environ[key] for key in ("HF_HUB_OFFLINE", "ASYNC_EBFT_CACHE") if key in os.environ}
    # Who reserves no GPU must not take one it happens to see.
    no_gpu = {} if role.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return threads | inherited | no_gpu
