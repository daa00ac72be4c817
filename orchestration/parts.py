"""The parts of a run, built from its configuration and connected to each other; session.py runs them."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from actors.data.documents import chosen_documents, load_documents
from actors.models.pretrained import load_tokenizer
from actors.rollout import Document
from learner.batch import Example
from orchestration.buffer.accounting import audit, require_balanced
from orchestration.buffer.event_log import as_logged, read_rows
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.buffer.schedule import Schedule
from orchestration.buffer.uses import Use
from orchestration.checkpoint.codec import save_objects
from orchestration.checkpoint.store import CheckpointStore
from orchestration.cluster.process_specs import process_specs
from orchestration.cluster.remote import ProcessFailure, Reference
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig
from orchestration.evaluation.evaluation import COMPLETIONS_PER_CONTEXT, Evaluator
from orchestration.evaluation.validation import Validation
from orchestration.loops.controller import Controller
from orchestration.output.checkpoint import save_checkpoint
from orchestration.output.report import RunReport
from orchestration.roles.processes import Processes, roles_of
from orchestration.roles.protocols import Member
from orchestration.roles.publications import Publication
from orchestration.roles.weight_sync import WeightSync
from orchestration.roles.whitening_fit import WhiteningFit
from orchestration.run_logs import Logs
from orchestration.supervision.recovery import Recovery
from orchestration.supervision.run_state import Resumed, RunState
from orchestration.supervision.saving import Saver, WriteModel, to_its_end
from orchestration.supervision.scaling import Scaling
from orchestration.supervision.staff import RunController, Staff, Wanted

PROBE_TEXTS, PROBE_TOKENS = 2, 32
"""Held-out documents, and how much of each: their log-probs check every weight update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDocuments:
    """What a run reads."""

    train: Sequence[Document]
    held_out: list[Document]
    """Those that validation evaluates."""
    digest: str
    """Of the training documents."""

    @property
    def probe_ids(self) -> list[list[int]]:
        """The texts by which every weight update is checked."""
        texts = self.held_out[:PROBE_TEXTS] or [self.train[0]]
        return [document.token_ids[:PROBE_TOKENS].tolist() for document in texts]


