"""What each whitening pushes towards, measured on real features without training.

    python benchmarks/whitening_variants.py [--model embedded] [--documents 24] [--report FILE.md]

Many completions of each context are sampled and embedded once. Everything else is a function of their inner products:
groups of n are drawn from them repeatedly, and each variant turns the same groups into advantages. Printed:

1. how far the variants agree with each other: correlation of their advantages, and the share of sibling pairs that two
   variants put in the same order;
2. where each one pushes on average, by n: the correlation of a completion's expected advantage with the exact one (all
   completions, raw features: the direction of -grad L_CFM), over all contexts together and in the median context; its
   correlation with the log-probability (positive: entropy is lost); the share of the advantages' variance that is not
   noise of the draw of siblings; and the range of advantages over contexts (largest over median).
"""

import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import Tensor  # noqa: E402

from actors.config import DataConfig, RolloutConfig  # noqa: E402
from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT  # noqa: E402
from actors.rollout import Rollout, Ticket  # noqa: E402
from feature_server.config import FeatureConfig  # noqa: E402
from feature_server.features.gram import GramStatistics  # noqa: E402
from feature_server.scored_rollout import ScoredRollout  # noqa: E402
from learner.objective.advantage import feature_rewards  # noqa: E402
from learner.objective.whitening import WhitenedGroups, feature_space, sample_mixing, shrunk, unwhitened  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Compare whitening variants on one model's features."""

    model: str = "embedded"
    """As `model.policy`; its frozen copy embeds."""
    documents: int = 24
    """Held-out documents."""
    stride: int = 24
    """Tokens between two contexts."""
    completions: int = 64
    """Completions of each context."""
    group_sizes: tuple[int, ...] = (4, 8, 16)
    """n: sizes of the groups that are drawn from them."""
    draws: int = 200
    """Groups drawn in each context."""
    temperature: float = 1.0
    """Sampling temperature."""
    seed: int = 0
    """Seeds completions and draws."""
    report: Path | None = None
    """File for the tables, in addition to the terminal."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """All completions of one context."""

    raw: GramStatistics
    pooled: GramStatistics
    logprobs: Tensor
    """[completions] nats of each whole completion."""


Variant = Callable[[GramStatistics, GramStatistics], WhitenedGroups]
"""From raw and pooled statistics of groups."""

VARIANTS: dict[str, tuple[Variant, float]] = {
    "none": (lambda raw, pooled: unwhitened(raw, alignment="inner_product"), 1.0),
    "none, cosine": (lambda raw, pooled: unwhitened(raw, alignment="cosine"), 1.0),
    "none, alpha 0": (lambda raw, pooled: unwhitened(raw, alignment="inner_product"), 0.0),
    "pooled": (lambda raw, pooled: unwhitened(pooled, alignment="inner_product"), 1.0),
    "pooled, alpha 0": (lambda raw, pooled: unwhitened(pooled, alignment="inner_product"), 0.0),
    "shrunk 1": (lambda raw, pooled: shrunk(raw, shrinkage=1.0), 1.0),
    "shrunk 0.1": (lambda raw, pooled: shrunk(raw, shrinkage=0.1), 1.0),
    "feature_space": (lambda raw, pooled: feature_space(raw), 1.0),
    "feature_space, alpha 0": (lambda raw, pooled: feature_space(raw), 0.0),
    "sample_mixing": (lambda raw, pooled: sample_mixing(raw), 1.0),
}
"""Variant and diversity coefficient by name."""


def score_contexts(settings: Measurement) -> list[Context]:
    """Sample held-out contexts with the engine and embed the completions, all in this process."""
    from actors.data.documents import load_documents
    from actors.models.pretrained import load_tokenizer, resolve_model
    from actors.worker import RolloutWorker
    from feature_server.features.server import FeatureServer

    data = DataConfig(stride=settings.stride, document_tokens=12 + 4 * settings.stride)
    documents = load_documents(data, load_tokenizer(resolve_model(settings.model))).test
    step = len(documents) // settings.documents
    worker = RolloutWorker(
        model=settings.model,
        config=RolloutConfig(temperature=settings.temperature),
        dtype="float32",
        max_tokens=data.longest_tokens,
    )
    server = FeatureServer(
        model=settings.model,
        config=FeatureConfig(micro_batch_documents=1),
        dtype="float32",
        max_tokens=data.longest_tokens,
    )
    tickets = [
        Ticket(
            ticket_id=index,
            document=documents[index * step],
            seed=settings.seed * 10_000 + index,
            completions_per_context=settings.completions,
            min_policy_version=0,
        )
        for index in range(settings.documents)
    ]
    rollouts = worker.sample(tickets)
    server.fit_whitening(*rollouts)
    return [c for r, s in zip(rollouts, server.score(rollouts), strict=True) for c in contexts_of(r, s)]


def contexts_of(rollout: Rollout, scored: ScoredRollout) -> list[Context]:
    """One Context for each anchor of a document."""
    logprobs = torch.tensor(rollout.behavior_logprobs).double().sum(-1)
    return [
        Context(raw=one_group(scored.raw, k), pooled=one_group(scored.whitened, k), logprobs=logprobs[k])
        for k in range(len(logprobs))
    ]


def one_group(statistics: GramStatistics, k: int) -> GramStatistics:
    """The statistics of group k alone."""
    return GramStatistics(
        gram=statistics.gram[k : k + 1],
        ground_truth_products=statistics.ground_truth_products[k : k + 1],
        ground_truth_norm_sq=statistics.ground_truth_norm_sq[k : k + 1],
    )


def draw(statistics: GramStatistics, members: Tensor) -> GramStatistics:
    """Statistics of the groups that `members` [groups, n] picks from the completions of one context."""
    return GramStatistics(
        gram=statistics.gram[0][members.unsqueeze(-1), members.unsqueeze(-2)],
        ground_truth_products=statistics.ground_truth_products[0][members],
        ground_truth_norm_sq=statistics.ground_truth_norm_sq.expand(len(members)),
    )


def advantages(name: str, raw: GramStatistics, pooled: GramStatistics) -> Tensor:
    """[groups, n] under a variant."""
    variant, diversity_coef = VARIANTS[name]
    groups = variant(raw, pooled)
    found = feature_rewards(groups.alignment, groups.inner_products, alignment_coef=1.0, diversity_coef=diversity_coef)
    return found.advantage


def correlation(u: Tensor, v: Tensor) -> float:
    """Pearson's; 0 where one of the two is constant."""
    u, v = u - u.mean(), v - v.mean()
    norms = float(u.norm() * v.norm())
    return float(u @ v) / norms if norms > 0 else 0.0


