"""What is refused before Ray is asked: processes that the nodes could never hold."""

import pytest

from orchestration.cluster.placement import Reservation, check_fits, reservations
from orchestration.config import PlacementConfig, RoleConfig

Nodes = list[dict[str, float]]


def processes(count: int, *, cpus: float = 0.5, gpus: float = 0.0) -> list[Reservation]:
    return [Reservation(role="rollout worker", number=index, cpus=cpus, gpus=gpus) for index in range(count)]


def test_every_process_is_reserved_under_a_name_of_its_own() -> None:
    placement = PlacementConfig(
        rollout=RoleConfig(count=2, num_cpus=1.5, num_gpus=1),
        feature=RoleConfig(count=1, num_cpus=0.5, num_gpus=0.25),
        learner=RoleConfig(count=3, num_cpus=2),
    )
    assert [(r.name, r.bundle) for r in reservations(placement)] == [
        ("rollout worker 0", {"CPU": 1.5, "GPU": 1}),
        ("rollout worker 1", {"CPU": 1.5, "GPU": 1}),
        ("feature server 0", {"CPU": 0.5, "GPU": 0.25}),
        ("learner rank 0", {"CPU": 2}),
        ("learner rank 1", {"CPU": 2}),
        ("learner rank 2", {"CPU": 2}),
    ]


def test_the_default_run_fits_two_cores() -> None:
    check_fits(reservations(PlacementConfig()), [{"CPU": 2.0, "memory": 1e9}])


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        (processes(4), [{"CPU": 2.0}]),
        (processes(4), [{"CPU": 1.0}, {"CPU": 1.0}]),
        (processes(10, cpus=0.1), [{"CPU": 1.0}]),
        (processes(3, gpus=0.3), [{"CPU": 2.0, "GPU": 1.0}]),
        (processes(10, cpus=0.1, gpus=0.1), [{"CPU": 1.0, "GPU": 1.0}]),
        (processes(2, gpus=2), [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 1.0}, {"GPU": 2.0}]),
    ],
)
def test_what_fits_exactly_is_accepted(wanted: list[Reservation], nodes: Nodes) -> None:
    check_fits(wanted, nodes)


@pytest.mark.parametrize(
    ("wanted", "nodes", "parts"),
    [
        pytest.param(
            processes(5),
            [{"CPU": 1.0}, {"CPU": 1.0}],
            ["5 processes", "reserve 2.5 CPUs", "2 node(s) has 2"],
            id="CPUs in all",
        ),
        pytest.param(
            processes(3, gpus=0.35),
            [{"CPU": 8.0, "GPU": 1.0}],
            ["3 processes", "reserve 1.05 GPUs", "1 node(s) has 1"],
            id="fractions of a GPU in all",
        ),
        pytest.param(processes(1, gpus=0.25), [{"CPU": 8.0}], ["reserve 0.25 GPUs", "has 0"], id="no GPU at all"),
        pytest.param(
            processes(1, cpus=3),
            [{"CPU": 2.0}, {"CPU": 2.0}],
            ["rollout worker 0 reserves 3 CPUs on one node", "largest", "has 2"],
            id="more CPUs than any node has",
        ),
        pytest.param(
            [*processes(1), Reservation(role="learner rank", number=0, cpus=0.5, gpus=4)],
            [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 3.0}],
            ["learner rank 0 reserves 4 GPUs on one node", "largest", "has 3"],
            id="more GPUs than any node has",
        ),
        pytest.param(processes(1), [], ["reserve 0.5 CPUs", "0 node(s) has 0"], id="no node at all"),
    ],
)
def test_what_can_never_fit_is_refused_with_numbers_and_keys(
    wanted: list[Reservation], nodes: Nodes, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        check_fits(wanted, nodes)
    for part in (*parts, "placement.*.count", "num_cpus", "num_gpus"):
        assert part in str(refusal.value)
