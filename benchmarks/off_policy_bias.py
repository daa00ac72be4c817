"""Exact bias and variance of every off-policy correction on toy problems, against KL(behavior || learner).

    python benchmarks/off_policy_bias.py [--report docs/off_policy.md] [--problems 200] [--seed 0]

A policy over 4 tokens writes completions of 2, so all groups of 3 completions can be summed over: no sampling error.
Features, ground truth and logits are random; the behavior policy lies in a random direction, at exactly the stated KL
of whole completions. Bias: ||E[estimate] + grad L_CFM|| / ||grad L_CFM||. Variance: trace of the estimate's covariance,
one group at a time, over that of the on-policy estimate. The report gets the table between its markers. Neither Ray nor
a GPU is needed; the default takes less than a minute on one core.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import Tensor  # noqa: E402

from learner.objective.advantage import feature_rewards  # noqa: E402
from learner.objective.importance import (  # noqa: E402
    SampledTokens,
    sequence_log_ratio,
    sequence_weights,
)
from learner.objective.off_policy import (  # noqa: E402
    CORRECTIONS,
    PUBLISHED_BOUNDS,
    Limits,
)

VOCABULARY, LENGTH, NUM_FEATURES, GROUP = 4, 2, 5, 3
COMPLETIONS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
PREFIXES = torch.stack([torch.zeros_like(COMPLETIONS[:, 0]), 1 + COMPLETIONS[:, 0]], dim=1)
"""Row of logits that predicts each token: 0 at the start, 1 + v after token v."""
GROUPS = torch.tensor(list(itertools.combinations_with_replacement(range(len(COMPLETIONS)), GROUP)))
ORDERS = torch.tensor([len(set(itertools.permutations(group))) for group in GROUPS.tolist()])
"""Number of orders in which each group, kept once, can be drawn."""
LAG = 2.0
"""Learner steps between the two policies, for the correction that needs it."""
BATCH_GROUPS = 2048
"""Groups in the batch over which `m2po` takes its mean."""
CHUNK_PROBLEMS = 25
"""Problems whose groups are in memory at once."""
MARKERS = ("<!-- bias table: benchmarks/off_policy_bias.py -->", "<!-- end of the bias table -->")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Measure the bias of off-policy corrections by enumeration."""

    report: Path | None = None
    """Page that gets the table between its markers."""
    problems: int = 200
    """Random toy problems at every divergence."""
    divergences: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    """KL(behavior || learner) of whole completions [nats]."""
    seed: int = 0
    """Seed of the problems."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to learn from stale completions."""

    correction: str
    reward_weights: str = "none"
    max_importance_weight: float = 2.0

    @property
    def limits(self) -> Limits:
        low, high = PUBLISHED_BOUNDS.get(self.correction, (0.0, math.inf))
        cap = self.max_importance_weight
        return Limits(max_importance_weight=cap, ratio_low=low, ratio_high=high, second_moment=0.04)


