"""How often nominal 95% intervals of a mean over documents hold the true mean, when documents come from shared texts.

    python benchmarks/interval_coverage.py [--before base.json --after tuned.json] [--repeats 10000] [--seed 0]

A document's value is an effect of its text plus one of its own; `correlation` is the first's share of the variance.
As many texts as the default run evaluates are drawn, with numbers of documents from it too. Compared are the interval
that takes documents as independent, and `mean_interval`, which takes texts as independent. `--before` and `--after`,
both written by `orchestration/evaluate.py ... --output`, add the correlations of real values and of their changes, and
intervals of real texts drawn with replacement. Neither Ray nor a GPU is needed; the default takes seconds on one core.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import tyro  # noqa: E402

from orchestration.evaluation.intervals import mean_interval  # noqa: E402

DOCUMENTS_PER_TEXT = (*[1] * 10, *[2] * 7, 3, 3, 4, 4, 4, 4, 5, 5, 6, 7, 7, 8, 12)
"""Of the 30 files that the 96 validation documents of the default run come from."""
CORRELATIONS = (0.0, 0.1, 0.2, 0.4)
FEW = (1, 1, 1)
"""An evaluation of three documents."""
Sample = tuple[np.ndarray, list[str]]
"""Values by document, and their texts."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Measure the coverage of intervals by simulation."""

    before: Path | None = None
    """Values of the model that training starts from."""
    after: Path | None = None
    """Values of the trained model, of the same documents."""
    repeats: int = 10_000
    """Samples in each row."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One row of the table."""

    what: str
    correlation: float
    documents: float
    """Mean of the samples."""
    independent: float
    """Share of the intervals over independent documents that hold the true mean."""
    clustered: float
    """Likewise over texts."""
    width_ratio: float
    """Mean width of the second over that of the first."""


def simulated(draw: np.random.Generator, sizes: Sequence[int], correlation: float, *, skewed: bool = False) -> Sample:
    """Values whose true mean is 0 and variance 1; effects are normal, or exponential less their mean."""
    chosen = draw.choice(sizes, size=len(sizes))
    effect = (lambda count: draw.exponential(size=count) - 1) if skewed else draw.standard_normal
    shared = np.repeat(effect(len(chosen)), chosen) * np.sqrt(correlation)
    return shared + effect(len(shared)) * np.sqrt(1 - correlation), _texts(chosen)


def resampled(draw: np.random.Generator, values: np.ndarray, texts: Sequence[str]) -> Sample:
    """As many whole texts as there are, with replacement: each draw counts as a text of its own."""
    by_text = [values[np.asarray(texts) == text] for text in sorted(set(texts))]
    chosen = [by_text[index] for index in draw.integers(len(by_text), size=len(by_text))]
    return np.concatenate(chosen), _texts([len(of_text) for of_text in chosen])


def coverage(what: str, samples: Iterator[Sample], *, truth: float = 0.0, correlation: float) -> Coverage:
    """The row of these samples."""
    rows = []
    for values, texts in samples:
        alone = mean_interval(values, [str(index) for index in range(len(values))])
        shared = mean_interval(values, texts)
        holds = [interval.low <= truth <= interval.high for interval in (alone, shared)]
        rows.append([len(values), *holds, (shared.high - shared.low) / (alone.high - alone.low)])
    documents, independent, clustered, width_ratio = np.mean(rows, axis=0).tolist()
    return Coverage(
        what=what,
        correlation=correlation,
        documents=documents,
        independent=independent,
        clustered=clustered,
        width_ratio=width_ratio,
    )


def intra_text_correlation(values: np.ndarray, texts: Sequence[str]) -> float:
    """Share of the variance that documents of one text have in common, by the analysis of variance; may be below 0."""
    _, members, sizes = np.unique(np.asarray(texts), return_inverse=True, return_counts=True)
    means, count, groups = np.bincount(members, weights=values) / sizes, len(values), len(sizes)
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (groups - 1)
    within = float(((values - means[members]) ** 2).sum()) / (count - groups)
    size = (count - float((sizes**2).sum()) / count) / (groups - 1)
    return (between - within) / (between + (size - 1) * within)


def real_values(study: Study) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Each measure of the first model, and its change."""
    if study.before is None or study.after is None:
        return
    before, after = (json.loads(path.read_text())["measures"] for path in (study.before, study.after))
    for name, measure in before.items():
        texts = list(measure["clusters"].values())
        first, last = (np.array([of[name]["values"][key] for key in measure["clusters"]]) for of in (before, after))
        yield name, first, texts
        yield f"change of {name}", last - first, texts


def measure(study: Study) -> Iterator[Coverage]:
    """All rows of the table."""
    draw, times = np.random.default_rng(study.seed), range(study.repeats)
    for skewed in (False, True):
        what = "30 texts, skewed" if skewed else "30 texts, normal"
        for rho in CORRELATIONS:
            samples = (simulated(draw, DOCUMENTS_PER_TEXT, rho, skewed=skewed) for _ in times)
            yield coverage(what, samples, correlation=rho)
    yield coverage("3 texts, normal", (simulated(draw, FEW, 0.0) for _ in times), correlation=0.0)
    for name, values, texts in real_values(study):
        samples = (resampled(draw, values, texts) for _ in times)
        rho = intra_text_correlation(values, texts)
        yield coverage(f"real: {name}", samples, truth=float(values.mean()), correlation=rho)


def main(study: Study) -> None:
    """Print the table."""
    print("| values | correlation | documents | coverage, independent | coverage, by text | width ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in measure(study):
        shares = f"{row.independent:.1%} | {row.clustered:.1%}"
        print(f"| {row.what} | {row.correlation:.2f} | {row.documents:.0f} | {shares} | {row.width_ratio:.2f} |")


def _texts(sizes: Sequence[int]) -> list[str]:
    return [str(text) for text, size in enumerate(sizes) for _ in range(size)]


if __name__ == "__main__":
    main(tyro.cli(Study))
