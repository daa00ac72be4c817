"""Faults in simulated runs: the share of useful time against renewal theory, and the account of every ticket.

A stage that takes d seconds and begins anew after each fault of its process, of which there are r per second, with
another process R seconds later, takes (exp(r d) - 1) (1/r + R) seconds on average. With r d near 0 the share of useful
time is therefore 1 / (1 + r R).
"""

import math
import random
import statistics

import pytest

from orchestration.asynchrony_config import LagConfig
from orchestration.buffer.accounting import audit, require_balanced
from orchestration.simulator.fault_costs import as_table, fault_costs
from orchestration.simulator.faults import NO_FAULTS, Faults, lifetime_s
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulate_config import FaultsConfig
from orchestration.simulator.simulated_run import SimulatedRun
from orchestration.simulator.simulator import simulate
from orchestration.simulator.stage_times import StageTime, StageTimes
from orchestration.simulator.virtual_time import run_in_virtual_time

MINUTE_S = 60.0


def pipeline(*, workers: int = 1, scorers: int = 1, documents: int = 1, **asynchrony: object) -> Pipeline:
    return Pipeline(
        rollout_workers=workers,
        scorers=scorers,
        documents_per_step=documents,
        documents_per_request=1,
        asynchrony=LagConfig(**{"max_lag": 2} | asynchrony),
    )


def constant(**seconds: float) -> StageTimes:
    return StageTimes(**{"sample": StageTime(0.0), "score": StageTime(0.0), "train": StageTime(0.0)} | each(seconds))


def each(seconds: dict[str, float]) -> dict[str, StageTime]:
    return {stage: StageTime(mean_s) for stage, mean_s in seconds.items()}


def useful(what: Pipeline, times: StageTimes, faults: Faults, *, num_steps: int) -> float:
    """Of a pipeline whose longest stage is never idle without faults, since no time varies."""
    assert simulate(what, times, num_steps=24).share_of_ideal == pytest.approx(1.0)
    return simulate(what, times, num_steps=num_steps, faults=faults).share_of_ideal


def renewal_share(work_s: float, per_minute: float, restart_s: float) -> float:
    per_s = per_minute / MINUTE_S
    return work_s / (math.expm1(per_s * work_s) * (1 / per_s + restart_s))


def drawn_share(work_s: float, per_minute: float, restart_s: float, *, draws: int = 100_000) -> float:
    """The same by drawing lives of one process, one after the other."""
    random_ = random.Random(3)
    time_s = done = 0.0
    for _ in range(draws):
        life_s = random_.expovariate(per_minute / MINUTE_S)
        done += life_s // work_s
        time_s += life_s + restart_s
    return done * work_s / time_s


CASES = [(20.0, 0.3, 60.0), (6.0, 1.0, 30.0), (30.0, 1.0, 10.0), (60.0, 1.0, 0.0)]


@pytest.mark.parametrize(("work_s", "per_minute", "restart_s"), CASES)
def test_the_closed_form_is_what_drawing_gives(work_s: float, per_minute: float, restart_s: float) -> None:
    expected = renewal_share(work_s, per_minute, restart_s)
    assert drawn_share(work_s, per_minute, restart_s) == pytest.approx(expected, rel=0.01)
    assert renewal_share(1e-6, per_minute, restart_s) == pytest.approx(1 / (1 + per_minute * restart_s / MINUTE_S))


@pytest.mark.parametrize(("work_s", "per_minute", "restart_s"), CASES)
@pytest.mark.parametrize("role", ["workers", "scorers"])
def test_a_stage_that_sets_the_rate_loses_its_restarts_and_its_broken_requests(
    role: str, work_s: float, per_minute: float, restart_s: float
) -> None:
    times = constant(**{"sample" if role == "workers" else "score": work_s})
    faults = Faults(**{f"{role}_per_minute": per_minute}, restart_s=restart_s)
    found = useful(pipeline(), times, faults, num_steps=1500)
    assert found == pytest.approx(renewal_share(work_s, per_minute, restart_s), rel=0.06)


@pytest.mark.parametrize("checkpoint_steps", [1, 5])
def test_a_learner_that_fails_loses_its_restart_and_the_steps_since_its_checkpoint(checkpoint_steps: int) -> None:
    faults = Faults(learner_per_minute=0.5, learner_restart_s=40.0, checkpoint_steps=checkpoint_steps)
    found = useful(pipeline(), constant(train=8.0), faults, num_steps=2000)
    assert found == pytest.approx(renewal_share(8.0 * checkpoint_steps, 0.5, 40.0), rel=0.06)


def test_sixty_four_workers_of_which_one_in_ten_fails_in_a_minute() -> None:
    """They set the rate: they are up 10 of 11 minutes, and lose what they had begun."""
    times, faults = constant(sample=10.0, score=0.125, train=1.0), Faults(workers_per_minute=0.1, restart_s=60.0)
    found = useful(pipeline(workers=64, scorers=4, documents=64), times, faults, num_steps=80)
    assert found == pytest.approx(renewal_share(10.0, 0.1, 60.0), abs=0.02)


def test_spare_workers_hide_the_faults_of_others() -> None:
    times, faults = constant(sample=1.0, train=1.0), Faults(workers_per_minute=1.0, restart_s=60.0)
    shares = [useful(pipeline(workers=workers, documents=4), times, faults, num_steps=400) for workers in (4, 8, 14)]
    assert shares[0] < 0.6 and 0.7 < shares[1] < 0.95 and shares[2] > 0.95, "half of them are up at a time"


