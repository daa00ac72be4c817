"""What hosts the processes of a run: a Ray cluster, or the process of the command itself."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager

import ray

from orchestration.cluster.cluster import Cluster
from orchestration.cluster.one_process import OneProcess
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig


@contextmanager
def hosting(config: RunConfig) -> Iterator[RoleStarter]:
    """Join the cluster, or start one on this machine; everything it starts ends with the context."""
    if config.placement.one_process:
        with closing(OneProcess(config.placement)) as starter:
            yield starter
        return
    ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=config.logging.worker_output)
    try:
        timeout_s = config.asynchrony.request_timeout_s
        with closing(Cluster(config.placement, timeout_s=timeout_s, with_verifiers=config.verifies)) as starter:
            yield starter
    finally:
        ray.shutdown()
