"""The simulated pipeline against what can be worked out on paper: rates, idle shares, lags, drops of constant stages.

Times are fractions with a power of two below the line, so that the virtual clock adds them up without rounding.
"""

import asyncio
import itertools
import math
import random
import statistics
from dataclasses import dataclass, replace

import pytest

from actors.rollout import RolloutSummary, Ticket
from orchestration.asynchrony_config import AsynchronyConfig
from orchestration.buffer.uses import Lag, Use
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulated_roles import (
    SimulatedLearner,
    SimulatedManifest,
    SimulatedPublication,
    SimulatedWorker,
)
from orchestration.simulator.simulated_run import DOCUMENT
from orchestration.simulator.simulator import Simulated, simulate
from orchestration.simulator.stage_times import (
    StageTime,
    StageTimes,
    ideal_speedup,
    longest_stage_s,
    step_in_sequence_s,
)
from orchestration.simulator.virtual_time import run_in_virtual_time

NUM_STEPS = 24
"""A multiple of every period that occurs here."""


def pipeline(
    *,
    workers: int = 1,
    scorers: int = 1,
    documents: int = 1,
    per_request: int = 1,
    updates: str = "wait",
    **asynchrony: object,
) -> Pipeline:
    return Pipeline(
        rollout_workers=workers,
        scorers=scorers,
        documents_per_step=documents,
        documents_per_request=per_request,
        asynchrony=AsynchronyConfig(**asynchrony),
        in_flight_updates=updates,
    )


def constant(**seconds: float) -> StageTimes:
    """Stages that always take as long; those that are not named take no time."""
    return StageTimes(**({name: StageTime(0.0) for name in ("sample", "score", "train")} | each(seconds, 0.0)))


def varying(cv: float, **seconds: float) -> StageTimes:
    return StageTimes(**each(seconds, cv))


def each(seconds: dict[str, float], cv: float) -> dict[str, StageTime]:
    return {name: StageTime(mean_s, cv) for name, mean_s in seconds.items()}


def step_s(simulated: Simulated) -> float:
    return round(1 / simulated.steps_per_s, 12)


def run(what: Pipeline, times: StageTimes, *, seed: int = 0, num_steps: int = NUM_STEPS) -> Simulated:
    return simulate(what, times, num_steps=num_steps, seed=seed)


# -- the synchronous algorithm ------------------------------------------------------------------------------------


def synchronous_step_s(what: Pipeline, times: StageTimes) -> float:
    """One step by hand: requests go to whichever is free first, workers, then scorers; no step reaches into another."""
    workers = [times.fetch.mean_s + times.pause.mean_s] * what.rollout_workers
    left, sampled = what.documents_per_step, []
    while left:
        size = min(left, what.documents_per_request)
        first = workers.index(min(workers))
        workers[first] += times.request.mean_s + size * times.sample.mean_s
        sampled.append((workers[first], size))
        left -= size
    scorers = [0.0] * what.scorers
    for arrival, size in sorted(sampled):
        first = scorers.index(min(scorers))
        scorers[first] = max(scorers[first], arrival) + size * times.score.mean_s
    return max(scorers) + times.train.mean_s + times.publish.mean_s


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("scorers", "score_s"), [(1, 0.125), (1, 1.0), (2, 1.0)])
@pytest.mark.parametrize(("documents", "per_request"), [(4, 4), (4, 2), (4, 1), (5, 2), (3, 8)])
def test_lag_0_takes_every_stage_after_the_other(
    documents: int, per_request: int, scorers: int, score_s: float, workers: int
) -> None:
    what = pipeline(workers=workers, scorers=scorers, documents=documents, per_request=per_request, max_lag=0)
    times = constant(sample=0.5, request=0.25, score=score_s, train=2.0, publish=0.25, fetch=0.0625, pause=0.125)
    simulated = run(what, times)
    assert step_s(simulated) == synchronous_step_s(what, times)
    assert simulated.lag.counts == {0: documents * NUM_STEPS}
    assert simulated.documents_per_s == pytest.approx(documents * simulated.steps_per_s)


def test_lag_0_with_one_process_per_role_is_the_sum_of_all_stages() -> None:
    times = constant(sample=0.5, request=0.25, score=0.125, train=2.0, publish=0.5, fetch=0.0625, pause=0.1875)
    simulated = run(pipeline(documents=4, per_request=4, max_lag=0), times)
    whole = 0.0625 + 0.1875 + (0.25 + 4 * 0.5) + 4 * 0.125 + 2.0 + 0.5
    assert whole == 5.5
    assert step_s(simulated) == whole
    assert simulated.idle == pytest.approx(
        {
            "rollout/admission": (0.5 + 2.0 + 0.5) / whole,
            "rollout/weights": (0.0625 + 0.1875) / whole,
            "score/rollouts": 1 - 0.5 / whole,
            "learner/batch": (0.25 + 2.25 + 0.5) / whole,
            "learner/publish": 0.5 / whole,
        }
    )


