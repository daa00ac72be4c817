"""Which rollouts are trained on again: a pool between the first use of a rollout and its last.

A step takes D documents. With U = max_uses, F = D / U of them are fresh, the others come from the pool:

- `fifo`: those that entered first. The first batch is all fresh, and its rollouts are allowed 1, 2, ..., U uses in
  equal parts; from then on every rollout is used in U consecutive steps, its i-th reuse exactly i steps after its
  first use.
- `uniform`: drawn without replacement, by a generator seeded with the step; a rollout leaves after U uses.

A rollout is never used more than U times, nor again at a lag above max_reuse_lag: it then leaves the pool, and a fresh
one is requested in its place.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")

ReuseOrder = Literal["fifo", "uniform"]


@dataclass(frozen=True, slots=True)
class Pooled(Generic[Item]):
    """A rollout that may be used again."""

    item: Item
    version: int
    """Oldest weights that sampled it."""
    num_uses: int
    max_uses: int


class ReusePool(Generic[Item]):
    """Holds what may be trained on again."""

    def __init__(
        self, *, documents_per_step: int, max_uses: int, max_reuse_lag: int | None, order: ReuseOrder, seed: int
    ) -> None:
        self.num_fresh = documents_per_step // max_uses
        """F: fresh rollouts of every step but the first, if none expires."""
        self.num_expired = 0
        """Rollouts that exceeded max_reuse_lag before their last use."""
        self.documents_per_step = documents_per_step
        """D: documents of every step, and fresh rollouts of the first."""
        self._max_uses, self._max_reuse_lag, self._order, self._seed = max_uses, max_reuse_lag, order, seed
        self._pool: list[Pooled[Item]] = []

    def expire(self, step: int) -> None:
        """Remove what would exceed max_reuse_lag in this step; to be called first in every step."""
        kept = [p for p in self._pool if self._max_reuse_lag is None or step - p.version <= self._max_reuse_lag]
        self.num_expired += len(self._pool) - len(kept)
        self._pool = kept

    @property
    def pooled(self) -> list[Pooled[Item]]:
        """All of them, in the order in which they entered."""
        return list(self._pool)

    def restore(self, pooled: Sequence[Pooled[Item]], *, num_expired: int | None = None) -> None:
        """Hold these, and no others; `num_expired` None: as counted."""
        self._pool = list(pooled)
        self.num_expired = self.num_expired if num_expired is None else num_expired

    @property
    def num_wanted(self) -> int:
        """Fresh rollouts that the next step needs: more than num_fresh where the pool has too few."""
        return max(self.num_fresh, self.documents_per_step - len(self._pool))

    def draw(self, step: int) -> list[tuple[Item, int]]:
        """The rollouts that this step reuses, each with its reuse index (1: the first reuse); counts as a use."""
        count = self.documents_per_step - self.num_wanted
        chosen = self._pool[:count]
        if self._order == "uniform":
            chosen = random.Random(f"{self._seed} {step}").sample(self._pool, count)
        used = {id(pooled) for pooled in chosen}
        counted = [replace(p, num_uses=p.num_uses + 1) if id(p) in used else p for p in self._pool]
        self._pool = [p for p in counted if p.num_uses < p.max_uses]
        return [(pooled.item, pooled.num_uses) for pooled in chosen]

    def enter(self, items: list[tuple[Item, int]], *, step: int) -> None:
        """Rollouts (with the oldest weights that sampled them) that had their first use in this step, in its order."""
        for place, (item, version) in enumerate(items):
            staggered = self._order == "fifo" and step == 0
            max_uses = min(self._max_uses, 1 + place // self.num_fresh) if staggered else self._max_uses
            if max_uses > 1:
                self._pool.append(Pooled(item, version, num_uses=1, max_uses=max_uses))
