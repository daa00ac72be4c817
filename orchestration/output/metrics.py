"""Every number a run reports: the table of names, and the log that writes them.

A name that is not in the table is an error, so the table is complete. Values observed between two steps are reduced as
the table says and written with the step: one JSON object per line in metrics.jsonl, and to Weights & Biases when asked.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

from orchestration.config import RunConfig
from orchestration.output.strict_json import strict_json


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    unit: str
    reduction: str
    meaning: str


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "last", "optimizer steps done"),
    "time/elapsed_s": Metric("s", "last", "since the run's start"),
    "time/step_s": Metric("s", "last", "one learner step, waiting included"),
    "time/wait_for_batch_s": Metric("s", "last", "learner waiting for scored rollouts; large: too few workers"),
    "time/train_s": Metric("s", "last", "forward, backward and optimizer of one step"),
    "rollout/sample_s": Metric("s", "mean", "engine time for one document"),
    "rollout/tokens": Metric("tokens", "sum", "sampled since the previous row"),
    "rollout/workers": Metric("workers", "last", "rollout workers sampling now"),
    "idle/rollout/admission_frac": Metric("share of time", "last", "held back by max_lag; large: too many workers"),
    "idle/rollout/weights_frac": Metric("share of time", "last", "workers waiting for weights before a request"),
    "idle/score/rollouts_frac": Metric("share of time", "last", "servers without a rollout to score"),
    "idle/learner/batch_frac": Metric("share of time", "last", "learner waiting for rollouts; large: too few workers"),
    "idle/learner/publish_frac": Metric("share of time", "last", "learner publishing weights"),
    "score/score_s": Metric("s", "mean", "feature forward or verification of one document"),
    "buffer/scored": Metric("documents", "last", "scored, waiting for the learner"),
    "buffer/alive": Metric("documents", "last", "admitted, untrained; at most (max_lag + 1) x documents_per_step"),
    "tickets/issued": Metric("tickets", "last", "handed out since the start, = trained + failed + dropped + pending"),
    "tickets/trained": Metric("tickets", "last", "of these, trained on, once or several times"),
    "tickets/failed": Metric("tickets", "last", "of these, with a document that was set aside: its error is logged"),
    "tickets/dropped": Metric("tickets", "last", "of these, dropped because they arrived too late"),
    "tickets/pending": Metric("tickets", "last", "of these, being sampled or scored, or waiting for the learner"),
    "learner/rejected": Metric("batches", "last", "not trained on: loss or gradient not finite; since the start"),
    "lag/mean": Metric("learner steps", "mean", "learner version minus oldest sampling version"),
    "lag/max": Metric("learner steps", "max", "the same; never above lag/bound"),
    "lag/bound": Metric("learner steps", "last", "max_lag plus what reuse may add; absent in mode free"),
    "lag/in_flight/mean": Metric("learner steps", "mean", "part of the lag: published during sampling and scoring"),
    "lag/in_queue/mean": Metric("learner steps", "mean", "part of the lag: between arrival and first use"),
    "lag/reuse/mean": Metric("learner steps", "mean", "part of the lag: between first use and this one"),
    "reuse/index/mean": Metric("uses", "mean", "earlier uses of the rollouts in the batch; 0: all fresh"),
    "reuse/expired": Metric("documents", "last", "too old to be used again, since the start"),
    "reward/alignment/mean": Metric("inner product", "mean", "similarity of completion and ground truth"),
    "reward/sibling_similarity/mean": Metric("inner product", "mean", "what the diversity term subtracts"),
    "reward/total/mean": Metric("inner product", "mean", "reward; not the objective: it counts diversity twice"),
    "reward/advantage_abs/mean": Metric("inner product", "mean", "mean absolute advantage: size of the signal"),
    "reward/cfm_loss/mean": Metric("features squared", "mean", "unbiased CFM of the training rollouts, raw features"),
    "off_policy/weight/mean": Metric("ratio", "mean", "importance weight of a completion, truncated; 1 on policy"),
    "off_policy/weight/max": Metric("ratio", "max", "the largest of them"),
    "off_policy/ess_frac": Metric("fraction", "last", "effective sample size of the step; alarm below 0.5"),
    "off_policy/ess_truncated_frac": Metric("fraction", "last", "the same of the truncated weights"),
    "off_policy/truncated_frac": Metric("fraction", "mean", "completions whose weight was truncated"),
    "off_policy/masked_frac": Metric("fraction", "mean", "sampled tokens masked by the correction"),
    "off_policy/kl_k3/mean": Metric("nats", "mean", "KL from behavior to learner policy, whole completions"),
    "off_policy/log_ratio_abs/max": Metric("nats", "max", "largest change of a completion's log-prob since sampling"),
    "off_policy/log_ratio_lag_0_abs/mean": Metric(
        "nats/token", "mean", "learner against engine at equal weights: rounding, or the run ends; absent without lag 0"
    ),
    "loss/cross_entropy": Metric("nats/token", "mean", "cross-entropy of the training documents"),
    "optim/grad_norm": Metric("", "last", "global gradient norm before clipping"),
    "optim/learning_rate": Metric("", "last", "learning rate of this step"),
    "weights/publish_s": Metric("s", "last", "copying the weights out of the learner"),
    "weights/pull_s": Metric("s", "max", "from a worker's request for new weights until they are verified"),
    "weights/publish_to_live_s": Metric("s", "max", "from the start of a publication until a worker samples with it"),
    "weights/pause_s": Metric("s", "max", "part of that during which the engine could not step"),
    "weights/probe_s": Metric("s", "max", "from the end of the pause to the end of the probe"),
    "weights/probe_error": Metric("nats", "max", "log-probs of engine against learner at equal weights"),
    "eval/cross_entropy": Metric("nats/token", "last", "cross-entropy of the held-out documents"),
    "eval/cfm_loss": Metric("features squared", "last", "unbiased CFM of held-out documents, raw features"),
    "eval/seconds": Metric("s", "last", "duration of the evaluation"),
}  # fmt: skip


class Sink(Protocol):
    """Where finished rows go."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take one row."""

    def close(self) -> None:
        """No more rows follow."""