# -- rates with a lag ---------------------------------------------------------------------------------------------

STAGES = [
    pytest.param(constant(sample=1.0, score=0.25, train=0.5), id="workers"),
    pytest.param(constant(sample=0.25, score=1.0, train=0.5), id="scorers"),
    pytest.param(constant(sample=0.5, score=0.25, train=0.75, publish=0.25), id="learner"),
]


@pytest.mark.parametrize("policy", ["in_order", "wait", "drop"])
@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
@pytest.mark.parametrize("times", STAGES)
def test_the_window_or_the_longest_stage_sets_the_rate(times: StageTimes, max_lag: int, policy: str) -> None:
    """A line of stages that holds max_lag + 1 steps passes one every max(longest, sum / (max_lag + 1))."""
    stages = [times.sample.mean_s, times.score.mean_s, times.train.mean_s + times.publish.mean_s]
    simulated = run(pipeline(max_lag=max_lag, lag_rule=policy), times)
    assert step_s(simulated) == max(*stages, sum(stages) / (max_lag + 1))
    assert simulated.share_of_ideal == max(stages) / step_s(simulated)


@pytest.mark.parametrize(("workers", "expected_s"), [(1, 8.0), (2, 4.0), (4, 3.0), (8, 3.0)])
def test_workers_multiply_the_rate_until_the_learner_sets_it(workers: int, expected_s: float) -> None:
    simulated = run(pipeline(workers=workers, documents=8, max_lag=2), constant(sample=1.0, score=0.125, train=3.0))
    assert step_s(simulated) == expected_s


@pytest.mark.parametrize(("scorers", "expected_s"), [(1, 8.0), (2, 4.0), (4, 3.0), (8, 3.0)])
def test_scorers_multiply_the_rate_until_the_learner_sets_it(scorers: int, expected_s: float) -> None:
    simulated = run(pipeline(scorers=scorers, documents=8, max_lag=2), constant(sample=0.125, score=1.0, train=3.0))
    assert step_s(simulated) == expected_s


def test_shares_that_do_not_divide_even_out_over_several_steps() -> None:
    what, times = pipeline(workers=3, documents=4, max_lag=2), constant(sample=1.0, train=0.5)
    assert step_s(run(what, times)) == pytest.approx(4 / 3)
    assert step_s(run(replace(what, asynchrony=AsynchronyConfig(max_lag=0)), times)) == 2 * 1.0 + 0.5


def test_idle_shares_of_a_worker_that_the_learner_holds_back() -> None:
    times = constant(sample=0.5, score=0.25, train=1.5, publish=0.5, fetch=0.125, pause=0.25)
    simulated = run(pipeline(workers=2, max_lag=2), times)
    assert step_s(simulated) == 2.0
    # Fetch and pause follow each publication in both workers; only in the one with the next ticket does it wait.
    assert simulated.idle == pytest.approx(
        {
            "rollout/admission": 1 - (0.375 + 0.5) / (2 * 2.0),
            "rollout/weights": 0.375 / (2 * 2.0),
            "score/rollouts": 1 - 0.25 / 2.0,
            "learner/batch": 0.0,
            "learner/publish": 0.5 / 2.0,
        }
    )


def test_idle_shares_are_of_the_time_and_not_of_the_steps() -> None:
    """Steps differ in length, publications do not: their share is their number times their length."""
    times = replace(constant(sample=0.25, publish=0.5), train=StageTime(1.0, cv=2.0))
    simulated = run(pipeline(max_lag=1), times, num_steps=100)
    assert simulated.idle["learner/publish"] == pytest.approx(0.5 * simulated.steps_per_s)


# -- weights under way --------------------------------------------------------------------------------------------

UPDATES = constant(sample=2.0, train=0.5, fetch=0.25, pause=0.125)
"""The learner publishes 0.5 s after a rollout has arrived, in the middle of the next request."""


