"""The command that sizes a cluster: where stage times come from, what is refused, what is compared and shown."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from pydantic import ValidationError

from actors.config import RolloutConfig
from learner.config import LearnerConfig, StepConfig
from orchestration.asynchrony_config import AsynchronyConfig, LagConfig
from orchestration.command_line import readable
from orchestration.config import PlacementConfig, RoleConfig, RoleSize, RunConfig, dump_config
from orchestration.output.metrics import METRICS
from orchestration.simulator.cluster_sizes import as_table, compare, smallest_good, synchronous
from orchestration.simulator.measured_times import METRICS_OF, SKIPPED_STEPS, measured_times
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.simulate_config import ScorersConfig, SimulateConfig, parse_simulation
from orchestration.simulator.simulator import run_pipeline, simulate
from orchestration.simulator.stage_times import StageTime, StageTimes
from orchestration.simulator.virtual_time import run_in_virtual_time

ROOT = Path(__file__).resolve().parents[2]
TIMES = ["--times.sample-s", "1", "--times.score-s", "0.25", "--times.train-s", "2"]
WriteMetrics = Callable[[Sequence[dict[str, float]]], Path]


@pytest.fixture
def write_metrics(tmp_path: Path) -> WriteMetrics:
    def write(rows: Sequence[dict[str, float]]) -> Path:
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def row(step: int, **other: float) -> dict[str, float]:
    """A row of a training step in which the stages, in their order, take 10, 20, 30, 40, 50 and 6 s."""
    learner = {"time/step_s": 75.0, "time/wait_for_batch_s": 5.0, "weights/publish_s": 40.0, "time/train_s": 29.0}
    worker = {"rollout/sample_s": 10.0, "weights/pull_s": 56.0, "weights/pause_s": 4.0, "weights/probe_s": 2.0}
    return {"step": step, "score/score_s": 20.0} | learner | worker | other


# -- stage times --------------------------------------------------------------------------------------------------


def test_every_stage_is_read_from_a_metric_that_exists() -> None:
    assert {name for names in METRICS_OF.values() for name in names} <= METRICS.keys()


def test_stage_times_are_the_medians_of_the_later_steps(write_metrics: WriteMetrics) -> None:
    early = [row(step, **{"time/step_s": 1000.0, "weights/pull_s": 6.5}) for step in range(1, SKIPPED_STEPS + 1)]
    evaluations = [{"step": 50, "eval/seconds": 7.0, "rollout/sample_s": 500.0}] * 9
    steps, pulls = (65.0, 75.0, 76.0, 77.0, 400.0), (56.0, 54.0, 60.0, 57.0, 58.0)
    later = [
        row(9 + i, **{"time/step_s": step_s, "weights/pull_s": pull_s})
        for i, (step_s, pull_s) in enumerate(zip(steps, pulls, strict=True))
    ]
    measured = measured_times(write_metrics(early + evaluations + later), fresh_documents=4)
    assert {stage: time.mean_s for stage, time in measured.items()} == {
        "sample": 10.0,
        "score": 20.0,
        "train": 31.0,
        "publish": 40.0,
        "fetch": 54.0 - 6.0,
        "pause": 6.0,
    }


def test_a_value_that_was_not_finite_is_left_out(write_metrics: WriteMetrics) -> None:
    rows = [row(10 + i, **{"weights/publish_s": value}) for i, value in enumerate((40.0, None, 42.0))]
    assert measured_times(write_metrics(rows), fresh_documents=4)["publish"].mean_s == 41.0


def test_variation_is_that_of_the_middle_half_and_larger_for_one_document(write_metrics: WriteMetrics) -> None:
    normal = statistics.NormalDist(mu=8.0, sigma=0.8)
    quantiles = normal.quantiles(401)  # as many rows, distributed exactly
    quantiles[-8:] = [1e6] * 8
    rows = [row(10 + i, **{"time/step_s": 45.0 + s, "rollout/sample_s": s}) for i, s in enumerate(quantiles)]
    measured = measured_times(write_metrics(rows), fresh_documents=16)
    assert measured["train"].cv == pytest.approx(0.1, rel=0.02)
    assert measured["sample"].cv == pytest.approx(0.1 * math.sqrt(16), rel=0.02)
    assert measured["score"].cv == measured["pause"].cv == 0


def test_metrics_of_a_simulation_give_back_the_times_it_was_given(write_metrics: WriteMetrics) -> None:
    """What the controller writes and what is read here are the same things."""
    stages = {"sample": 0.25, "score": 0.125, "train": 3.0, "publish": 0.5, "fetch": 0.0625, "pause": 0.375}
    times = StageTimes(**{stage: StageTime(seconds) for stage, seconds in stages.items()})
    what = Pipeline(
        rollout_workers=2, scorers=1, documents_per_step=4, documents_per_request=2, asynchrony=AsynchronyConfig()
    )
    rows = run_in_virtual_time(run_pipeline(what, times, num_steps=20, seed=0)).rows
    assert measured_times(write_metrics(rows), fresh_documents=4) == {s: getattr(times, s) for s in stages}


def test_a_file_with_too_few_rows_is_refused(write_metrics: WriteMetrics, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no metrics '.*gone.jsonl'"):
        measured_times(tmp_path / "gone.jsonl", fresh_documents=1)
    with pytest.raises(ValueError, match="no training step after step 3"):
        measured_times(write_metrics([row(step) for step in range(1, 4)]), fresh_documents=1)
    path = write_metrics([row(4)])
    path.write_text(path.read_text() + '{"step": 5, "ti')
    with pytest.raises(ValueError, match="row 2 is not JSON"):
        measured_times(path, fresh_documents=1)


MISSING = [
    ("rollout/sample_s", "--times.sample-s"),
    ("score/score_s", "--times.score-s"),
    ("time/wait_for_batch_s", "--times.train-s"),
    ("weights/pull_s", "--times.fetch-s"),
]


@pytest.mark.parametrize(("metric", "flag"), MISSING)
def test_a_metric_that_is_missing_is_named_with_the_flag_that_replaces_it(
    metric: str, flag: str, write_metrics: WriteMetrics
) -> None:
    path = str(write_metrics([{name: value for name, value in row(9).items() if name != metric}] * 5))
    with pytest.raises(ValueError, match=rf"has no .*{metric}.* after its first steps; give {flag} SECONDS"):
        parse_simulation(["--times-from", path])
    stage = flag.removeprefix("--times.").removesuffix("-s")
    assert getattr(parse_simulation(["--times-from", path, flag, "0.5"]).stage_times(), stage) == StageTime(0.5)


def test_a_metric_of_two_stages_takes_two_flags(write_metrics: WriteMetrics) -> None:
    path = str(write_metrics([{name: value for name, value in row(9).items() if name != "weights/probe_s"}] * 5))
    flags = ["--times-from", path]
    for stage in ("fetch", "pause"):
        with pytest.raises(ValueError, match=rf"no weights/probe_s .*; give --times\.{stage}-s SECONDS"):
            parse_simulation(flags)
        flags += [f"--times.{stage}-s", "1"]
    assert parse_simulation(flags).stage_times().pause == StageTime(1.0)


def test_flags_override_the_file_and_the_file_the_defaults(write_metrics: WriteMetrics) -> None:
    path = str(write_metrics([row(9)] * 5))
    flags = ["--times.train-s", "7", "--times.train-cv", "0.5", "--times.request-s", "0.25"]
    times = parse_simulation(["--times-from", path, *flags]).stage_times()
    assert (times.train, times.request) == (StageTime(7.0, 0.5), StageTime(0.25))
    assert (times.sample, times.publish) == (StageTime(10.0), StageTime(40.0))
    alone = parse_simulation(TIMES).stage_times()
    assert (alone.sample, alone.publish, alone.pause) == (StageTime(1.0), StageTime(0.0), StageTime(0.0))


# -- configuration ------------------------------------------------------------------------------------------------

BROKEN_RULES = [
    pytest.param({"rollout_workers": [0, 1]}, "rollout_workers.0=0", id="no workers"),
    pytest.param({"rollout_workers": []}, "rollout_workers=[]", id="nothing to compare"),
    pytest.param({"rollout_workers": [4, 2]}, "ascending whole numbers, such as 1 2 4, got (4, 2)", id="order"),
    pytest.param({"max_lag": [1, 1]}, "ascending whole numbers, such as 1 2 4, got (1, 1)", id="twice"),
    pytest.param({"max_lag": [-1]}, "max_lag.0=-1", id="negative lag"),
    pytest.param({"scorers": [0]}, "scorers.0=0", id="no scorers"),
    pytest.param({"faults": {"per_minute": -1}}, "faults.per_minute=-1", id="negative faults"),
    pytest.param({"faults": {"checkpoint_steps": 0}}, "faults.checkpoint_steps=0", id="no checkpoints"),
    pytest.param({"times": {"sample_s": -1}}, "times.sample_s=-1", id="negative time"),
    pytest.param({"rollout": {"in_flight_updates": "drop"}}, "in_flight_updates='drop'", id="unknown word"),
]


@pytest.mark.parametrize(("settings", "message"), BROKEN_RULES)
def test_meaningless_values_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        SimulateConfig.model_validate(settings)
    assert message in readable(refusal.value, SimulateConfig)


REFUSED = [
    pytest.param([], "no time is given for stage sample; give --times-from METRICS or --times.sample-s", id="no times"),
    pytest.param([*TIMES, "--learner.objective", "sft"], "'sft' samples nothing", id="nothing to sample"),
    pytest.param([*TIMES, "--asynchrony.max-uses", "3"], "must be a multiple of asynchrony.max_uses=3", id="uses"),
    pytest.param(
        [*TIMES, "--asynchrony.lag-rule", "drop", "--asynchrony.prefetch-steps", "1", "--max-lag", "0", "1"],
        "max_lag=0 of (0, 1): prefetch_steps=1 exceeds max_lag=0",
        id="prefetch_steps beyond one of the bounds",
    ),
    pytest.param(["gone.toml", *TIMES], "'gone.toml' does not exist", id="file"),
    pytest.param(["--times-from", "gone.jsonl"], "there are no metrics 'gone.jsonl'", id="metrics"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_simulated_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        parse_simulation(arguments)
    assert message in str(refusal.value)


def test_the_file_of_a_run_defines_its_pipeline(tmp_path: Path) -> None:
    run = RunConfig(
        seed=3,
        learner=LearnerConfig(documents_per_step=12),
        rollout=RolloutConfig(documents_per_request=3, in_flight_updates="keep"),
        asynchrony=AsynchronyConfig(max_lag=1, lag_rule="drop", prefetch_steps=1, max_uses=2),
        placement=PlacementConfig(feature=RoleConfig(count=3), verifier=RoleConfig(count=5)),
    )
    path = tmp_path / "config.toml"
    path.write_text(dump_config(run))
    config = parse_simulation([str(path), *TIMES, "--rollout-workers", "2", "--max-lag", "1", "3"])
    assert config.seed == 3
    assert config.pipelines == [
        Pipeline(
            rollout_workers=2,
            scorers=3,
            documents_per_step=12,
            documents_per_request=3,
            asynchrony=LagConfig(max_lag=max_lag, lag_rule="drop", prefetch_steps=1, max_uses=2),
            in_flight_updates="keep",
        )
        for max_lag in (1, 3)
    ]
    path.write_text(tomli_w.dumps({"learner": {"documents_per_stepp": 3}}))
    with pytest.raises(ValueError, match=r"learner\.documents_per_stepp: there is no such key"):
        parse_simulation([str(path), *TIMES])


def test_a_verifier_scores_where_there_is_one() -> None:
    placement = ScorersConfig(feature=RoleSize(count=3), verifier=RoleSize(count=5))
    config = SimulateConfig(placement=placement)
    assert config.numbers_of_scorers == (3,)
    assert config.model_copy(update={"learner": StepConfig(objective="rlvr")}).numbers_of_scorers == (5,)
    assert config.model_copy(update={"scorers": (1, 2)}).numbers_of_scorers == (1, 2)


def test_every_key_is_described() -> None:
    sections = ("times", "faults", "rollout", "learner", "asynchrony", "placement")
    assert not [name for name, f in SimulateConfig.model_fields.items() if name not in sections and not f.description]


# -- comparison ---------------------------------------------------------------------------------------------------


def cluster(*, workers: int = 1, scorers: int = 1, **asynchrony: object) -> Pipeline:
    return Pipeline(
        rollout_workers=workers,
        scorers=scorers,
        documents_per_step=4,
        documents_per_request=1,
        asynchrony=LagConfig(**asynchrony),
    )


def constant(*, sample: float, score: float, train: float) -> StageTimes:
    return StageTimes(sample=StageTime(sample), score=StageTime(score), train=StageTime(train))


def test_the_gain_is_over_lag_0_on_the_same_processes() -> None:
    times = constant(sample=1.0, score=0.125, train=3.0)
    pipelines = [cluster(workers=workers, max_lag=max_lag) for workers in (1, 4) for max_lag in (0, 2)]
    gains = [size.speedup for size in compare(pipelines, times, num_steps=12, seed=0)]
    # Lag 0: the last document is scored 0.125 s after its sampling (four at once: one after the other), then 3 s.
    assert gains == pytest.approx([1.0, (4 + 0.125 + 3) / 4, 1.0, (1 + 4 * 0.125 + 3) / 3])


def test_what_is_compared_with_is_synchronous_whatever_the_settings() -> None:
    what = cluster(
        workers=3, max_lag=4, lag_rule="drop", prefetch_steps=2, max_uses=2, max_reuse_lag=7, reuse_order="uniform"
    )
    lag = simulate(synchronous(what), constant(sample=1.0, score=0.5, train=1.0), num_steps=12).lag
    assert (lag.in_flight, lag.in_queue) == (0, 0)
    assert lag.reuse > 0, "reuse is no matter of asynchrony"
    for mode in ("exact", "free"):
        free = cluster(max_lag=4, mode=mode)
        assert simulate(synchronous(free), constant(sample=1.0, score=0.5, train=1.0), num_steps=3).lag.largest == 0


@pytest.mark.parametrize(
    ("times", "max_lag", "bottleneck"),
    [
        (constant(sample=1.0, score=0.25, train=2.0), 2, "rollout workers"),
        (constant(sample=0.25, score=1.0, train=2.0), 2, "scorers"),
        (constant(sample=0.25, score=0.25, train=2.0), 2, "learner"),
        (constant(sample=0.5, score=0.5, train=2.0), 0, "max_lag"),
        (constant(sample=0.01, score=0.01, train=2.0), 0, "learner"),
    ],
)
def test_the_bottleneck_is_the_role_that_never_waits(times: StageTimes, max_lag: int, bottleneck: str) -> None:
    (size,) = compare([cluster(max_lag=max_lag)], times, num_steps=12, seed=0)
    assert size.bottleneck == bottleneck


RATES = {(1, 1, 0): 50, (1, 3, 0): 96, (2, 1, 2): 94, (2, 1, 3): 95, (2, 1, 4): 99, (4, 1, 0): 100}
"""(workers, scorers, max_lag) -> rate. Four have 95% of the best; two of them need three processes only."""


def test_the_smallest_setting_is_the_one_with_fewest_processes_then_least_lag() -> None:
    pipelines = {(n, m, lag): cluster(workers=n, scorers=m, max_lag=lag) for n, m, lag in RATES}
    (measured,) = compare([cluster()], constant(sample=1.0, score=1.0, train=1.0), num_steps=1, seed=0)
    sizes = [
        replace(measured, pipeline=pipelines[key], simulated=replace(measured.simulated, steps_per_s=rate))
        for key, rate in RATES.items()
    ]
    assert smallest_good(sizes).pipeline == pipelines[2, 1, 3]
    assert smallest_good(sizes[::-1]).pipeline == pipelines[2, 1, 3]


def test_more_workers_than_the_learner_can_use_are_not_recommended() -> None:
    times = constant(sample=1.0, score=0.125, train=2.0)
    pipelines = [cluster(workers=workers, max_lag=max_lag) for workers in (1, 2, 4) for max_lag in (0, 2, 4)]
    assert smallest_good(compare(pipelines, times, num_steps=12, seed=0)).pipeline == cluster(workers=2, max_lag=2)


def test_the_table_is_markdown_with_one_row_for_each_pipeline() -> None:
    pipelines = [cluster(workers=workers, max_lag=1) for workers in (1, 16)]
    lines = as_table(compare(pipelines, constant(sample=1.0, score=0.5, train=2.0), num_steps=12, seed=0)).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == len({line.count("|") for line in lines}) == 1
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(set(cell) == {"-", ":"} for cell in rule)
    first, second = (dict(zip(header, cells, strict=True)) for cells in rows)
    assert (first["workers"], first["max_lag"], second["workers"]) == ("1", "1", "16")
    assert (first["steps/s"], first["documents/s"], first["of ideal"]) == ("0.25", "1", "100%")
    assert (first["idle: admission"], first["batch"], first["bottleneck"]) == ("0%", "50%", "rollout workers")


# -- the command --------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that fails if it imports anything heavy."""
    code = f"""
import sys
sys.argv = ["simulate.py", *{list(arguments)}]
from orchestration import simulate
try:
    status = simulate.main()
finally:
    assert not {{"torch", "ray", "transformers", "vllm"}} & set(sys.modules)
sys.exit(status)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_answers_without_importing_torch_or_ray() -> None:
    result = command(*TIMES, "--rollout-workers", "2", "4", "--max-lag", "0", "1", "--learner.documents-per-step", "4")
    assert result.returncode == 0, result.stderr
    assert "sample 1 s" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.startswith("| ")]) == 2 + 4
    assert "Smallest within 5% of it: rollout_workers 2, scorers 1, max_lag 1" in result.stdout


def test_the_command_says_what_faults_cost() -> None:
    sizes = ["--rollout-workers", "2", "--max-lag", "1", "--learner.documents-per-step", "4"]
    result = command(*TIMES, *sizes, "--faults.per-minute", "0.1", "--faults.learner-per-minute", "0.2")
    assert result.returncode == 0, result.stderr
    assert "Faults: 0.1 per minute of each worker and server (9.5% fail within one)" in result.stdout
    assert "useful time" not in command(*TIMES, *sizes).stdout
    *_, header, _, row = [line.strip("| ").split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    shares = [cell.strip() for title, cell in zip(header, row, strict=True) if "only" in title or "useful" in title]
    assert len(shares) == 4 and all(0 < float(share.removesuffix("%")) <= 105 for share in shares)


def test_the_command_refuses_with_status_2() -> None:
    result = command("--times.sample-s", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("configuration refused: no time is given for stage score")


def test_the_check_against_finished_runs_simulates_the_workers_of_each(
    write_metrics: WriteMetrics, tmp_path: Path
) -> None:
    write_metrics([row(step, **{"lag/mean": 1.0, "rollout/sample_s": 200.0}) for step in range(1, 20)])
    steps: dict[int, float] = {}
    for count in (1, 8):
        run = RunConfig(placement=PlacementConfig(rollout=RoleConfig(count=count)))
        (tmp_path / "config.toml").write_text(dump_config(run))
        check = [sys.executable, str(ROOT / "benchmarks/simulator_check.py"), str(tmp_path), "--num-steps", "20"]
        result = subprocess.run(check, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"| {tmp_path.name} |"))
        steps[count] = float(line.split("|")[3])
    assert steps[8] < steps[1] / 2