class JsonLines:
    """metrics.jsonl: one row per line, on disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: a row is written or refused at once, and closing has nothing left that could fail.
        self._file: FileIO = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, object]) -> None:
        """Append one line; a number that is not finite is written as null.

        Raises: OSError if the disk is full or gone, with the path.
        """
        line = strict_json(row).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write metrics: {error.strerror}; free space, rows so far are kept in",
                self._file.name,
            ) from error

    @property
    def size(self) -> int:
        """Bytes written, all of them on the disk when this returns: a checkpoint of this moment refers to them."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def rewind(self, size: int) -> None:
        """Forget the rows after this size: the steps that they tell of are done again.

        Raises: ValueError if there are fewer; nothing is changed then.
        """
        if (found := self.size) < size:
            raise ValueError(
                f"{self._file.name} has {found} bytes, at the checkpoint it had {size}: rows were removed from it; put "
                "them back, or resume from an earlier checkpoint"
            )
        self._file.truncate(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbSink:
    """Weights & Biases, offline or online."""

    def __init__(self, config: RunConfig, folder: Path, *, run_id: str) -> None:
        """`run_id`: of a run there that this one continues, or a new one."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "async-ebft"),
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=folder,
            mode="disabled" if config.logging.wandb == "off" else config.logging.wandb,
            config=config.model_dump(),
        )

    def write(self, row: Mapping[str, float]) -> None:
        """Log under the row's step."""
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MetricsLog:
    """Collects observations, reduces them by the table, and hands rows to the sinks."""

    def __init__(
        self, sinks: Sequence[Sink], *, clock: Callable[[], float] = time.perf_counter, elapsed_s: float = 0.0
    ) -> None:
        """`elapsed_s`: that the run has taken before."""
        self._sinks = sinks
        self._clock = clock
        self._start = clock() - elapsed_s
        self._observed: dict[str, list[float]] = {}
        self._last_step = 0

    def observe(self, name: str, value: float) -> None:
        """One value of this interval."""
        _require_known(name)
        self._observed.setdefault(name, []).append(float(value))

    @property
    def elapsed_s(self) -> float:
        """Since the run's start, all its jobs together [s]."""
        return self._clock() - self._start

    def rewind(self, step: int) -> None:
        """Go on from this step: what was observed since does not count."""
        self._observed = {}
        self._last_step = step

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row: these values and everything observed since the last step's row."""
        for name, value in values.items():
            self.observe(name, value)
        row = {name: _reduce(METRICS[name].reduction, seen) for name, seen in self._observed.items()}
        self._observed = {}
        self._write(step, row)

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write these values as a row of their own: what was observed meanwhile belongs to the step that follows."""
        for name in values:
            _require_known(name)
        self._write(step, values)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every sink; first write what was observed after the last step, as a row of that step.

        Not after an error: to write might fail as well, and hide what ended the run.
        """
        try:
            if kind is None and self._observed:
                self.log_step(self._last_step, {})
        finally:
            for sink in self._sinks:
                sink.close()

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self._last_step = step
        times = {"step": float(step), "time/elapsed_s": self.elapsed_s}
        for sink in self._sinks:
            sink.write({**row, **times})


def _require_known(name: str) -> None:
    if name not in METRICS:
        raise KeyError(
            f"metric {name!r} is not in the table of orchestration/output/metrics.py; add its unit and meaning"
        )


def _reduce(reduction: str, values: list[float]) -> float:
    match reduction:
        case "mean":
            return sum(values) / len(values)
        case "sum":
            return sum(values)
        case "max":
            return max(values)
        case _:
            return values[-1]


def metrics_page() -> str:
    """The table as docs/metrics.md shows it."""
    rows = [f"| `{name}` | {m.unit} | {m.reduction} | {m.meaning} |" for name, m in METRICS.items()]
    head = [
        "# Metrics",
        "",
        "Every name in `metrics.jsonl`. Generated by `python -m orchestration.output.metrics > docs/metrics.md`.",
    ]
    head += [
        "Values observed between two steps are reduced as the third column says. An evaluation has a row of its own,",
        "with `eval/*` alone; a last row holds what was observed after the last step. A value that is not finite is",
        "`null`.",
        "",
    ]
    return "\n".join([*head, "| name | unit | reduction | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