EXACT = Setting(correction="sequence_is", reward_weights="pairwise", max_importance_weight=math.inf)
UNCORRECTED = Setting(correction="none")
SETTINGS = (
    UNCORRECTED,
    Setting(correction="none", reward_weights="pairwise"),
    Setting(correction="sequence_is", max_importance_weight=math.inf),
    EXACT,
    Setting(correction="sequence_is", reward_weights="self_normalised", max_importance_weight=math.inf),
    Setting(correction="truncated_sequence_is"),
    Setting(correction="truncated_sequence_is", reward_weights="pairwise"),
    Setting(correction="truncated_sequence_is", reward_weights="self_normalised"),
    *(
        Setting(correction=name, reward_weights=weights)
        for name in CORRECTIONS
        if name not in ("none", "sequence_is", "truncated_sequence_is")
        for weights in ("none", "pairwise")
    ),
)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Random policies, features and ground truths; the first axis of every tensor is the problem."""

    logits: Tensor
    features: Tensor
    ground_truth: Tensor

    @cached_property
    def logprobs(self) -> Tensor:
        return token_logprobs(self.logits)

    @cached_property
    def alignment(self) -> Tensor:
        """Of each completion of each group."""
        return torch.einsum("pxd,pd->px", self.features, self.ground_truth)[:, GROUPS]

    @cached_property
    def inner_products(self) -> Tensor:
        gram = self.features @ self.features.mT
        return gram[:, GROUPS.unsqueeze(-1), GROUPS.unsqueeze(-2)]

    @cached_property
    def scores(self) -> Tensor:
        """grad log p(token) of each token of each completion: problem, completion and token, logit."""
        error = torch.eye(VOCABULARY, dtype=torch.float64)[COMPLETIONS] - self.logits.softmax(-1)[:, PREFIXES]
        rows = torch.eye(1 + VOCABULARY, dtype=torch.float64)[PREFIXES]
        return torch.einsum("xtr,pxtv->pxtrv", rows, error).reshape(len(error), COMPLETIONS.numel(), -1)

    @cached_property
    def score_products(self) -> Tensor:
        """Inner products of the scores of a group's tokens."""
        products = self.scores @ self.scores.mT
        drawn = group_tokens()
        return products[:, drawn.unsqueeze(-1), drawn.unsqueeze(-2)]

    @cached_property
    def descent(self) -> Tensor:
        """-grad L_CFM, by autograd."""
        logits = self.logits.clone().requires_grad_()
        mean = torch.einsum("px,pxd->pd", token_logprobs(logits).sum(-1).exp(), self.features)
        (-(mean - self.ground_truth).square().sum()).backward()
        return logits.grad.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of one setting at one divergence, for each problem."""

    bias: Tensor
    variance: Tensor


def group_tokens() -> Tensor:
    """Index of each token of each group among the tokens of all completions."""
    return (GROUPS.unsqueeze(-1) * LENGTH + torch.arange(LENGTH)).flatten(1)


def token_logprobs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, PREFIXES, COMPLETIONS]


def draw_problems(number: int, generator: torch.Generator) -> Problems:
    def normal(*shape: int) -> Tensor:
        return torch.randn(number, *shape, dtype=torch.float64, generator=generator)

    return Problems(
        logits=normal(1 + VOCABULARY, VOCABULARY),
        features=normal(len(COMPLETIONS), NUM_FEATURES),
        ground_truth=normal(NUM_FEATURES),
    )


def divergence_to(problems: Problems, behavior: Tensor) -> Tensor:
    """KL(behavior || learner) of whole completions."""
    old, new = token_logprobs(behavior).sum(-1), problems.logprobs.sum(-1)
    return (old.exp() * (old - new)).sum(-1)


def behavior_at(problems: Problems, direction: Tensor, divergence: float) -> Tensor:
    """Logits whose KL is the divergence, along the direction or against it (whichever leads further); by bisection.

    Raises: RuntimeError if neither gets that far.
    """
    furthest = torch.full((len(direction), 1, 1), 16.0, dtype=torch.float64)
    ahead, back = (divergence_to(problems, problems.logits + s * furthest * direction) for s in (1, -1))
    direction = torch.where((ahead > back)[:, None, None], direction, -direction)
    low, high = torch.zeros_like(furthest), furthest
    for _ in range(60):
        middle = (low + high) / 2
        far = divergence_to(problems, problems.logits + middle * direction)[:, None, None] > divergence
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    behavior = problems.logits + high * direction
    found = divergence_to(problems, behavior)
    if not torch.allclose(found, torch.full_like(found, divergence), rtol=1e-6, atol=0):
        raise RuntimeError(f"KL {divergence} was not reached, got {float(found.min())} to {float(found.max())}")
    return behavior


def sampled(learner: Tensor, behavior: Tensor) -> SampledTokens:
    """Groups whose tokens have these log-probs: any shape that ends in completion, token."""
    num_completions = learner.numel() // LENGTH
    return SampledTokens(
        learner_logprobs=learner.flatten(),
        behavior_logprobs=behavior.flatten(),
        completion=torch.arange(num_completions).repeat_interleave(LENGTH),
        num_completions=num_completions,
        lag=torch.full((learner.numel(),), LAG),
    )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a behavior policy draws for each problem: every group, and how probable it is."""

    problems: Problems
    older: Tensor
    """Behavior log-probs of each token of each group."""

    @cached_property
    def learner(self) -> Tensor:
        return self.problems.logprobs[:, GROUPS]

    @cached_property
    def tokens(self) -> SampledTokens:
        return sampled(self.learner, self.older)

    @cached_property
    def probability(self) -> Tensor:
        """Of each group, whatever its order."""
        return ORDERS * self.older.sum((-2, -1)).exp()

    def advantages(self, reward_weights: str, max_importance_weight: float) -> Tensor:
        """Advantage of each completion of each group."""
        weights = None
        if reward_weights != "none":
            log_ratio = sequence_log_ratio(self.tokens).reshape(-1, GROUP)
            weights = sequence_weights(log_ratio, max_importance_weight=max_importance_weight)
        found = feature_rewards(
            self.problems.alignment.flatten(0, 1),
            self.problems.inner_products.flatten(0, 1),
            weights,
            alignment_coef=1.0,
            diversity_coef=1.0,
            self_normalised=reward_weights == "self_normalised",
        )
        return found.advantage.reshape(self.learner.shape[:3])

    def factors(self, setting: Setting, advantages: Tensor) -> Tensor:
        """w of each token of each group of each problem."""
        if setting.correction == "m2po":
            problems = zip(self.learner, self.older, advantages, self.probability, strict=True)
            return torch.stack([batch_factors(setting, *problem) for problem in problems])
        flat = CORRECTIONS[setting.correction](self.tokens, advantages.flatten(), setting.limits)
        return flat.reshape(self.learner.shape)

    def evaluate(self, setting: Setting, advantages: Tensor) -> Errors:
        """Expectation and variance of the estimate over all groups."""
        problems = self.problems
        terms = self.factors(setting, advantages) * advantages.unsqueeze(-1) / GROUP
        terms = terms.flatten(2)  # problem, group, token
        summed = torch.zeros(len(terms), COMPLETIONS.numel(), dtype=torch.float64)
        summed.index_add_(1, group_tokens().flatten(), (terms * self.probability.unsqueeze(-1)).flatten(1))
        expected = torch.einsum("pt,ptl->pl", summed, problems.scores)
        square = torch.einsum("pgt,pgtu,pgu->pg", terms, problems.score_products, terms)
        variance = (self.probability * square).sum(-1) - expected.square().sum(-1)
        bias = (expected - problems.descent).norm(dim=-1) / problems.descent.norm(dim=-1)
        return Errors(bias=bias, variance=variance)