def load_run_documents(config: RunConfig, model: str) -> RunDocuments:
    """Raises: ValueError if fewer documents are held out than are to be evaluated."""
    evaluation = config.evaluation
    splits = load_documents(config.data, load_tokenizer(model))
    held_out = chosen_documents(splits, evaluation.split, evaluation.documents, key="evaluation.documents")
    return RunDocuments(train=splits.train, held_out=held_out, digest=splits.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same in all lives of the learner."""

    config: RunConfig
    folder: Path
    model: str
    """The policy's, resolved."""
    starter: RoleStarter
    documents: RunDocuments
    logs: Logs
    report: RunReport
    store: CheckpointStore
    whitening: WhiteningFit


class Parts:
    """Connected, and not yet running; for one life of the learner."""

    def __init__(
        self, run: Run, processes: Processes, schedule: Schedule, resumed: Resumed | None, wanted: Wanted | None
    ) -> None:
        """`processes` are up. `resumed`: what `restore` will be called with. `wanted`: as in Staff."""
        self._run, self._schedule = run, schedule
        state = resumed.state if resumed is not None else None
        self.roles = roles_of(processes, run.config, probe_ids=run.documents.probe_ids)
        self.weight_sync: WeightSync[Publication] = WeightSync(
            self.roles.learner,
            run.logs.metrics,
            push=not schedule.names_versions,
            on_publish=schedule.published,
        )
        self.buffer: RolloutBuffer[Reference[Example]] | ReplayBuffer[Reference[Example]] = schedule.buffer(
            run.documents.train, position=state.position if state is not None else 0
        )
        self.whitening = run.whitening
        self._evaluator = self._make_evaluator()
        self._validation = self._make_validation(evaluated_step=state.evaluated_step if state is not None else -1)
        self.controller = self._make_controller()
        self.staff = self._make_staff(wanted)
        self.recovery = Recovery(self.staff, max_per_hour=run.config.recovery.max_replacements, log=run.logs.failures)
        self.scaling = Scaling(self.staff, samples=self.controller.samples)
        self.saver = self._make_saver(saved_step=state.buffer.step if state is not None else 0)

    async def restore(self, resumed: Resumed) -> None:
        """Be as the run was at the checkpoint."""
        await self.roles.learner.restore_state(resumed.checkpoint)
        assert isinstance(self.buffer, RolloutBuffer), "a replay has no checkpoints"
        self.buffer.restore(resumed.state.buffer, [self._run.starter.put(payload) for payload in resumed.payloads])

    def require_balanced(self) -> None:
        """Raises: RuntimeError if a ticket is lost or counted twice, by the buffer or by the event log."""
        require_balanced(self.buffer.account, audit(read_rows(self._run.folder / "events.jsonl")))

    def write_model(self) -> WriteModel:
        """A function that writes the newest weights, as they are now, as a Hugging Face folder."""
        publication, kept = self.weight_sync.newest, ExitStack()
        kept.enter_context(self.weight_sync.keeping(publication))

        async def write(folder: Path) -> None:
            with kept:
                buffers = await publication.buffers(self._run.starter.fetch)
            await to_its_end(
                save_checkpoint, folder, manifest=publication.manifest, buffers=buffers, base_model=self._run.model
            )

        return write

    async def _after_step(self, step: int) -> None:
        await self._validation.after_step(step)
        if self.saver is not None:
            await self.saver.after_step(step)

    async def _on_failure(self, member: Member, failure: ProcessFailure) -> None:
        if self._run.config.placement.one_process:  # it is this one
            raise failure
        await self.recovery.replace(member, failure)

    async def _on_evaluation_failure(self, member: Member, failure: ProcessFailure) -> None:
        await self.controller.lose(member, failure)

    async def _keep_rejected(self, step: int, batch: Sequence[Use[Reference[Example]]]) -> None:
        """For inspection."""
        folder = self._run.folder / "rejected"
        examples = [await self._run.starter.fetch(use.payload) for use in batch]
        await asyncio.to_thread(folder.mkdir, exist_ok=True)
        path = folder / f"step-{step:06d}-{len(list(folder.iterdir()))}.safetensors"
        await asyncio.to_thread(save_objects, path, examples)

    def _snapshot(self) -> tuple[RunState, list[Reference[Example]]]:
        assert isinstance(self.buffer, RolloutBuffer), "a replay has no checkpoints"
        run, (buffer, payloads) = self._run, self.buffer.state()
        state = RunState(
            buffer=buffer,
            position=self._schedule.position,
            data_digest=run.documents.digest,
            config=json.dumps(as_logged(run.config)),
            events_bytes=run.logs.events.size,
            metrics_bytes=run.logs.rows.size,
            elapsed_s=run.logs.metrics.elapsed_s,
            whitening_moment=self.whitening.moment,
            first_evaluation=run.report.first,
            evaluated_step=self._validation.evaluated_step,
            wandb_id=run.logs.wandb_id,
        )
        return state, payloads

    def _make_evaluator(self) -> Evaluator:
        return Evaluator(
            documents=self._run.documents.held_out,
            completions_per_context=COMPLETIONS_PER_CONTEXT,
            documents_per_request=self._run.config.rollout.documents_per_request,
            workers=self.roles.workers,
            servers=self.roles.servers,
            learner=self.roles.learner,
            prepare=self.weight_sync.prepare,
            fetch=self._run.starter.fetch,
            clock=time.perf_counter,
            on_failure=self._on_evaluation_failure,
        )

    def _make_validation(self, *, evaluated_step: int) -> Validation:
        return Validation(
            self._evaluator,
            self._run.logs.metrics,
            self._run.report,
            every_steps=self._run.config.evaluation.every_steps,
            last_step=self._run.config.learner.num_steps,
            evaluated_step=evaluated_step,
        )

    def _make_controller(self) -> RunController:
        config, roles = self._run.config, self.roles
        return Controller(
            buffer=self.buffer,
            rollout_workers=roles.workers,
            scorers=roles.scorers,
            learner=roles.learner,
            weight_sync=self.weight_sync,
            metrics=self._run.logs.metrics,
            documents_per_request=config.rollout.documents_per_request,
            batch_timeout_s=config.asynchrony.request_timeout_s,
            after_step=self._after_step,
            on_failure=self._on_failure,
            on_rejected=self._keep_rejected,
            lag_bound=config.asynchrony.lag_bound,
            without_rollouts=None if config.learner.samples else self._run.starter.put,
        )

    def _make_staff(self, wanted: Wanted | None) -> Staff:
        return Staff(
            starter=self._run.starter,
            controller=self.controller,
            roles=self.roles,
            specs=process_specs(self._run.config),
            whitening=self.whitening,
            released=self._evaluator.released,
            wanted=wanted,
        )

    def _make_saver(self, *, saved_step: int) -> Saver | None:
        if isinstance(self.buffer, ReplayBuffer):  # which is begun again rather than resumed
            return None
        checkpoint = self._run.config.checkpoint
        return Saver(
            self._run.store,
            self.roles.learner,
            every_steps=checkpoint.every_steps,
            saved_step=saved_step,
            settle=self.buffer.settle,
            snapshot=self._snapshot,
            fetch=self._run.starter.fetch,
            score_of=self._validation.score_of,
            model_writer=self.write_model if checkpoint.hugging_face else None,
        )
