"""How far the engine may disagree with the learner on the probe texts, measured where both are known to be equal.

Before any update both hold version 0, which each read from the model's files. What they disagree by there is rounding;
a few times as much is allowed from then on, of the mean and of the largest difference. A tensor that stays stale moves
all tokens a little, which the mean shows long before the largest difference does.
"""

from actors.weights.manifest import ProbeError, WeightMismatchError

AT_START = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest disagreement [nats] at version 0, by dtype: rounding gives 1e-5 at 4 layers and 2e-4 at 30 in float32, and
0.06 at 4 layers in bfloat16."""

MEAN_SHARE = 0.25
"""Allowed mean as a share of the allowed largest: 0.15 to 0.3 of it is what rounding gives."""

FACTOR = 4.0
"""From the disagreement at version 0 to the allowed one: logits grow in training, and their rounding with them."""

FLOOR = {"float32": ProbeError(largest=2e-4, mean=5e-5), "bfloat16": ProbeError(largest=0.05, mean=0.01)}
"""Allowed in any case, by dtype [nats]: a tiny model may agree to the last bit at first."""


def allowed_at_start(dtype: str, configured: float | None) -> ProbeError:
    """`configured`: rollout.probe_tolerance, a limit to the largest difference that replaces the dtype's [nats]."""
    largest = configured or AT_START[dtype]
    return ProbeError(largest=largest, mean=MEAN_SHARE * largest)


def calibrated(at_start: ProbeError, *, dtype: str, limit: ProbeError) -> ProbeError:
    """What is allowed from now on, given the disagreement at version 0: never beyond `limit`."""
    floor = FLOOR[dtype]
    return ProbeError(
        largest=min(limit.largest, max(floor.largest, FACTOR * at_start.largest)),
        mean=min(limit.mean, max(floor.mean, FACTOR * at_start.mean)),
    )


def require_same_start(error: ProbeError, limit: ProbeError) -> None:
    """Raises: WeightMismatchError if the engine read other weights than the learner, or computes otherwise."""
    if not error.is_within(limit):
        raise WeightMismatchError(
            f"before any update the engine's log-probs differ from the learner's by {error} on the probe texts, "
            f"allowed are {limit} (rollout.probe_tolerance): the engine has read other weights than the learner, or "
            "computes something else with them. Give both the same folder, which nothing changes meanwhile"
        )
