"""How many tickets may be claimed, and for which step each one is: counts alone, no tickets.

The plan knows how many fresh rollouts each step takes if none is stale: D in the first, F in every later one
(reuse.py), so that the first t steps need planned(t) = D + (t - 1) F, and no run needs more than planned(num_steps).
Two things come on top, counted in num_extra: replacements for rollouts that were dropped, and fills, fresh rollouts in
place of reusable ones that expired. With A = prefetch_steps, the invariant of every claim is

    num_claimed <= admitted(v) = planned(min(v + 1 + A, num_steps)) + num_extra,        v the published version.

Every change returns a new plan; a plan itself is an immutable value.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPlan:
    """Counts of tickets, from the first one of the run on."""

    num_steps: int
    prefetch_steps: int
    """A: steps whose tickets may be claimed ahead of the learner."""
    first_step: int
    """D: fresh rollouts that the first step takes."""
    later_steps: int
    """F: fresh rollouts that every later step takes, if no reusable one expires."""
    num_extra: int = 0
    """Tickets on top of the planned ones, since the start."""
    num_fills: int = 0
    """Of these, fills of the step that the learner waits for now."""

    def planned(self, num_steps: int) -> int:
        """Fresh rollouts that the first `num_steps` steps take, if none expires."""
        return self.first_step + (num_steps - 1) * self.later_steps if num_steps > 0 else 0

    def admitted(self, published_version: int) -> int:
        """Tickets that may have been claimed, since the start, once weights of this version are published."""
        return self.planned(min(published_version + 1 + self.prefetch_steps, self.num_steps)) + self.num_extra

    def step_of(self, ticket_id: int) -> int:
        """The step that the next ticket to be claimed, of this id, is planned for. Ids count all tickets.

        Every ticket on top of the plan delays those claimed after it by one place. So the answer holds as soon as the
        fills have been claimed, which themselves are planned for no step.
        """
        later = ticket_id - self.num_extra - self.planned(1)
        return 0 if later < 0 else 1 + later // self.later_steps

    def num_in_same_step(self, first_id: int, count: int) -> int:
        """How many of the `count` tickets from this id on are planned for the same step as the first."""
        return sum(self.step_of(first_id + k) == self.step_of(first_id) for k in range(count))

    def awaiting(self, step: int, num_fresh: int) -> "AdmissionPlan":
        """The learner waits for the batch of this step, which takes `num_fresh` fresh rollouts: admit its fills.

        Repeated for the same step, after a cancelled wait, it changes nothing.
        """
        num_fills = num_fresh - (self.planned(step + 1) - self.planned(step))
        return replace(self, num_extra=self.num_extra + num_fills - self.num_fills, num_fills=num_fills)

    def batch_taken(self) -> "AdmissionPlan":
        """The step that the learner waited for has its batch; the next one has no fills yet."""
        return replace(self, num_fills=0)

    def replacing(self, num_dropped: int) -> "AdmissionPlan":
        """`num_dropped` rollouts were dropped: admit as many others."""
        return replace(self, num_extra=self.num_extra + num_dropped)
