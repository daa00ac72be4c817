"""Stage times from a run's metrics.jsonl: medians over its steps, and their variation.

A row of a step holds means over some documents and maxima over the workers; what that means for each stage is said
below. Times of a run whose roles shared cores are those of shared cores: the file does not show it.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestration.simulator.stage_times import StageTime

SKIPPED_STEPS = 3
"""First steps of a run that are left out: caches fill, kernels are compiled."""

TRAINING = "time/step_s"
"""A row that has it is one of training, not of an evaluation."""

METRICS_OF: dict[str, dict[str, int]] = {
    "sample": {"rollout/sample_s": 1},
    "score": {"score/score_s": 1},
    "train": {"time/step_s": 1, "time/wait_for_batch_s": -1, "weights/publish_s": -1},
    "publish": {"weights/publish_s": 1},
    "fetch": {"weights/pull_s": 1, "weights/pause_s": -1, "weights/probe_s": -1},
    "pause": {"weights/pause_s": 1, "weights/probe_s": 1},
}
"""Stage -> the metrics that measure it, and whether each is added or subtracted."""

Row = Mapping[str, float]


def measured_times(path: Path, *, fresh_documents: int) -> dict[str, StageTime]:
    """Stages that this file measures, by name; a stage without a row is left out.

    - sample, score, train: the median row. Of sample and score a row is a mean over about `fresh_documents` documents,
      so one document varies sqrt(fresh_documents) times as much as the rows do. Training is all of a step that is
      neither waiting nor publishing: time/train_s alone would leave out how the documents get to the learner.
    - publish, pause: the median row, without variation.
    - fetch: the minimum over rows, without variation: a worker spent the rest waiting for its running request to end.

    Raises: FileNotFoundError; ValueError if a row is broken, or none is left after the first steps.
    """
    rows = [row for row in _rows(path) if row.get("step", 0) > SKIPPED_STEPS and TRAINING in row]
    if not rows:
        raise ValueError(
            f"{path} has no training step after step {SKIPPED_STEPS}; the first ones are slower than all others and "
            "say little, so let the run continue, or leave the file out and give --times.sample-s and so on (--help)"
        )
    of_one_document = math.sqrt(fresh_documents)
    measure: dict[str, Callable[[Sequence[float]], StageTime]] = {
        "sample": lambda seconds: _with_variation(seconds, of_one_document),
        "score": lambda seconds: _with_variation(seconds, of_one_document),
        "train": lambda seconds: _with_variation(seconds, 1.0),
        "publish": lambda seconds: StageTime(statistics.median(seconds)),
        "fetch": lambda seconds: StageTime(max(0.0, min(seconds))),
        "pause": lambda seconds: StageTime(statistics.median(seconds)),
    }
    seconds = {
        stage: [sum(sign * row[name] for name, sign in terms.items()) for row in rows if terms.keys() <= row.keys()]
        for stage, terms in METRICS_OF.items()
    }
    return {stage: measure[stage](values) for stage, values in seconds.items() if values}


def _with_variation(seconds: Sequence[float], factor: float) -> StageTime:
    """Median, and the deviation of a normal distribution with the same quartiles: outliers move neither."""
    median = statistics.median(seconds)
    if len(seconds) < 4 or median == 0:
        return StageTime(median)
    lower, _, upper = statistics.quantiles(seconds, n=4)
    standard_deviation = (upper - lower) / (2 * statistics.NormalDist().inv_cdf(0.75))
    return StageTime(median, standard_deviation / median * factor)


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"there are no metrics {str(path)!r}; give the metrics.jsonl of a run")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append({name: value for name, value in json.loads(line).items() if value is not None})
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, row {number} is not JSON: {error}; was the run killed while it wrote?"
            ) from error
    return rows
