"""One run from start to end: check everything, start everything, train, evaluate, save, stop everything."""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path

import ray

from actors.data.documents import DocumentSplits, evenly_spaced, load_documents
from actors.models.pretrained import require_same_tokenizer, resolve_model
from actors.rollout import Document
from feature_server.scored_rollout import unscored
from orchestration.buffer.event_log import Recording
from orchestration.buffer.schedule import Schedule, recording_of
from orchestration.cluster.cluster import Cluster
from orchestration.cluster.one_process import OneProcess
from orchestration.cluster.processes import (
    Processes,
    ProcessSpecs,
    Roles,
    await_startup,
    process_specs,
    roles_of,
    start_processes,
)
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig, dump_config
from orchestration.controller import Controller
from orchestration.evaluation.evaluation import COMPLETIONS_PER_CONTEXT, Evaluator
from orchestration.evaluation.validation import Validation
from orchestration.output.checkpoint import save_checkpoint
from orchestration.output.metrics import JsonLines, MetricsLog, WandbSink
from orchestration.output.progress import ProgressDisplay
from orchestration.output.ray_metrics import RayMetrics
from orchestration.output.report import RunReport
from orchestration.output.run_folder import make_run_folder
from orchestration.roles.weight_sync import WeightSync
from orchestration.roles.whitening_fit import WhiteningFit
from orchestration.scaling import Scaling
from orchestration.start_up import refuse

logger = logging.getLogger(__name__)

PROBE_TEXTS, PROBE_TOKENS = 2, 32
"""Held-out documents, and how much of each: their log-probs check every weight update."""


