"""One run from start to end: check everything, start everything, train, evaluate, save, stop everything."""

import asyncio
import logging
import os
import time
from pathlib import Path

from actors.models.pretrained import resolve_model
from feature_server.verifiers.server import VerifierServer
from orchestration.buffer.event_log import Recording
from orchestration.buffer.schedule import Schedule, recording_of
from orchestration.cluster.hosting import hosting
from orchestration.cluster.process_specs import process_specs
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig, dump_config
from orchestration.evaluation.ground_truth import checked_documents, warn_of_unearned
from orchestration.model_check import require_usable_models
from orchestration.output.checkpoint import save_checkpoint
from orchestration.output.report import RunReport
from orchestration.output.run_folder import make_run_folder, remove_without_results
from orchestration.parts import Parts, RunDocuments, build_parts, load_run_documents, open_logs
from orchestration.roles.processes import Processes, await_startup, start_processes
from orchestration.roles.publications import Publication
from orchestration.roles.weight_sync import WeightSync
from orchestration.start_up import refuse

logger = logging.getLogger(__name__)


def run_session(config: RunConfig) -> int:
    """Run and return the exit status; every process it started has ended when it returns."""
    try:
        folder = make_run_folder(config)
    except OSError as error:
        return refuse(error, what="refused")
    try:
        return _run_in(folder, config)
    finally:
        remove_without_results(folder)


def _run_in(folder: Path, config: RunConfig) -> int:
    try:
        (folder / "config.toml").write_text(dump_config(config.without_run_name))
        model = resolve_model(config.model.policy)
        recording = recording_of(config)
        require_usable_models(config, model)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return refuse(error, what="refused")
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: no hub is needed
    logger.info("run folder: %s", folder)
    try:
        Session(config, folder, model, recording).run()
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        logger.error("the run failed: %s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return 1
    return 0


class Session:
    """Starts the processes of a run, builds its parts, and runs them in order."""

    def __init__(self, config: RunConfig, folder: Path, model: str, recording: Recording | None) -> None:
        """`recording`: of the run that this one replays."""
        self._config, self._folder, self._model, self._recording = config, folder, model, recording
        self._report = RunReport(folder, model)
        self._started_at = time.perf_counter()

    def run(self) -> None:
        """The whole run; its processes end with it, whatever happens."""
        with hosting(self._config) as starter:
            processes = start_processes(starter, process_specs(self._config))
            documents = self._load_documents()  # while the processes start
            asyncio.run(self._run(starter, processes, documents))
            self._report.finish(seconds=time.perf_counter() - self._started_at)

    async def _run(self, starter: RoleStarter, processes: Processes, documents: RunDocuments) -> None:
        await self._await_startup(processes)
        await self._check_ground_truth(processes, documents)
        with open_logs(self._config, self._folder) as (metrics, events):
            parts = build_parts(
                self._config,
                starter=starter,
                processes=processes,
                documents=documents,
                schedule=Schedule(self._config, self._recording, events),
                metrics=metrics,
                report=self._report,
            )
            try:
                await self._verify_start(parts)
                await parts.whitening.fit(documents.train, parts.roles.workers[0], parts.roles.servers)
                await parts.validation.after_step(0)
                await self._train(starter, parts)
            finally:
                await parts.roles.learner.release()

    async def _verify_start(self, parts: Parts) -> None:
        """Every worker samples with version 0 as the learner holds it, or the run ends here."""
        start = time.perf_counter()
        await parts.weight_sync.publish()
        await parts.weight_sync.bring_newest(parts.roles.workers)
        self._report.startup("version 0", {"publish, load and verify": time.perf_counter() - start})

    async def _train(self, starter: RoleStarter, parts: Parts) -> None:
        """All steps, with the evaluations between and after them; the newest weights are saved even if a loop fails."""
        try:
            scaling = parts.scaling.serve(starter.control(str(self._folder)))
            await parts.controller.run(self._config.learner.num_steps, extra_loop=scaling)
        finally:
            await self._save(parts.weight_sync, starter)

    def _load_documents(self) -> RunDocuments:
        start = time.perf_counter()
        documents = load_run_documents(self._config, self._model)
        self._report.startup("documents", {"load": time.perf_counter() - start})
        return documents

    async def _await_startup(self, processes: Processes) -> None:
        startup = await await_startup(processes, timeout_s=self._config.asynchrony.request_timeout_s)
        for who, stages in startup.items():
            self._report.startup(who, stages)
        self._report.startup("run", {"all processes ready": time.perf_counter() - self._started_at})

    async def _check_ground_truth(self, processes: Processes, documents: RunDocuments) -> None:
        for verifier in processes.verifiers[:1]:
            checked = checked_documents(documents.train)
            lines = await verifier.call(VerifierServer.unearned, checked)
            warn_of_unearned(lines, num_checked=len(checked), verifier=self._config.verifier.name)

    async def _save(self, weight_sync: WeightSync[Publication], starter: RoleStarter) -> None:
        publication = weight_sync.newest
        save_checkpoint(
            self._folder / "checkpoint",
            manifest=publication.manifest,
            buffers=await publication.buffers(starter.fetch),
            base_model=self._model,
        )
