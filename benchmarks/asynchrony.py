"""What asynchrony gains, and how it scales, against the ideal, with workers that sleep.

    python benchmarks/asynchrony.py [--steps 40] [--repeats 3] [--report FILE.md]

Real Ray processes, real loops, real messages; only sampling, scoring and training are replaced by sleeping for known
times (benchmarks/sleeping_roles.py), so that two cores can stand in for a cluster. Printed:

1. throughput of asynchronous over synchronous runs, against the ideal: (sum of the stages) / (longest stage);
2. documents per second with 1, 2, 4, 8 rollout workers, against N times one worker, until the learner limits them;
3. what orchestration/simulator/simulator.py predicts for each of these runs from the configured stage times.

Runs are interleaved over the repeats; medians are shown, with the lowest and highest.
"""

import asyncio
import math
import statistics
import sys
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from orchestration.ray_addresses import address_to_join  # noqa: E402
from orchestration.start_up import set_ray_environment  # noqa: E402

set_ray_environment(address_to_join())

import numpy as np  # noqa: E402
import ray  # noqa: E402
import tyro  # noqa: E402

from actors.rollout import Document  # noqa: E402
from benchmarks.measured import median_and_range  # noqa: E402
from benchmarks.sleeping_roles import SleepingFeatureServer, SleepingLearner, SleepingRolloutWorker  # noqa: E402
from orchestration.asynchrony_config import AsynchronyConfig  # noqa: E402
from orchestration.buffer.reuse import ReusePool  # noqa: E402
from orchestration.buffer.rollout_buffer import RolloutBuffer  # noqa: E402
from orchestration.cluster.cluster import Cluster  # noqa: E402
from orchestration.cluster.process_specs import ProcessSpec  # noqa: E402
from orchestration.config import PlacementConfig, RoleConfig  # noqa: E402
from orchestration.loops.controller import Controller  # noqa: E402
from orchestration.output.metrics import MetricsLog  # noqa: E402
from orchestration.roles.roles import LearnerRole, RolloutRole, ScorerRole  # noqa: E402
from orchestration.roles.weight_sync import WeightSync  # noqa: E402
from orchestration.simulator import simulator  # noqa: E402
from orchestration.simulator.stage_times import StageTime, StageTimes  # noqa: E402

WARM_UP_STEPS = 5
Sleeper = TypeVar("Sleeper")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure the orchestration with workers that sleep."""

    steps: int = 40
    """Learner steps of each run."""
    repeats: int = 3
    """Runs of each kind."""
    documents_per_step: int = 8
    """D."""
    sample_s: float = 0.2
    """Sampling one document [s]."""
    score_s: float = 0.02
    """Scoring one document [s]."""
    train_s: float = 0.25
    """One learner step [s]."""
    variation: float = 0.25
    """Each time is drawn from its mean times [1 - variation, 1 + variation]."""
    megabytes: float = 8.0
    """Weights that are published at each step."""
    report: Path | None = None
    """File for the tables, in addition to the terminal."""


@dataclass
class Rows:
    """A sink in memory."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def write(self, row: dict[str, float]) -> None:
        """Keep it."""
        self.rows.append(row)

    def close(self) -> None:
        """Nothing to close."""

    def mean(self, name: str) -> float:
        """Over the steps after the warm-up."""
        return statistics.mean(row.get(name, 0.0) for row in self.rows[WARM_UP_STEPS:])

    @property
    def step_s(self) -> float:
        """Mean time between two steps after the warm-up [s]."""
        steady = self.rows[WARM_UP_STEPS - 1 :]
        return (steady[-1]["time/elapsed_s"] - steady[0]["time/elapsed_s"]) / (len(steady) - 1)