def same_order(u: Tensor, v: Tensor) -> Tensor:
    """[pairs] bool: whether two variants order each pair of siblings alike; pairs that one ties are left out."""
    left, right = torch.triu_indices(u.shape[-1], u.shape[-1], offset=1)
    first, second = (u[:, left] - u[:, right]).flatten(), (v[:, left] - v[:, right]).flatten()
    untied = (first.abs() > 1e-9) & (second.abs() > 1e-9)
    return (first.sign() == second.sign())[untied]


def agreement_table(contexts: list[Context], settings: Measurement, *, n: int) -> str:
    """Correlation of advantages above the diagonal, share of sibling pairs in the same order below it."""
    generator = torch.Generator().manual_seed(settings.seed)
    seen: dict[str, list[Tensor]] = {name: [] for name in VARIANTS}
    for context in contexts:
        members = torch.randperm(settings.completions, generator=generator)[: settings.completions // n * n]
        raw, pooled = (draw(s, members.view(-1, n)) for s in (context.raw, context.pooled))
        for name in VARIANTS:
            seen[name].append(advantages(name, raw, pooled))
    values = {name: torch.cat(parts) for name, parts in seen.items()}
    lines = ["| | " + " | ".join(VARIANTS) + " |", "| --- |" + " --- |" * len(VARIANTS)]
    for row, first in enumerate(VARIANTS):
        cells = []
        for column, second in enumerate(VARIANTS):
            if row == column:
                cells.append("")
            elif row < column:
                cells.append(f"{correlation(values[first].flatten(), values[second].flatten()):+.2f}")
            else:
                cells.append(f"{float(same_order(values[first], values[second]).double().mean()):.0%}")
        lines.append(f"| {first} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def direction_table(contexts: list[Context], settings: Measurement) -> str:
    """Where each variant pushes on average."""
    lines = [
        "| variant | n | with -grad CFM, all | median context | with log-prob | not noise | size over contexts |",
        "| " + " --- |" * 7,
    ]
    for name in VARIANTS:
        for n in settings.group_sizes:
            found = [direction(context, name, n=n, settings=settings) for context in contexts]
            exact = torch.cat([f.exact for f in found])
            expected = torch.cat([f.expected for f in found])
            sizes = torch.stack([f.expected.square().mean().sqrt() for f in found])
            each = [correlation(f.expected, f.exact) for f in found]
            entropy = [correlation(f.expected, f.logprobs) for f in found]
            lines.append(
                f"| {name} | {n} | {correlation(expected, exact):+.2f} | {statistics.median(each):+.2f} "
                f"| {statistics.mean(entropy):+.3f} | {statistics.median(f.not_noise for f in found):.2f} "
                f"| {float(sizes.max() / sizes.median()):.1f} |"
            )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A variant's expected advantages in one context, and the exact ones."""

    expected: Tensor
    exact: Tensor
    logprobs: Tensor
    not_noise: float


def direction(context: Context, name: str, *, n: int, settings: Measurement) -> Direction:
    """Average a variant's advantages over groups drawn at random."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    m = settings.completions
    members = torch.stack([torch.randperm(m, generator=generator)[:n] for _ in range(settings.draws)])
    found = advantages(name, draw(context.raw, members), draw(context.pooled, members))
    count = torch.zeros(m).double().index_add(0, members.flatten(), torch.ones(members.numel()).double())
    expected = torch.zeros(m).double().index_add(0, members.flatten(), found.flatten()) / count.clamp(min=1)
    known = count > 0
    noise = (found - expected[members]).square().sum() / max(1, found.numel() - int(known.sum()))
    return Direction(
        expected=expected[known],
        exact=advantages("none", context.raw, context.pooled)[0][known],
        logprobs=context.logprobs[known],
        not_noise=1 - float(noise / found.square().mean().clamp(min=1e-30)),
    )


def main(settings: Measurement) -> None:
    """Print both tables."""
    os.environ.update(ENGINE_ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENGINE_ENVIRONMENT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    contexts = score_contexts(settings)
    text = (
        f"{settings.model}, T = {settings.temperature:g}, seed {settings.seed}: {len(contexts)} contexts of "
        f"{settings.documents} held-out documents, {settings.completions} completions each.\n\n"
        f"{agreement_table(contexts, settings, n=4)}\n\n{direction_table(contexts, settings)}\n"
    )
    print(text)
    if settings.report is not None:
        settings.report.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Measurement))