def test_lifetimes_are_exponential() -> None:
    drawn = [lifetime_s(0.1, number) for number in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(600.0, rel=0.02)
    assert statistics.pstdev(drawn) == pytest.approx(600.0, rel=0.03)
    assert sum(life_s <= 60.0 for life_s in drawn) / 20_000 == pytest.approx(1 - math.exp(-0.1), rel=0.05)
    assert lifetime_s(0.0, "any") == math.inf


# -- what a fault must not change ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_uses", [1, 2])
@pytest.mark.parametrize("lag_rule", ["in_order", "wait", "drop"])
def test_every_ticket_ends_once_and_within_its_lag(lag_rule: str, max_uses: int) -> None:
    """The learner's faults too: its log is cut off where the run goes on from. The simulated learner refuses a lag that
    is not the buffer's, and a worker weights that its tickets do not allow."""
    what = pipeline(workers=5, scorers=2, documents=4, lag_rule=lag_rule, max_uses=max_uses)
    times = StageTimes(
        sample=StageTime(8.0, 0.8), score=StageTime(1.0, 0.8), train=StageTime(6.0, 0.5), fetch=StageTime(1.0)
    )
    faults = Faults(
        workers_per_minute=1.0,
        scorers_per_minute=1.0,
        learner_per_minute=0.3,
        restart_s=20.0,
        learner_restart_s=30.0,
        checkpoint_steps=3,
    )

    async def scenario(seed: int) -> SimulatedRun:
        rows: list[dict[str, object]] = []
        lengths: list[int] = []
        run = SimulatedRun(what, times, faults, seed=seed, record=rows.append)
        note, start = run._note_checkpoint, run._start

        def note_length(step: int) -> None:
            note(step)
            lengths[:] = [len(rows)]

        def cut_log(lags: list | None = None) -> None:
            start(lags)
            del rows[lengths[0] :]

        run._note_checkpoint, run._start = note_length, cut_log
        lengths[:] = [0]
        await run.play(60)
        require_balanced(run.buffer.account, audit(rows))
        return run

    for seed in range(3):
        run = run_in_virtual_time(scenario(seed))
        assert set(run.num_faults) == {"worker", "server", "learner"}
        assert len(run.lags) == 60 and {len(of_step) for of_step in run.lags} == {4}
        fresh = [lag.in_flight + lag.in_queue for of_step in run.lags for lag in of_step]
        assert max(fresh) <= 2
        assert [row["step"] for row in run.rows][-1] == 60
        assert len(run.rows) > 60, "steps were done again"


def test_without_faults_nothing_is_lost() -> None:
    what, times = pipeline(workers=3, documents=4), StageTimes(
        sample=StageTime(1.0, 0.5), score=StageTime(0.2, 0.5), train=StageTime(1.0, 0.1)
    )  # fmt: skip
    assert simulate(what, times, num_steps=40) == simulate(what, times, num_steps=40, faults=Faults(restart_s=60.0))
    assert NO_FAULTS.kinds == {}


def test_equal_seeds_give_equal_faults_and_others_do_not() -> None:
    what, times = pipeline(workers=3, documents=2), constant(sample=5.0, score=1.0, train=2.0)
    faults = Faults(workers_per_minute=1.0, learner_per_minute=0.5, restart_s=10.0, checkpoint_steps=4)
    first, again, other = (simulate(what, times, num_steps=80, faults=faults, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first.steps_per_s != other.steps_per_s
    assert first.num_faults > 0


def test_weights_that_a_checkpoint_lacks_are_not_asked_of_it() -> None:
    faults = Faults(learner_per_minute=0.1)
    with pytest.raises(ValueError, match="mode='exact' samples with older weights than a checkpoint holds"):
        simulate(pipeline(mode="exact"), constant(sample=1.0), num_steps=4, faults=faults)
    simulate(pipeline(mode="exact"), constant(sample=1.0), num_steps=4, faults=Faults(workers_per_minute=1.0))


# -- what is shown ------------------------------------------------------------------------------------------------


def test_each_role_that_fails_is_shown_alone() -> None:
    faults = FaultsConfig(per_minute=1.0, restart_s=10.0).faults
    assert faults.kinds == {
        "rollout workers": Faults(workers_per_minute=1.0, restart_s=10.0, learner_restart_s=120.0, checkpoint_steps=50),
        "scorers": Faults(scorers_per_minute=1.0, restart_s=10.0, learner_restart_s=120.0, checkpoint_steps=50),
    }
    costs = fault_costs([pipeline()], constant(sample=6.0, score=5.0, train=1.0), faults, num_steps=200, seed=0)
    assert costs[0].useful < min(costs[0].useful_alone.values()) < max(costs[0].useful_alone.values()) < 1
    header, _, row = [[cell.strip() for cell in line.strip("|").split("|")] for line in as_table(costs).splitlines()]
    cells = dict(zip(header, row, strict=True))
    assert cells["useful time"] == f"{costs[0].useful:.1%}"
    assert cells["if only scorers fail"] == f"{costs[0].useful_alone['scorers']:.1%}"
    assert "if only learner fail" not in cells