def spec(name: str, role: RoleConfig, build: partial[Sleeper]) -> ProcessSpec[Sleeper]:
    """A role that sleeps."""
    return ProcessSpec(name=name, role=role, build=build, environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


class Pipeline:
    """One set of processes, used for all runs."""

    def __init__(self, settings: Benchmark, num_workers: int) -> None:
        one = RoleConfig(num_cpus=0.01)
        many = one.model_copy(update={"count": num_workers})
        self.settings, variation = settings, settings.variation
        self.cluster = Cluster(PlacementConfig(rollout=many, feature=one, learner=one), timeout_s=120.0)
        start = self.cluster.start
        worker = partial(SleepingRolloutWorker, sample_s=settings.sample_s, variation=variation)
        self.workers = start(spec("rollout worker", many, worker))
        server = partial(SleepingFeatureServer, score_s=settings.score_s, variation=variation)
        self.servers = start(spec("feature server", one, server))
        learner = partial(SleepingLearner, variation=variation, megabytes=settings.megabytes)
        self.ranks = start(spec("learner rank", one, learner))

    async def run(self, *, num_workers: int, max_lag: int, train_s: float) -> Rows:
        """One run; its rows."""
        settings, rows = self.settings, Rows()
        workers = self.workers[:num_workers]
        for remote in workers:
            await remote.call(SleepingRolloutWorker.reset)
        await self.ranks[0].call(SleepingLearner.reset, train_s=train_s)
        learner, metrics = LearnerRole(self.ranks, []), MetricsLog([rows])
        sync = WeightSync(learner, metrics)
        controller = Controller(
            buffer=RolloutBuffer(
                lambda count: [DOCUMENT] * count,
                pool=ReusePool(
                    documents_per_step=settings.documents_per_step, max_uses=1, max_reuse_lag=None, order="fifo", seed=0
                ),
                num_steps=settings.steps,
                lag_rule="in_order",
                max_lag=max_lag,
                prefetch_steps=max_lag,
                completions_per_context=4,
                seed=0,
            ),
            rollout_workers=[RolloutRole(remote) for remote in workers],
            scorers=[ScorerRole(remote) for remote in self.servers],
            learner=learner,
            weight_sync=sync,
            metrics=metrics,
            documents_per_request=1,
            batch_timeout_s=60.0,
            after_step=_nothing,
        )
        await sync.publish()
        await controller.run(settings.steps)
        return rows


def predicted_step_s(settings: Benchmark, measured: Rows, *, num_workers: int, max_lag: int, train_s: float) -> float:
    """The simulator's time of a step [s], from the configured times and those of a measured update."""
    cv = settings.variation / math.sqrt(3)  # of a uniform distribution
    times = StageTimes(
        sample=StageTime(settings.sample_s, cv),
        score=StageTime(settings.score_s, cv),
        train=StageTime(train_s, cv),
        publish=StageTime(measured.mean("weights/publish_s")),
        fetch=StageTime(measured.mean("weights/pull_s")),
    )
    pipeline = simulator.Pipeline(
        rollout_workers=num_workers,
        scorers=1,
        documents_per_step=settings.documents_per_step,
        documents_per_request=1,
        asynchrony=AsynchronyConfig(max_lag=max_lag),
    )
    return 1 / simulator.simulate(pipeline, times, num_steps=200).steps_per_s


def throughput_table(pipeline: Pipeline) -> str:
    """Asynchronous over synchronous steps per second, and the share of the ideal."""
    settings, num_workers = pipeline.settings, 4
    stages = {
        "sample": settings.documents_per_step * settings.sample_s / num_workers,
        "score": settings.documents_per_step * settings.score_s,
        "train": settings.train_s,
    }
    lags = (0, 1, 2, 4)
    measured: dict[int, list[Rows]] = {lag: [] for lag in lags}
    for _ in range(settings.repeats):
        for lag in lags:
            run = pipeline.run(num_workers=num_workers, max_lag=lag, train_s=settings.train_s)
            measured[lag].append(asyncio.run(run))
    step_s = {lag: statistics.median(rows.step_s for rows in runs) for lag, runs in measured.items()}
    publish_s = statistics.median(rows.mean("weights/publish_s") for rows in measured[1])
    longest = max(stages["sample"], stages["score"], stages["train"] + publish_s)
    lines = [
        f"Stages of a step: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in stages.items())}, publish "
        f"{publish_s:.3f} s; {num_workers} rollout workers.",
        "",
        "| max_lag | step [s] | simulated | over synchronous | ideal | share of the ideal | learner idle | ideal idle "
        "| mean lag |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ideal = (sum(stages.values()) + publish_s) / longest
    ideal_idle = 1 - (stages["train"] + publish_s) / longest
    for lag, runs in measured.items():
        gain = step_s[0] / step_s[lag]
        idle = statistics.median(rows.mean("idle/learner/batch_frac") for rows in runs)
        mean_lag = statistics.median(rows.mean("lag/mean") for rows in runs)
        share = f"{gain / ideal:.1%}" if lag else ""
        predicted = predicted_step_s(settings, runs[0], num_workers=num_workers, max_lag=lag, train_s=settings.train_s)
        lines.append(
            f"| {lag} | {median_and_range([r.step_s for r in runs])} | {predicted:.3f} | {gain:.2f} "
            f"| {ideal if lag else 1:.2f} | {share} | {idle:.1%} "
            f"| {f'{ideal_idle:.1%}' if lag else ''} | {mean_lag:.2f} |"
        )
    return "\n".join(lines)


def scaling_table(pipeline: Pipeline) -> str:
    """Documents per second by the number of rollout workers."""
    settings, counts = pipeline.settings, (1, 2, 4, 8)
    train_s = settings.documents_per_step * settings.sample_s / 6  # the learner is the bottleneck from 6 workers on
    measured: dict[int, list[Rows]] = {count: [] for count in counts}
    for _ in range(settings.repeats):
        for count in counts:
            measured[count].append(asyncio.run(pipeline.run(num_workers=count, max_lag=4, train_s=train_s)))
    per_s = {count: [settings.documents_per_step / rows.step_s for rows in runs] for count, runs in measured.items()}
    one = statistics.median(per_s[1])
    publish_s = statistics.median(rows.mean("weights/publish_s") for runs in measured.values() for rows in runs)
    learner = settings.documents_per_step / (train_s + publish_s)
    lines = [
        f"Learner: {train_s:.3f} s per step and {publish_s:.3f} s to publish, {learner:.1f} documents/s; max_lag 4.",
        "",
        "| rollout workers | documents/s | simulated | ideal | efficiency |",
        "| --- | --- | --- | --- | --- |",
    ]
    for count, rates in per_s.items():
        ideal = min(count * one, learner)
        step_s = predicted_step_s(settings, measured[count][0], num_workers=count, max_lag=4, train_s=train_s)
        predicted = settings.documents_per_step / step_s
        efficiency = statistics.median(rates) / ideal
        lines.append(f"| {count} | {median_and_range(rates)} | {predicted:.1f} | {ideal:.1f} | {efficiency:.1%} |")
    return "\n".join(lines)


async def _nothing(step: int) -> None:
    pass


DOCUMENT = Document(
    document_id="train/0",
    token_ids=np.arange(128),
    anchors=np.arange(8, 124, 4),
    horizon=4,
    ends_with_eos=False,
)


def main(settings: Benchmark) -> None:
    """Start the processes once, and do all runs with them."""
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    try:
        pipeline = Pipeline(settings, num_workers=8)
        with closing(pipeline.cluster):
            text = f"{throughput_table(pipeline)}\n\n{scaling_table(pipeline)}\n"
    finally:
        ray.shutdown()
    print(text)
    if settings.report is not None:
        settings.report.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
