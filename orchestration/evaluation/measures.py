"""What was measured of a checkpoint: values of single documents, their mean and its interval, as table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from orchestration.evaluation.evaluate_config import EvaluateConfig
from orchestration.evaluation.intervals import Interval, effective_trials, mean_interval, wilson_interval
from orchestration.evaluation.pass_at_k import pass_at_k
from orchestration.output.strict_json import without_non_finite

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
    clusters: Mapping[str, str]
    """By the same names: what those that depend on each other share. The interval is over these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Which completions of one context are correct."""

    greedy: bool
    """The most probable completion, token by token."""
    sampled: Sequence[bool]


def mean_measure(name: str, *, unit: str, values: Mapping[str, float], clusters: Mapping[str, str]) -> Measure:
    """A measure with the t-interval of its mean. `clusters` may name more than `values` does."""
    clusters = {key: clusters[key] for key in values}
    interval = mean_interval(_array(values), list(clusters.values()), confidence=CONFIDENCE)
    return Measure(name=name, unit=unit, interval=interval, values=values, clusters=clusters)


def accuracy_measures(
    prefix: str, verdicts: Mapping[str, Verdicts], *, pass_at: Sequence[int], clusters: Mapping[str, str]
) -> list[Measure]:
    """Greedy accuracy with its Wilson interval, and pass@k of the sampled completions for each k with a t-interval.

    The t-interval has no width where all problems agree; there the Wilson interval shows the uncertainty.
    """
    greedy = {name: float(v.greedy) for name, v in verdicts.items()}
    trials = effective_trials(_array(greedy), [clusters[name] for name in greedy])
    accuracy = Measure(
        name=f"{prefix}/greedy_accuracy",
        unit="fraction",
        interval=wilson_interval(float(_array(greedy).mean()), trials, confidence=CONFIDENCE),
        values=greedy,
        clusters={name: clusters[name] for name in greedy},
    )
    passes = [
        mean_measure(
            f"{prefix}/pass_at_{k}",
            unit="fraction",
            values={name: pass_at_k(len(v.sampled), sum(v.sampled), k) for name, v in verdicts.items()},
            clusters=clusters,
        )
        for k in pass_at
    ]
    return [accuracy, *passes]


def as_table(measures: Sequence[Measure], *, checkpoint: str) -> Table:
    """What is shown on the terminal."""
    table = Table("measure", title=checkpoint)
    for header in ("mean", f"{CONFIDENCE:.0%} interval", "unit", "over", "clusters"):
        table.add_column(header, justify="right")
    for measure in measures:
        interval = measure.interval
        bounds = f"[{interval.low:.4f}, {interval.high:.4f}]"  # not markup to rich: no tag is a number
        table.add_row(measure.name, f"{interval.mean:.4f}", bounds, measure.unit, *_counts(measure))
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
                "low": without_non_finite(measure.interval.low),
                "high": without_non_finite(measure.interval.high),
                "values": dict(measure.values),
                "clusters": dict(measure.clusters),
            }
            for measure in measures
        },
    }


def _counts(measure: Measure) -> tuple[str, str]:
    return str(len(measure.values)), str(len(set(measure.clusters.values())))


def _array(values: Mapping[str, float]) -> np.ndarray:
    return np.array(list(values.values()), dtype=np.float64)
