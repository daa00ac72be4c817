"""One run from start to end: check everything, start everything, train, evaluate, save, stop everything.

A learner that is lost is started again, and the run goes back to its last checkpoint: one life after the other, with
the same workers and servers. A signal ends the run in the order of signals.py.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actors.models.pretrained import resolve_model
from feature_server.verifiers.server import VerifierServer
from learner.worker import LearnerWorker
from orchestration.buffer.event_log import Recording
from orchestration.buffer.schedule import Schedule, recording_of
from orchestration.checkpoint.store import CheckpointStore
from orchestration.cluster.hosting import hosting
from orchestration.cluster.process_specs import process_specs
from orchestration.cluster.remote import ProcessFailure, ProcessLost, Remote
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig, dump_config
from orchestration.evaluation.ground_truth import checked_documents, warn_of_unearned
from orchestration.model_check import require_usable_models
from orchestration.output.report import RunReport
from orchestration.output.run_folder import owned, remove_without_results
from orchestration.parts import Parts, Run, RunDocuments, load_run_documents
from orchestration.roles.processes import Processes, await_startup, start_processes
from orchestration.roles.roles import connect_learner
from orchestration.roles.whitening_fit import WhiteningFit
from orchestration.run_logs import Logs, open_logs
from orchestration.start_up import refuse
from orchestration.supervision.chaos import ChaosMonkey, seeded_schedule
from orchestration.supervision.resuming import CHECKPOINTS, Start, require_same_run, start_of
from orchestration.supervision.run_state import Resumed, read_checkpoint
from orchestration.supervision.signals import SAVE_S, StoppedBySignal, StopSignals, stop_signals
from orchestration.supervision.stacks import write_stacks

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Of a learner that was lost, one after the other."""


def run_session(config: RunConfig) -> int:
    """Run and return the exit status; every process it started has ended when it returns."""
    try:
        start = start_of(config)
    except (OSError, ValueError) as error:
        return refuse(error, what="refused")
    try:
        with stop_signals() as signals, owned(start.folder):
            return _run_in(start, config, signals)
    except OSError as error:  # another process is in the folder, or it cannot be written
        return refuse(error, what="refused")
    except StoppedBySignal as stop:
        return 128 + stop.number
    finally:
        remove_without_results(start.folder)


