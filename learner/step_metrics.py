"""Means and maxima of one optimizer step, over all micro-batches and ranks."""

import torch
from torch import Tensor


class StepMetrics:
    """Collects values under metric names; `reduce` combines the ranks.

    Every rank must collect the same names in the same order, because they are reduced by position.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._maxima: dict[str, float] = {}

    def mean(self, name: str, values: Tensor) -> None:
        """Add values to a mean over everything collected under this name."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + float(values.detach().double().sum()), count + values.numel())

    def max(self, name: str, values: Tensor) -> None:
        """Add values to a maximum."""
        if values.numel():
            self._maxima[name] = max(self._maxima.get(name, -torch.inf), float(values.detach().max()))

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Collective over all ranks: the mean or maximum of each name; a name without a value is left out."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=device).reshape(-1, 2)
        maxima = torch.tensor(list(self._maxima.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
        means = {name: float(s / c) for name, (s, c) in zip(self._sums, sums, strict=True) if c > 0}
        return means | dict(zip(self._maxima, maxima.tolist(), strict=True))