def batch_factors(setting: Setting, learner: Tensor, older: Tensor, advantages: Tensor, probability: Tensor) -> Tensor:
    """w of each group inside a large batch that holds every group about as often as it is drawn (at least once)."""
    copies = (BATCH_GROUPS * probability).round().long().clamp(min=1)
    batch = torch.arange(len(GROUPS)).repeat_interleave(copies)
    tokens = sampled(learner[batch], older[batch])
    flat = CORRECTIONS[setting.correction](tokens, advantages[batch].flatten(), setting.limits)
    return flat.reshape(-1, GROUP, LENGTH)[copies.cumsum(0) - 1]


def measure(study: Study) -> dict[float, dict[Setting, Errors]]:
    """Every setting at every divergence; variances relative to on-policy.

    Raises: RuntimeError if the estimator that is proved unbiased is not: then the measurement is wrong.
    """
    generator = torch.Generator().manual_seed(study.seed)
    parts: dict[float, list[dict[Setting, Errors]]] = {divergence: [] for divergence in study.divergences}
    for first in range(0, study.problems, CHUNK_PROBLEMS):
        problems = draw_problems(min(CHUNK_PROBLEMS, study.problems - first), generator)
        direction = torch.randn(problems.logits.shape, dtype=torch.float64, generator=generator)
        for divergence in study.divergences:
            parts[divergence].append(measure_at(problems, behavior_at(problems, direction, divergence)))
        print(f"{min(first + CHUNK_PROBLEMS, study.problems)} of {study.problems} problems", flush=True)
    results = {
        divergence: {s: joined([part[s] for part in found]) for s in SETTINGS} for divergence, found in parts.items()
    }
    worst = max(float(found[EXACT].bias.median()) for found in results.values())
    if worst > 1e-9:  # the median: where a problem needs weights of 1e12, rounding shows
        raise RuntimeError(f"the exact estimator has a median relative bias of {worst}")
    return results


