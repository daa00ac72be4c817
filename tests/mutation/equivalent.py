"""Mutants that no test could tell from the original, each with the reason; check.py excuses them."""

from typing import NamedTuple


class Equivalent(NamedTuple):
    """A mutant that no test could tell from the original."""

    file: str
    after: str
    """The changed line, without its indentation."""
    reason: str


FOR_TYPE_CHECKERS = "imports for type checkers only"
AT_TOLERANCE = "a value that equals the tolerance to the last bit"
NEVER_READ = "stands in a place whose result is replaced by 0"

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent(
        "orchestration/roles/weight_sync.py",
        "if not TYPE_CHECKING:  # imports Ray and torch, which a simulation does without",
        FOR_TYPE_CHECKERS,
    ),
    Equivalent(
        "feature_server/features/gram.py",
        "ids = completion_ids.masked_fill(past_end, 1)",
        "any one value will do: completions of unequal length are distinguished by their lengths",
    ),
    Equivalent(
        "feature_server/features/pooled_whitening.py",
        "if num_rows > num_dimensions:",
        "with as many rows as dimensions both routes give the same numbers",
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "projected_norm_sq = (statistics.ground_truth_products * beta).mean(-1)",
        "only compared with a tolerance of 1e-10, to which a factor n is nothing",
    ),
    Equivalent(
        "learner/objective/whitening.py", "copies = inverse_root.mean(-1)", "only its sign is read, within a tolerance"
    ),
    Equivalent(
        "learner/objective/whitening.py", "(leverage >= EIGENVALUE_TOLERANCE) & seen.unsqueeze(-1),", AT_TOLERANCE
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "(leverage >= EIGENVALUE_TOLERANCE) & (copies.abs() > noise) & (ground_truth_norm > 0),",
        AT_TOLERANCE,
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "(leverage > EIGENVALUE_TOLERANCE) & (copies.abs() >= noise) & (ground_truth_norm > 0),",
        AT_TOLERANCE,
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "inverse = torch.where(leverage >= EIGENVALUE_TOLERANCE, 1 / root_weights, 0.0)",
        AT_TOLERANCE,
    ),
    Equivalent("learner/objective/whitening.py", "ridge = torch.where(zero, 2.0, shrinkage * scale)", NEVER_READ),
    Equivalent(
        "learner/objective/whitening.py",
        "zero[:, None, None], 0.0, whitened_gram / torch.where(zero, 2.0, mean_norm_sq)[:, None, None]",
        NEVER_READ,
    ),
    Equivalent(
        "learner/credit.py",
        'low, high = config.ratio_bounds or PUBLISHED_BOUNDS.get(config.correction, (1.0, float("inf")))',
        "corrections without published bounds read none",
    ),
    Equivalent(
        "orchestration/evaluation/intervals.py",
        "return Interval(mean, max(0.0, min(mean, centre - reach)), min(2.0, max(mean, centre + reach)))",
        "the upper bound exceeds 1 by rounding only",
    ),
    Equivalent(
        "learner/credit.py",
        "learner_logprobs=learner_logprobs.double().cpu(),",
        "the corrections detach what they are given; here it only frees the graph sooner",
    ),
)