def run_session(config: RunConfig) -> int:
    """Run and return the exit status; every process it started has ended when it returns."""
    try:
        folder = make_run_folder(config)
        (folder / "config.toml").write_text(dump_config(config))
        model = resolve_model(config.model.policy)
        recording = recording_of(config)
        if config.model.feature_model is not None and config.feature.foreign_tokenizer == "refuse":
            require_same_tokenizer(model, resolve_model(config.model.feature_model))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return refuse(error, what="refused")
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: nobody needs to ask a hub
    logger.info("run folder: %s", folder)
    try:
        Session(config, folder, model, recording).run()
    except (ValueError, RuntimeError, OSError, FloatingPointError, TimeoutError) as error:
        logger.error("the run failed: %s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return 1
    return 0


@contextmanager
def role_starter(config: RunConfig) -> Iterator[RoleStarter]:
    """Who starts the roles: a cluster, or this process. Whatever it started ends with the context."""
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


class Session:
    """Builds the parts of a run and drives them in order."""

    def __init__(self, config: RunConfig, folder: Path, model: str, recording: Recording | None) -> None:
        """`recording`: of the run that this one replays."""
        self._config, self._folder, self._model, self._recording = config, folder, model, recording
        self._report = RunReport(folder, model)

    def run(self) -> None:
        """The whole run; its processes end with it, whatever happens."""
        start = time.perf_counter()
        with role_starter(self._config) as starter:
            specs = process_specs(self._config)
            processes = start_processes(starter, specs)
            documents = self._load_documents()
            asyncio.run(self._train(documents, processes, specs, starter, started=start))

    def _load_documents(self) -> DocumentSplits:
        from transformers import AutoTokenizer

        start = time.perf_counter()
        splits = load_documents(self._config.data, AutoTokenizer.from_pretrained(self._model))
        self._report.startup("documents", {"load": time.perf_counter() - start})
        return splits

    async def _train(
        self,
        documents: DocumentSplits,
        processes: Processes,
        specs: ProcessSpecs,
        starter: RoleStarter,
        *,
        started: float,
    ) -> None:
        config, num_steps = self._config, self._config.learner.num_steps
        held_out = _held_out(documents, config)
        await self._await_startup(processes, started=started)
        roles = roles_of(processes, config, probe_ids=_probe_ids(held_out, documents))
        with (
            ProgressDisplay(num_steps) as display,
            closing(self._metrics_log(display)) as metrics,
            closing(JsonLines(self._folder / "events.jsonl")) as events,
        ):
            schedule = Schedule(config, self._recording, events)
            weight_sync = WeightSync(
                roles.learner, metrics, push=not schedule.names_versions, on_publish=schedule.published
            )
            validation = self._validation(held_out, roles, weight_sync, metrics, starter)
            controller = Controller(
                buffer=schedule.buffer(documents.train),
                rollout_workers=roles.workers,
                scorers=roles.scorers,
                learner=roles.learner,
                weight_sync=weight_sync,
                metrics=metrics,
                documents_per_request=config.rollout.documents_per_request,
                batch_timeout_s=config.asynchrony.request_timeout_s,
                after_step=validation.after_step,
                lag_bound=config.asynchrony.lag_bound,
                without_rollouts=None if config.learner.samples else lambda document: starter.put(unscored(document)),
            )
            whitening = WhiteningFit(config)
            await whitening.fit(documents.train, roles.workers[0], roles.servers)
            await weight_sync.publish()
            scaling = Scaling(starter=starter, controller=controller, roles=roles, specs=specs, whitening=whitening)
            async with AsyncExitStack() as at_end:
                at_end.push_async_callback(roles.learner.release)
                await validation.after_step(0)
                at_end.push_async_callback(self._save, weight_sync, starter)  # after a failure of the loops too
                await controller.run(num_steps, beside=scaling.serve(starter.desk(self._folder.name)))
        self._report.finish(seconds=time.perf_counter() - started)

    async def _await_startup(self, processes: Processes, *, started: float) -> None:
        startup = await await_startup(processes, timeout_s=self._config.asynchrony.request_timeout_s)
        for who, stages in startup.items():
            self._report.startup(who, stages)
        self._report.startup("all ready", {"since start": time.perf_counter() - started})

    def _validation(
        self,
        held_out: list[Document],
        roles: Roles,
        weight_sync: WeightSync,
        metrics: MetricsLog,
        starter: RoleStarter,
    ) -> Validation:
        config = self._config
        evaluator = Evaluator(
            documents=held_out,
            completions_per_context=COMPLETIONS_PER_CONTEXT,
            documents_per_request=config.rollout.documents_per_request,
            workers=roles.workers,
            servers=roles.servers,
            learner=roles.learner,
            sample=weight_sync.sample,
            fetch=starter.fetch,
            clock=time.perf_counter,
        )
        return Validation(
            evaluator,
            metrics,
            self._report,
            every_steps=config.evaluation.every_steps,
            last_step=config.learner.num_steps,
        )

    def _metrics_log(self, display: ProgressDisplay) -> MetricsLog:
        sinks = [JsonLines(self._folder / "metrics.jsonl"), display]
        if self._config.logging.wandb != "off":
            sinks.append(WandbSink(self._config, self._folder))
        if not self._config.placement.one_process:
            sinks.append(RayMetrics(self._folder.name))
        return MetricsLog(sinks)

    async def _save(self, weight_sync: WeightSync, starter: RoleStarter) -> None:
        publication = weight_sync.newest
        save_checkpoint(
            self._folder / "checkpoint",
            manifest=publication.manifest,
            buffers=await publication.buffers(starter.fetch),
            base_model=self._model,
        )


def _held_out(documents: DocumentSplits, config: RunConfig) -> list[Document]:
    split = getattr(documents, config.evaluation.split)
    if len(split) < config.evaluation.documents:
        raise ValueError(
            f"evaluation.documents={config.evaluation.documents}, but the {config.evaluation.split} split holds "
            f"{len(split)}; lower it, or raise data.held_out_frac"
        )
    return evenly_spaced(split, config.evaluation.documents)


def _probe_ids(held_out: list[Document], documents: DocumentSplits) -> list[list[int]]:
    texts = held_out[:PROBE_TEXTS] or [documents.train[0]]
    return [document.token_ids[:PROBE_TOKENS].tolist() for document in texts]