@pytest.mark.parametrize(
    ("updates", "expected_s", "lag"),
    [
        pytest.param("wait", 2.0 + 0.125, 1, id="wait: the pause follows the request"),
        pytest.param("keep", 2.0 + 0.125, 1, id="keep: the pause is in it, and its first tokens are the old ones'"),
        pytest.param("abort", 0.5 + 0.25 + 0.125 + 2.0, 0, id="abort: it restarts after the pause"),
    ],
)
def test_what_an_update_costs_a_worker_that_is_never_idle(updates: str, expected_s: float, lag: int) -> None:
    simulated = run(pipeline(max_lag=2, updates=updates), UPDATES)
    assert step_s(simulated) == pytest.approx(expected_s, rel=1e-12)
    assert simulated.lag.counts == {lag: NUM_STEPS}
    assert simulated.idle["rollout/weights"] == 0.0, "it waited for weights that its tickets did not require"


@pytest.mark.parametrize(
    ("updates", "ends_at", "versions"),
    [
        pytest.param("wait", 4.0, (0, 0), id="wait: the first one waits till 4, the second comes after it"),
        pytest.param("keep", 4.0 + 2 * 0.5, (0, 2), id="keep: two pauses"),
        pytest.param("abort", 1.0 + 0.5 + 4.0, (1, 1), id="abort: it restarts once, the second comes after it"),
    ],
)
def test_two_updates_may_reach_one_request(updates: str, ends_at: float, versions: tuple[int, int]) -> None:
    times = constant(sample=4.0, fetch=1.0, pause=0.5)

    async def update(worker: SimulatedWorker) -> None:
        await worker.receive_weights(SimulatedPublication(SimulatedManifest(1), publish_s=0.0))
        await asyncio.sleep(0.5)
        await worker.receive_weights(SimulatedPublication(SimulatedManifest(2), publish_s=0.0))

    async def scenario() -> tuple[float, tuple[int, int]]:
        worker = SimulatedWorker("worker", times, seed=0, in_flight_updates=updates)
        ticket = Ticket(ticket_id=0, document=DOCUMENT, seed=0, completions_per_context=1, min_policy_version=0)
        updating = asyncio.create_task(update(worker))
        ((summary, _),) = await worker.sample([ticket])
        ended_at = asyncio.get_running_loop().time()
        await updating
        assert worker.policy_version == 2
        return ended_at, (summary.min_policy_version, summary.max_policy_version)

    assert run_in_virtual_time(scenario()) == (ends_at, versions)


def test_exact_lag_fetches_the_weights_its_tickets_name_before_every_step() -> None:
    simulated = run(pipeline(mode="exact", max_lag=3), UPDATES)
    assert simulated.lag.counts == {3: NUM_STEPS}
    assert step_s(simulated) == 0.25 + 0.125 + 2.0


# -- lag ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LagCase:
    what: Pipeline
    times: StageTimes
    counts: dict[int, float]
    """Lag -> share of the uses."""
    in_flight: float
    in_queue: float
    reuse: float = 0.0


