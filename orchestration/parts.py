"""The parts of a run, built from its configuration and connected to each other; session.py runs them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.data.documents import chosen_documents, load_documents
from actors.models.pretrained import load_tokenizer
from actors.rollout import Document
from orchestration.buffer.schedule import Schedule
from orchestration.cluster.process_specs import process_specs
from orchestration.cluster.role_starter import RoleStarter
from orchestration.config import RunConfig
from orchestration.controller import Controller
from orchestration.evaluation.evaluation import COMPLETIONS_PER_CONTEXT, Evaluator
from orchestration.evaluation.validation import Validation
from orchestration.output.metrics import JsonLines, MetricsLog, Sink, WandbSink
from orchestration.output.progress import ProgressDisplay
from orchestration.output.ray_metrics import RayMetrics
from orchestration.output.report import RunReport
from orchestration.roles.processes import Processes, Roles, roles_of
from orchestration.roles.publications import Publication
from orchestration.roles.weight_sync import WeightSync
from orchestration.roles.whitening_fit import WhiteningFit
from orchestration.scaling import RunController, Scaling

PROBE_TEXTS, PROBE_TOKENS = 2, 32
"""Held-out documents, and how much of each: their log-probs check every weight update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDocuments:
    """What a run reads."""

    train: Sequence[Document]
    held_out: list[Document]
    """Those that validation evaluates."""

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
    return RunDocuments(train=splits.train, held_out=held_out)


@contextmanager
def open_logs(config: RunConfig, folder: Path) -> Iterator[tuple[MetricsLog, JsonLines]]:
    """Metrics, with all their sinks, and the event log."""
    with (
        ProgressDisplay(config.learner.num_steps) as display,
        _metrics_log(config, folder, display) as metrics,
        closing(JsonLines(folder / "events.jsonl")) as events,
    ):
        yield metrics, events


@dataclass(frozen=True, slots=True)
class Parts:
    """Connected, and not yet running."""

    roles: Roles
    weight_sync: WeightSync[Publication]
    whitening: WhiteningFit
    validation: Validation
    controller: RunController
    scaling: Scaling


def build_parts(
    config: RunConfig,
    *,
    starter: RoleStarter,
    processes: Processes,
    documents: RunDocuments,
    schedule: Schedule,
    metrics: MetricsLog,
    report: RunReport,
) -> Parts:
    """`processes` are up."""
    roles = roles_of(processes, config, probe_ids=documents.probe_ids)
    weight_sync = WeightSync(roles.learner, metrics, push=not schedule.names_versions, on_publish=schedule.published)
    evaluator = _evaluator(config, documents.held_out, roles, weight_sync, starter)
    every_steps, last_step = config.evaluation.every_steps, config.learner.num_steps
    validation = Validation(evaluator, metrics, report, every_steps=every_steps, last_step=last_step)
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
        without_rollouts=None if config.learner.samples else starter.put,
    )
    whitening, specs = WhiteningFit(config), process_specs(config)
    scaling = Scaling(
        starter=starter,
        controller=controller,
        roles=roles,
        specs=specs,
        whitening=whitening,
        released=evaluator.released,
    )
    return Parts(roles, weight_sync, whitening, validation, controller, scaling)


def _evaluator(
    config: RunConfig,
    held_out: list[Document],
    roles: Roles,
    weight_sync: WeightSync[Publication],
    starter: RoleStarter,
) -> Evaluator:
    return Evaluator(
        documents=held_out,
        completions_per_context=COMPLETIONS_PER_CONTEXT,
        documents_per_request=config.rollout.documents_per_request,
        workers=roles.workers,
        servers=roles.servers,
        learner=roles.learner,
        prepare=weight_sync.prepare,
        fetch=starter.fetch,
        clock=time.perf_counter,
    )


def _metrics_log(config: RunConfig, folder: Path, display: ProgressDisplay) -> MetricsLog:
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl"), display]
    if config.logging.wandb != "off":
        sinks.append(WandbSink(config, folder))
    if not config.placement.one_process:
        sinks.append(RayMetrics(str(folder)))
    return MetricsLog(sinks)
