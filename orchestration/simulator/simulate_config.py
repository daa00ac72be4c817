"""Settings of `orchestration/simulate.py`: what to compare, how long stages take, and keys of a run that it reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from actors.config import RequestConfig, Settings
from learner.config import StepConfig
from orchestration.asynchrony_config import LagConfig
from orchestration.command_line import parse, readable
from orchestration.config import RoleSize
from orchestration.simulator.faults import Faults
from orchestration.simulator.measured_times import METRICS_OF, measured_times
from orchestration.simulator.pipeline import Pipeline
from orchestration.simulator.stage_times import StageTime, StageTimes


class TimesConfig(Settings):
    """How long each stage takes; these override `times_from`."""

    sample_s: float | None = Field(None, ge=0)
    """Sampling one document on one rollout worker [s]."""
    sample_cv: float | None = Field(None, ge=0)
    """Its standard deviation over its mean, here and below; None: as measured, or 0."""
    request_s: float = Field(0.0, ge=0)
    """Fixed time of a request, in addition to its documents [s]; no metric measures it."""
    score_s: float | None = Field(None, ge=0)
    """Scoring one document on one feature or verifier server [s]."""
    score_cv: float | None = Field(None, ge=0)
    """Its standard deviation over its mean."""
    train_s: float | None = Field(None, ge=0)
    """One learner step [s]."""
    train_cv: float | None = Field(None, ge=0)
    """Its standard deviation over its mean."""
    publish_s: float | None = Field(None, ge=0)
    """Copying the weights out of the learner [s]."""
    fetch_s: float | None = Field(None, ge=0)
    """From a publication to weights that a worker has received and checked, concurrently with sampling [s]."""
    pause_s: float | None = Field(None, ge=0)
    """Time in which a worker loads and probes them and cannot sample [s]."""


class FaultsConfig(Settings):
    """How often processes fail, at random moments, and how long it takes until others have taken their place."""

    per_minute: float = Field(0.0, ge=0)
    """Faults of each rollout worker and each server per minute that it is up; 0.1: one in ten minutes."""
    restart_s: float = Field(60.0, ge=0)
    """From such a fault until another process is up in its place [s]; a worker then fetches weights."""
    learner_per_minute: float = Field(0.0, ge=0)
    """Faults of the learner per minute, all ranks together."""
    learner_restart_s: float = Field(120.0, ge=0)
    """From such a fault until the run goes on from its last checkpoint [s]."""
    checkpoint_steps: int = Field(50, gt=0)
    """Learner steps between two checkpoints; those since the last one are done again."""

    @property
    def faults(self) -> Faults:
        """What the simulator takes."""
        return Faults(
            workers_per_minute=self.per_minute,
            scorers_per_minute=self.per_minute,
            learner_per_minute=self.learner_per_minute,
            restart_s=self.restart_s,
            learner_restart_s=self.learner_restart_s,
            checkpoint_steps=self.checkpoint_steps,
        )


class ScorersConfig(Settings):
    """How many processes score; only those of the objective count."""

    feature: RoleSize = RoleSize()
    """Feature servers."""
    verifier: RoleSize = RoleSize()
    """Verifier servers, of the objective `rlvr`."""


class SimulateConfig(Settings):
    """Predict steps per second and lag for so many processes and such a bound, from the times of one run's stages."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds every duration that is drawn."""
    times_from: str | None = None
    """metrics.jsonl of a run, whose medians give the time of each stage."""
    times: TimesConfig = TimesConfig()
    faults: FaultsConfig = FaultsConfig()
    rollout_workers: tuple[PositiveInt, ...] = Field((1, 2, 4, 8), min_length=1)
    """Numbers of rollout workers to compare."""
    scorers: tuple[PositiveInt, ...] = ()
    """Numbers of feature or verifier servers to compare; none: the one of section placement."""
    max_lag: tuple[NonNegativeInt, ...] = Field((0, 1, 2, 4), min_length=1)
    """Bounds to compare; asynchrony.max_lag is not used."""
    num_steps: int = Field(60, gt=0)
    """Learner steps that are measured, after a warm-up; more: less noise in the result, if stage times vary."""
    rollout: RequestConfig = RequestConfig()
    learner: StepConfig = StepConfig()
    asynchrony: LagConfig = LagConfig()
    placement: ScorersConfig = ScorersConfig()

    @field_validator("rollout_workers", "scorers", "max_lag")
    @classmethod
    def _ascending(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if list(counts) != sorted(set(counts)):
            raise ValueError(f"must be ascending whole numbers, such as 1 2 4, got {counts}")
        return counts

    @property
    def numbers_of_scorers(self) -> tuple[int, ...]:
        """Numbers of scorers to compare."""
        role = self.placement.verifier if self.learner.objective == "rlvr" else self.placement.feature
        return self.scorers or (role.count,)

    @property
    def pipelines(self) -> list[Pipeline]:
        """Every combination, in the order of the table."""
        return [
            self.pipeline(rollout_workers=workers, scorers=scorers, max_lag=max_lag)
            for workers in self.rollout_workers
            for scorers in self.numbers_of_scorers
            for max_lag in self.max_lag
        ]

    def pipeline(self, *, rollout_workers: int, scorers: int, max_lag: int) -> Pipeline:
        """One combination.

        Raises: ValueError if the other settings of lag and reuse do not fit this max_lag.
        """
        try:
            asynchrony = LagConfig.model_validate(self.asynchrony.model_dump() | {"max_lag": max_lag})
        except ValidationError as error:
            raise ValueError(f"max_lag={max_lag} of {self.max_lag}: {readable(error, LagConfig)}") from error
        return Pipeline(
            rollout_workers=rollout_workers,
            scorers=scorers,
            documents_per_step=self.learner.documents_per_step,
            documents_per_request=self.rollout.documents_per_request,
            asynchrony=asynchrony,
            in_flight_updates=self.rollout.in_flight_updates,
        )

    def stage_times(self) -> StageTimes:
        """From the flags, or else from the run's metrics.

        Raises: ValueError naming a stage for which neither has a time; FileNotFoundError without the metrics.
        """
        fresh_documents = self.learner.documents_per_step // self.asynchrony.max_uses
        measured: dict[str, StageTime] = {}
        if self.times_from is not None:
            measured = measured_times(Path(self.times_from).expanduser(), fresh_documents=fresh_documents)
        given = self.times.model_dump()
        stages = {stage: _stage(stage, given, measured, self.times_from) for stage in METRICS_OF}
        return StageTimes(request=StageTime(self.times.request_s), **stages)


def parse_simulation(arguments: Sequence[str]) -> SimulateConfig:
    """`[config.toml] [--key value ...]`; the file may be that of a run.

    Raises: ValueError naming each refused key, its value and the rule; FileNotFoundError if a file is missing.
    """
    config = parse(SimulateConfig, arguments, prog="orchestration/simulate.py [config.toml]")
    uses, documents = config.asynchrony.max_uses, config.learner.documents_per_step
    if documents % uses:
        raise ValueError(
            f"learner.documents_per_step={documents} must be a multiple of asynchrony.max_uses={uses}: one in {uses} "
            "documents of a step is fresh; change one of the two"
        )
    if not config.learner.samples:
        raise ValueError(
            f"learner.objective={config.learner.objective!r} samples nothing, so no stages could overlap; "
            "choose another objective"
        )
    config.stage_times(), config.pipelines  # what they refuse is refused here, before anything is simulated
    return config


def _stage(
    stage: str, given: Mapping[str, float | None], measured: Mapping[str, StageTime], times_from: str | None
) -> StageTime:
    seconds, cv = given[f"{stage}_s"], given.get(f"{stage}_cv")
    flag = f"--times.{stage}-s"
    if seconds is None and stage not in measured:
        if times_from is not None:
            raise ValueError(
                f"{times_from} has no {' or no '.join(METRICS_OF[stage])} after its first steps; give {flag} SECONDS"
            )
        if stage in ("sample", "score", "train"):
            raise ValueError(f"no time is given for stage {stage}; give --times-from METRICS or {flag} SECONDS")
    found = measured.get(stage, StageTime(0.0))
    return StageTime(found.mean_s if seconds is None else seconds, found.cv if cv is None else cv)