def _run_in(start: Start, config: RunConfig, signals: StopSignals) -> int:
    try:
        if start.checkpoint is None:
            (start.folder / "config.toml").write_text(dump_config(config.without_run_name))
        model = resolve_model(config.model.policy)
        recording = recording_of(config)
        resumed = read_checkpoint(start.checkpoint) if start.checkpoint else None
        require_usable_models(config, model)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return refuse(error, what="refused")
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: no hub is needed
    logger.info("run folder: %s", start.folder)
    session = Session(config, start.folder, model, recording, signals)
    try:
        return session.run(resumed)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        logger.error("the run failed: %s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        session.log_how_to_resume()
        return 1


class Session:
    """Starts the processes of a run, builds its parts, and runs them in order."""

    def __init__(
        self, config: RunConfig, folder: Path, model: str, recording: Recording | None, signals: StopSignals
    ) -> None:
        """`recording`: of the run that this one replays."""
        self._config, self._folder, self._model, self._recording = config, folder, model, recording
        self._signals, self._is_saving = signals, False
        self._report = RunReport(folder, model)
        self._store = CheckpointStore(folder / CHECKPOINTS, keep_last=config.checkpoint.keep)
        self._started_at = time.perf_counter()

    def run(self, resumed: Resumed | None) -> int:
        """The whole run, from its start or from a checkpoint; its processes end with it, whatever happens.

        Returns the exit status.
        """
        with hosting(self._config) as starter:
            self._signals.install()  # Ray has handlers of its own
            processes = start_processes(starter, process_specs(self._config))
            documents = self._load_documents(resumed)  # while the processes start
            try:
                is_done = asyncio.run(self._run(starter, processes, documents, resumed))
            except asyncio.CancelledError:
                logger.error("not saved within %.0f s", SAVE_S)
                is_done = False
            if not is_done:
                self.log_how_to_resume()
                assert self._signals.received is not None, "only a signal stops a run"
                return 128 + self._signals.received
            self._report.finish(seconds=time.perf_counter() - self._started_at)
            return 0

    def log_how_to_resume(self) -> None:
        """If there is something to resume from."""
        if (newest := self._store.newest()) is not None:
            logger.info("to go on from %s: the same command with --resume %s", newest.name, self._folder)

    async def _run(
        self, starter: RoleStarter, processes: Processes, documents: RunDocuments, resumed: Resumed | None
    ) -> bool:
        """True: all steps are done."""
        await self._await_startup(processes)
        await self._check_ground_truth(processes, documents)
        if resumed is not None:
            self._store.set_aside_after(resumed.state.buffer.step)
            self._report.continues(resumed.state.first_evaluation)
            logger.info("going on from %s", resumed.checkpoint)
        self._control = starter.control(str(self._folder))
        with open_logs(self._config, self._folder, resumed) as logs:
            run = Run(
                config=self._config,
                folder=self._folder,
                model=self._model,
                starter=starter,
                documents=documents,
                logs=logs,
                report=self._report,
                store=self._store,
                whitening=WhiteningFit(self._config),
            )
            if resumed is not None:
                run.whitening.moment = resumed.state.whitening_moment
            with self._faults(logs) as self._chaos:
                return await self._live(run, processes, resumed)

    async def _live(self, run: Run, processes: Processes, resumed: Resumed | None) -> bool:
        """One life of the learner after the other."""
        num_restarts, from_step, is_first, wanted = 0, -1, True, None
        while True:
            schedule = Schedule(self._config, self._recording, run.logs.events, continues=resumed is not None)
            parts = Parts(run, processes, schedule, resumed, wanted)
            try:
                return await self._live_once(run, parts, resumed, is_first=is_first)
            except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
                if isinstance(error, TimeoutError):  # nothing gets on
                    await write_stacks(self._folder / "stacks.txt", parts.roles.remotes)
                if not self._may_restart(parts, processes, error, num_restarts):
                    await self._rescue(parts)
                    with suppress(OSError):  # a full disk, which may be the error
                        run.logs.failures.failed("run", error=str(error))
                    raise
                processes, resumed = await self._restarted(run, parts, processes, error)
                wanted = parts.staff.wanted
                step = resumed.state.buffer.step if resumed is not None else 0
                num_restarts, from_step, is_first = 1 if step > from_step else num_restarts + 1, step, False
            finally:
                with suppress(ProcessFailure):  # lost: the cause is known, and nothing of it is left to free
                    await parts.roles.learner.release()

    async def _live_once(self, run: Run, parts: Parts, resumed: Resumed | None, *, is_first: bool) -> bool:
        if resumed is not None:
            await parts.restore(resumed)
        await self._publish_first(parts, to_all=is_first)
        if is_first:  # those that join later, or take another's place, get what these have
            await parts.whitening.fit(run.documents.train, parts.roles.workers[0], parts.roles.servers)
        return await self._train(parts, resumed.state.buffer.step if resumed is not None else 0)

    async def _publish_first(self, parts: Parts, *, to_all: bool) -> None:
        """`to_all`: every worker samples with the weights as the learner holds them, or the run ends here."""
        start = time.perf_counter()
        await parts.weight_sync.publish()
        if to_all:
            await parts.weight_sync.bring_newest(parts.roles.workers)
            self._report.startup("first weights", {"publish, load and verify": time.perf_counter() - start})

    async def _train(self, parts: Parts, steps_done: int) -> bool:
        """The steps that are left, with the evaluations between and after them; then the weights are saved."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            parts.controller.stop()
            loop.call_later(SAVE_S, give_up)

        def give_up() -> None:
            if not self._is_saving:  # what has been begun is ended, or by a second signal
                task.cancel()

        num_steps = self._config.learner.num_steps

        def ask() -> None:  # in the middle of whatever runs
            loop.call_soon_threadsafe(stop)

        with self._signals.asking(ask):
            beside = [parts.scaling.serve(self._control), parts.recovery.fill_vacancies()]
            if self._chaos is not None:
                beside.append(self._chaos.strike(lambda: parts.roles.remotes))
            steps_done = await parts.controller.run(num_steps, beside=beside, steps_done=steps_done)
            parts.require_balanced()
            return await self._save(parts, steps_done)

    async def _save(self, parts: Parts, steps_done: int) -> bool:
        self._is_saving = True
        if parts.saver is not None:
            await parts.saver.settle()
        if steps_done < self._config.learner.num_steps and parts.saver is not None:
            await parts.saver.save(steps_done)
        await self._save_model(parts)
        return steps_done == self._config.learner.num_steps

    async def _save_model(self, parts: Parts) -> None:
        await parts.write_model()(self._folder / "checkpoint")

    async def _rescue(self, parts: Parts) -> None:
        """The run has failed: the newest weights are saved all the same, if they can be had."""
        try:
            with self._signals.asking(lambda: None):  # which is saving already
                if parts.weight_sync.has_published:
                    await self._save_model(parts)
        except (RuntimeError, OSError) as error:
            logger.error("the newest weights could not be saved: %s", error)

    def _may_restart(self, parts: Parts, processes: Processes, error: Exception, num_restarts: int) -> bool:
        """A rank was lost, and there is something to go on from, be it the start; a replay is begun again by hand."""
        of_learner = isinstance(error, ProcessLost) and error.process in {rank.name for rank in processes.ranks}
        limit = self._config.recovery.max_learner_restarts
        if of_learner and num_restarts >= limit:
            logger.error(
                "the learner was restarted %d times from one checkpoint (recovery.max_learner_restarts)", limit
            )
        return of_learner and num_restarts < limit and parts.saver is not None

    async def _restarted(
        self, run: Run, parts: Parts, processes: Processes, error: Exception
    ) -> tuple[Processes, Resumed | None]:
        """The same processes with new ranks, and the checkpoint that they go on from."""
        assert parts.saver is not None
        await parts.saver.abandon()
        newest = self._store.newest()
        came_to = newest.name if newest is not None else "the start"
        logger.warning("%s; starting the learner again from %s", error, came_to)
        run.logs.failures.failed("learner", error=str(error))
        ranks = await self._new_ranks(run.starter, processes.ranks)
        resumed = None
        if newest is not None:
            self._store.require_whole(newest)
            resumed = read_checkpoint(newest)
        run.logs.rewind(resumed)
        run.logs.failures.restarted(step=resumed.state.buffer.step if resumed is not None else 0)
        return parts.roles.processes(ranks), resumed

    async def _new_ranks(self, starter: RoleStarter, ranks: list[Remote[LearnerWorker]]) -> list[Remote[LearnerWorker]]:
        """In the place of these. Raises: ProcessLost if one is lost each time that they start."""
        for attempt in range(START_ATTEMPTS):
            for rank in ranks:
                starter.remove(rank)
            ranks = starter.start(process_specs(self._config).rank)
            try:
                await connect_learner(ranks, timeout_s=self._config.asynchrony.request_timeout_s)
                break
            except ProcessLost as error:
                if attempt == START_ATTEMPTS - 1:
                    raise
                logger.warning("%s; starting the learner once more", error)
        return ranks

    @contextmanager
    def _faults(self, logs: Logs) -> Iterator[ChaosMonkey | None]:
        if self._config.faults is None:
            yield None
            return
        chaos = ChaosMonkey(seeded_schedule(self._config.faults), logs.failures)
        try:
            yield chaos
        finally:
            logger.info("chaos: %s", chaos.summary())

    def _load_documents(self, resumed: Resumed | None) -> RunDocuments:
        start = time.perf_counter()
        documents = load_run_documents(self._config, self._model)
        self._report.startup("documents", {"load": time.perf_counter() - start})
        if resumed is not None:
            require_same_run(resumed.state, self._config, data_digest=documents.digest, checkpoint=resumed.checkpoint)
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