def measure_at(problems: Problems, behavior: Tensor) -> dict[Setting, Errors]:
    """Every setting for one behavior policy per problem."""
    on_policy = Draws(problems=problems, older=problems.logprobs[:, GROUPS])
    reference = on_policy.evaluate(UNCORRECTED, on_policy.advantages("none", math.inf)).variance
    draws = Draws(problems=problems, older=token_logprobs(behavior)[:, GROUPS])
    advantages, found = {}, {}
    for setting in SETTINGS:
        key = (setting.reward_weights, setting.max_importance_weight)
        if key not in advantages:
            advantages[key] = draws.advantages(*key)
        errors = draws.evaluate(setting, advantages[key])
        found[setting] = Errors(bias=errors.bias, variance=errors.variance / reference)
    return found


def joined(parts: list[Errors]) -> Errors:
    return Errors(bias=torch.cat([p.bias for p in parts]), variance=torch.cat([p.variance for p in parts]))


def percent(value: float) -> str:
    return "0" if value < 1e-9 else f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.0f}%"


def table(results: dict[float, dict[Setting, Errors]], study: Study) -> str:
    """Markdown: median relative bias with its 10-90% range at each decade, and median relative variance."""
    shown = [d for d in study.divergences if math.isclose(math.log10(d), round(math.log10(d)))][1:]
    head = ["correction", "`reward_weights`", "C", *(f"bias, KL {d:g}" for d in shown)]
    head += [f"variance, KL {d:g}" for d in shown[-2:]]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for setting in SETTINGS:
        cells = [f"`{setting.correction}`", setting.reward_weights, cap(setting)]
        for divergence in shown:
            tenth, median, ninetieth = quantiles(results[divergence][setting].bias)
            interval = "" if ninetieth < 1e-9 else f" ({percent(tenth)} to {percent(ninetieth)})"
            cells.append(percent(median) + interval)
        cells += [f"{quantiles(results[d][setting].variance)[1]:.2f}" for d in shown[-2:]]
        lines.append(f"| {' | '.join(cells)} |")
    caption = (
        f"`python benchmarks/off_policy_bias.py --problems {study.problems} --seed {study.seed}`: median over "
        f"{study.problems} problems, in brackets the range from the 10th to the 90th percentile."
    )
    return "\n".join([caption, "", *lines])


def cap(setting: Setting) -> str:
    """C, where anything reads it."""
    read = setting.reward_weights != "none" or setting.correction.startswith(("truncated", "decoupled"))
    return f"{setting.max_importance_weight:g}" if read else "-"


def quantiles(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()


def write_between_markers(page: Path, text: str) -> None:
    """Replace what stands between the markers.

    Raises: ValueError if the page lacks them.
    """
    old = page.read_text(encoding="utf-8")
    start, end = (old.find(marker) for marker in MARKERS)
    if start < 0 or end < start:
        raise ValueError(f"{page} must hold the lines {MARKERS[0]!r} and {MARKERS[1]!r} in this order; add them")
    page.write_text(old[: start + len(MARKERS[0])] + f"\n{text}\n" + old[end:], encoding="utf-8")


def main(study: Study) -> None:
    """Measure, print, and write the report if requested."""
    torch.set_num_threads(1)  # small tensors: more threads would only wait for each other
    results = measure(study)
    text = table(results, study)
    print(text)
    if study.report is not None:
        write_between_markers(study.report, text)


if __name__ == "__main__":
    main(tyro.cli(Study))