LAGS = {
    "fast worker": LagCase(
        pipeline(max_lag=3), constant(sample=0.25, score=0.25, train=1.0), {3: 1.0}, 0.0, 3.0
    ),
    "slow but many workers": LagCase(
        # Sampled from second v to v + 2.5, with a version every second.
        pipeline(workers=4, max_lag=4), constant(sample=2.5, train=1.0), {4: 1.0}, 2.0, 2.0
    ),
    "slow worker": LagCase(
        # While ticket n is sampled, from 2 n to 2 n + 2, version n comes at 2 n + 0.5: one behind, whatever the bound.
        pipeline(max_lag=4), constant(sample=2.0, train=0.5), {1: 1.0}, 1.0, 0.0
    ),
    "two requests per step": LagCase(
        # Both before the step before is published (at 2.25 n): the second sees the same version as the first.
        pipeline(documents=2, max_lag=1), constant(sample=0.5, score=0.125, train=2.25), {1: 1.0}, 0.0, 1.0
    ),
    "every rollout twice": LagCase(
        # Half of each step is fresh, at lag 1, the other half one step older.
        pipeline(documents=2, max_lag=1, max_uses=2), constant(sample=0.25, train=1.0), {1: 0.5, 2: 0.5}, 0.0, 1.0, 0.5
    ),
    "free": LagCase(
        pipeline(max_lag=2, mode="free"), constant(sample=0.25, train=1.0), {2: 1.0}, 0.0, 2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAGS.values(), ids=LAGS)
def test_lag_of_constant_stages_follows_from_the_timetable(case: LagCase) -> None:
    lag = run(case.what, case.times).lag
    uses = case.what.documents_per_step * NUM_STEPS
    assert lag.counts == {value: share * uses for value, share in case.counts.items()}
    assert (lag.in_flight, lag.in_queue, lag.reuse) == (case.in_flight, case.in_queue, case.reuse)
    assert lag.mean == sum(value * share for value, share in case.counts.items())
    assert lag.largest == max(case.counts)


def test_reuse_in_a_random_order_ages_differently_from_one_use_to_the_next() -> None:
    times = constant(sample=0.25, train=1.0)
    fifo, uniform = (
        run(pipeline(documents=4, max_lag=1, max_uses=2, max_reuse_lag=9, reuse_order=order), times).lag
        for order in ("fifo", "uniform")
    )
    assert set(fifo.counts) == {1, 2}
    assert len(uniform.counts) > 4
    assert uniform.largest <= 9


@pytest.mark.parametrize("score_s", [0.0, 0.25])
def test_a_worker_as_fast_as_the_learner_is_one_step_behind(score_s: float) -> None:
    """Ticket n needs version n - 1, and there is no newer one before ticket n - 1 is trained on."""
    simulated = run(pipeline(max_lag=1), constant(sample=1.0, score=score_s, train=1.0))
    assert simulated.lag.counts == {1: NUM_STEPS}
    assert step_s(simulated) == (2.0 + score_s) / 2


@pytest.mark.parametrize("policy", ["in_order", "wait", "drop", "exact"])
@pytest.mark.parametrize("updates", ["wait", "keep"])
def test_no_variation_of_times_takes_lag_beyond_its_bound(updates: str, policy: str) -> None:
    times = varying(1.5, sample=1.0, score=0.2, train=0.5, publish=0.1, fetch=0.3, pause=0.1)
    bounded = {"mode": "exact"} if policy == "exact" else {"lag_rule": policy}
    for max_lag, workers, seed in itertools.product((0, 1, 3), (2, 5), range(2)):
        what = pipeline(workers=workers, documents=2, max_lag=max_lag, updates=updates, **bounded)
        lag = run(what, times, seed=seed, num_steps=60).lag
        assert lag.largest <= max_lag
        assert lag.mean <= max_lag
        assert lag.largest == max_lag or workers == 2, "a bound that is never reached is not tested"


# -- dropped documents --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NowAndThen:
    """As StageTime: half a second, and 16 s for one ticket in `every`."""

    every: int

    @property
    def mean_s(self) -> float:
        return 0.5 + (16.0 - 0.5) / self.every

    def draw(self, seed: int, stage: str, ticket_id: int) -> float:
        return 16.0 if ticket_id % self.every == 0 else 0.5


@pytest.mark.parametrize(("every", "max_lag"), [(4, 1), (9, 1), (9, 2)])
def test_with_drop_every_rollout_that_takes_too_long_is_dropped_once(every: int, max_lag: int) -> None:
    """Of `every` tickets claimed in a row one takes long. The others are trained on, one per step, before it arrives:
    more than max_lag steps. So it is dropped, and its document claimed again under a number of its own.
    """
    times = replace(constant(train=1.0), sample=NowAndThen(every))
    trained = every - 1
    dropping, pacing = (
        run(pipeline(workers=3, max_lag=max_lag, lag_rule=policy), times, num_steps=6 * trained)
        for policy in ("drop", "in_order")
    )
    assert dropping.dropped_per_step == pytest.approx(1 / trained)
    assert pacing.dropped_per_step == 0
    assert max(dropping.lag.largest, pacing.lag.largest) <= max_lag
    assert dropping.steps_per_s > pacing.steps_per_s


def test_rollouts_too_old_to_be_used_again_are_counted() -> None:
    """Two steps repeat. The first finds an empty pool: besides the planned rollout (lag 1) it has a second one sampled,
    at once and with the newest weights (lag 0), and waits for it. In the next step the planned one is 2 behind, too
    old, and the other is used again (lag 1) with a planned one (lag 1), which is too old the step after.
    """
    what = pipeline(documents=2, max_lag=1, max_uses=2, max_reuse_lag=1)
    simulated = run(what, constant(sample=0.25, train=1.0))
    assert simulated.expired_per_step == 1
    assert simulated.lag.counts == {0: NUM_STEPS / 2, 1: 3 * NUM_STEPS / 2}
    assert step_s(simulated) == (0.25 + 1.0 + 1.0) / 2


# -- stage times and the ideal ------------------------------------------------------------------------------------


def test_drawn_seconds_have_the_configured_mean_and_variation() -> None:
    stage = StageTime(2.0, cv=0.5)
    drawn = [stage.draw("some", number) for number in range(40_000)]
    assert statistics.fmean(drawn) == pytest.approx(2.0, rel=0.01)
    assert statistics.pstdev(drawn) == pytest.approx(1.0, rel=0.03)
    logarithms = [math.log(seconds) for seconds in drawn]
    median = statistics.median(drawn)
    assert statistics.fmean(logarithms) == pytest.approx(math.log(median), abs=0.01), "skewed: not a log-normal"


def test_a_draw_depends_on_its_key_alone() -> None:
    stage = StageTime(1.0, cv=1.0)
    keys = list(itertools.product((0, 1), ("sample", "score"), range(20)))
    drawn = {key: stage.draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    random.Random(0).shuffle(keys)
    assert all(stage.draw(*key) == drawn[key] for key in keys)
    assert StageTime(3.0, cv=1.0).draw(*keys[0]) == pytest.approx(3 * drawn[keys[0]])
    assert StageTime(3.0).draw("anything") == 3.0


@pytest.mark.parametrize("broken", [{"mean_s": -1.0}, {"mean_s": math.nan}, {"mean_s": 1.0, "cv": math.inf}])
def test_impossible_times_are_refused(broken: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite number >= 0; measure it again"):
        StageTime(**broken)


def test_the_ideal_of_a_small_cluster() -> None:
    """7 documents in requests of 2, 2, 2 and 1, on 3 workers and 2 scorers."""
    times = constant(sample=3.0, request=1.0, score=0.5, train=5.0, publish=0.5, fetch=0.25, pause=0.75)
    cluster = {"rollout_workers": 3, "scorers": 2, "fresh_documents": 7, "documents_per_request": 2}
    longest = 7 * (3.0 + 1.0 / 2) / 3  # the workers; scorers have 1.75 s, the learner 5.5 s to do
    in_sequence = 1.0 + (2 * 1.0 + 3 * 3.0) + 4 * 0.5 + 5.5  # worker 0: requests of 2 and 1; scorer 0: of 2 and 2
    assert longest_stage_s(times, **cluster) == pytest.approx(longest)
    assert step_in_sequence_s(times, **cluster) == in_sequence
    assert ideal_speedup(times, **cluster) == pytest.approx(in_sequence / longest)
    assert longest_stage_s(times, **cluster | {"rollout_workers": 12}) == 5.5
    assert longest_stage_s(times, **cluster | {"rollout_workers": 12, "fresh_documents": 70, "scorers": 1}) == 35.0


def test_nothing_is_faster_than_the_ideal() -> None:
    draw = random.Random(4)
    gains = []
    ends = 1 / NUM_STEPS  # by so much the first and the last step may change a rate whose period is several steps long
    for _ in range(15):
        what = pipeline(
            workers=draw.randint(1, 4),
            scorers=draw.randint(1, 2),
            documents=draw.randint(1, 6),
            per_request=draw.randint(1, 3),
            max_lag=draw.choice((1, 4)),
        )
        seconds = {name: draw.randint(0, 8) / 8 for name in ("sample", "score", "train", "publish", "request")}
        times = constant(**seconds | {"train": seconds["train"] + 0.125})
        simulated, synchronous = (
            run(one, times) for one in (what, replace(what, asynchrony=AsynchronyConfig(max_lag=0)))
        )
        gain = simulated.steps_per_s / synchronous.steps_per_s
        assert simulated.share_of_ideal <= 1 + ends
        assert 1 - ends <= gain <= what.ideal_speedup(times) * (1 + ends)
        gains.append(gain / what.ideal_speedup(times))
    assert max(gains) > 0.99, "the bound is never reached: too generous?"


# -- the simulation itself ----------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    what = pipeline(workers=3, scorers=2, documents=4, per_request=2, max_lag=2, lag_rule="drop", updates="abort")
    times = varying(0.7, sample=1.0, request=0.2, score=0.2, train=0.9, publish=0.1, fetch=0.3, pause=0.1)
    first, again, other = (run(what, times, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first.steps_per_s != other.steps_per_s


def test_the_learner_refuses_a_lag_that_is_not_the_one_handed_over() -> None:
    summary = RolloutSummary(
        ticket_id=7, min_policy_version=0, max_policy_version=0, num_completion_tokens=0, sample_s=0.0
    )
    ticket = Ticket(ticket_id=7, document=DOCUMENT, seed=0, completions_per_context=1, min_policy_version=0)

    async def train(lag: int) -> None:
        use = Use(ticket=ticket, payload=summary, reuse_index=0, lag=Lag(in_flight=lag, in_queue=0, reuse=0))
        await SimulatedLearner(constant(), seed=0).train_step([use])

    asyncio.run(train(0))
    with pytest.raises(RuntimeError, match="ticket 7 was sampled by version 0"):
        asyncio.run(train(1))


def test_a_pipeline_in_which_nothing_takes_time_is_refused() -> None:
    with pytest.raises(ValueError, match="all stage times are 0 s"):
        run(pipeline(), constant())
