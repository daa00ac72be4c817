"""What was measured of a checkpoint: values of single documents, their mean and its interval, as table and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from orchestration.evaluation.evaluate_config import EvaluateConfig
from orchestration.evaluation.intervals import Interval, mean_interval, wilson_interval
from orchestration.evaluation.pass_at_k import pass_at_k

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One row of the table."""

    name: str
    unit: str
    interval: Interval
    """Of the mean over documents, or over problems."""
    values: Mapping[str, float]
    """By the document's or problem's name, so that two checkpoints can be compared value by value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Which completions of one context are correct."""

    greedy: bool
    """The most probable completion, token by token."""
    sampled: Sequence[bool]


def mean_measure(name: str, *, unit: str, values: Mapping[str, float]) -> Measure:
    """A measure with the t-interval of its mean."""
    interval = mean_interval(np.array(list(values.values()), dtype=np.float64), confidence=CONFIDENCE)
    return Measure(name=name, unit=unit, interval=interval, values=values)


def accuracy_measures(prefix: str, verdicts: Mapping[str, Verdicts], *, pass_at: Sequence[int]) -> list[Measure]:
    """Greedy accuracy with its Wilson interval, and pass@k of the sampled completions for each k with a t-interval.

    The t-interval has no width where all problems agree; there the Wilson interval shows the uncertainty.
    """
    greedy = {name: float(v.greedy) for name, v in verdicts.items()}
    accuracy = Measure(
        name=f"{prefix}/greedy_accuracy",
        unit="fraction",
        interval=wilson_interval(int(sum(greedy.values())), len(greedy), confidence=CONFIDENCE),
        values=greedy,
    )
    passes = [
        mean_measure(
            f"{prefix}/pass_at_{k}",
            unit="fraction",
            values={name: pass_at_k(len(v.sampled), sum(v.sampled), k) for name, v in verdicts.items()},
        )
        for k in pass_at
    ]
    return [accuracy, *passes]


def as_table(measures: Sequence[Measure], *, checkpoint: str) -> Table:
    """What is shown on the terminal."""
    table = Table("measure", title=checkpoint)
    for header in ("mean", f"{CONFIDENCE:.0%} interval", "unit", "over"):
        table.add_column(header, justify="right")
    for measure in measures:
        interval = measure.interval
        bounds = f"[{interval.low:.4f}, {interval.high:.4f}]"  # not markup to rich: no tag is a number
        table.add_row(measure.name, f"{interval.mean:.4f}", bounds, measure.unit, str(len(measure.values)))
    return table


def as_json(measures: Sequence[Measure], *, checkpoint: str, config: EvaluateConfig) -> dict[str, object]:
    """Everything, for json.dumps: bounds that are not known are None."""
    return {
        "checkpoint": checkpoint,
        "confidence": CONFIDENCE,
        "config": config.model_dump(mode="json"),
        "measures": {
            measure.name: {
                "unit": measure.unit,
                "mean": measure.interval.mean,
                "low": _known(measure.interval.low),
                "high": _known(measure.interval.high),
                "values": dict(measure.values),
            }
            for measure in measures
        },
    }


def _known(bound: float) -> float | None:
    return None if math.isnan(bound) else bound
