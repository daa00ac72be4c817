"""What hosts the processes of a run: a Ray cluster, or the process of the command itself."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager

import ray

from orchestration.cluster.cluster import Cluster
from orchestration.cluster.one_process import OneProcess
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig
from orchestration.ray_addresses import address_to_join, require_answer

logger = logging.getLogger(__name__)


@contextmanager
def hosting(config: RunConfig) -> Iterator[RoleStarter]:
    """Join the cluster, or start one on this machine; everything it starts ends with the context.

    Raises: ConnectionError, before anything is started, if no cluster answers where one is to be joined.
    """
    if config.placement.one_process:
        with closing(OneProcess(config.placement)) as starter:
            yield starter
        return
    _join_or_start(log_to_driver=config.logging.worker_output)
    try:
        timeout_s = config.asynchrony.request_timeout_s
        with closing(Cluster(config.placement, timeout_s=timeout_s, with_verifiers=config.verifies)) as starter:
            yield starter
    finally:
        ray.shutdown()


def _join_or_start(*, log_to_driver: bool) -> None:
    address = address_to_join()
    if address is not None:
        require_answer(address)
    ray.init(
        address=address or "local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=log_to_driver
    )
    logger.info("%s Ray at %s", "joined" if address else "started", ray.get_runtime_context().gcs_address)
