"""Which processes a run reserves, and whether its nodes could ever hold them: checked before Ray is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.config import PlacementConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """One process to place."""

    role: str
    number: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """The process's name."""
        return f"{self.role} {self.number}"

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def reservations(placement: PlacementConfig, *, with_verifiers: bool = False) -> list[Reservation]:
    """Every process of the run, role by role."""
    roles = [
        ("rollout worker", placement.rollout),
        ("feature server", placement.feature),
        ("learner rank", placement.learner),
    ]
    if with_verifiers:
        roles.append(("verifier server", placement.verifier))
    return [
        Reservation(role=name, number=index, cpus=role.num_cpus, gpus=role.num_gpus)
        for name, role in roles
        for index in range(role.count)
    ]


def check_fits(wanted: Sequence[Reservation], nodes: Sequence[dict[str, float]]) -> None:
    """Refuse what these nodes (total resources of each) could never hold.

    Raises: ValueError with the numbers asked for and there, and the keys to change.
    """
    remedy = "lower placement.*.count, num_cpus or num_gpus, or add nodes"
    for resource in ("CPU", "GPU"):
        shares = {w.name: w.bundle.get(resource, 0.0) for w in wanted}
        largest, total = max(shares, key=shares.__getitem__), sum(shares.values())
        there = sum(n.get(resource, 0.0) for n in nodes)
        biggest = max((n.get(resource, 0.0) for n in nodes), default=0.0)
        if total > there + 1e-9:
            raise ValueError(
                f"the {len(wanted)} processes of this run reserve {total:g} {resource}s, the cluster of {len(nodes)} "
                f"node(s) has {there:g}: {remedy}"
            )
        if shares[largest] > biggest + 1e-9:
            raise ValueError(
                f"{largest} reserves {shares[largest]:g} {resource}s on one node, the largest has {biggest:g}: {remedy}"
            )
