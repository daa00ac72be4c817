"""What a run writes while it goes on: metrics, with all their sinks, and the event log; both can be rewound."""

import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestration.config import RunConfig
from orchestration.output.metrics import JsonLines, MetricsLog, Sink, WandbSink
from orchestration.output.progress import ProgressDisplay
from orchestration.output.ray_metrics import RayMetrics
from orchestration.supervision.failure_log import FailureLog
from orchestration.supervision.run_state import Resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """What a run writes while it goes on."""

    metrics: MetricsLog
    rows: JsonLines
    """metrics.jsonl, one of the sinks of `metrics`."""
    events: JsonLines
    failures: FailureLog
    wandb_id: str

    def rewind(self, resumed: Resumed | None) -> None:
        """Forget what followed a checkpoint, or everything: those steps are done again.

        Raises: ValueError if one of the files is shorter than it was.
        """
        state = resumed.state if resumed is not None else None
        self.rows.rewind(state.metrics_bytes if state is not None else 0)
        self.events.rewind(state.events_bytes if state is not None else 0)
        self.metrics.rewind(state.buffer.step if state is not None else 0)


@contextmanager
def open_logs(config: RunConfig, folder: Path, resumed: Resumed | None) -> Iterator[Logs]:
    """Metrics, with all their sinks, and the event log, as they were at the checkpoint.

    Raises: ValueError as `Logs.rewind`.
    """
    wandb_id = resumed.state.wandb_id if resumed is not None else secrets.token_hex(4)
    elapsed_s = resumed.state.elapsed_s if resumed is not None else 0.0
    with ProgressDisplay(config.learner.num_steps) as display, closing(JsonLines(folder / "events.jsonl")) as events:
        rows = JsonLines(folder / "metrics.jsonl")
        sinks: list[Sink] = [rows, display]
        if config.logging.wandb != "off":
            sinks.append(WandbSink(config, folder, run_id=wandb_id))
        if not config.placement.one_process:
            sinks.append(RayMetrics(str(folder)))
        failed = closing(JsonLines(folder / "failures.jsonl"))
        with MetricsLog(sinks, elapsed_s=elapsed_s) as metrics, failed as file:
            failures = FailureLog(file, lambda: metrics.elapsed_s)
            logs = Logs(metrics=metrics, rows=rows, events=events, failures=failures, wandb_id=wandb_id)
            logs.rewind(resumed)
            yield logs
