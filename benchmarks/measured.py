"""How repeated measurements are shown."""

import statistics
from collections.abc import Sequence


def median_and_range(values: Sequence[float], *, decimals: int = 3) -> str:
    """Median, with the lowest and the highest."""
    middle, low, high = (f"{value:.{decimals}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"
