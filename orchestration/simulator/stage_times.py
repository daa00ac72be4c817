"""How long each stage of the pipeline takes, and what follows from that alone: the longest stage, the ideal gain."""

import math
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist

_NORMAL = NormalDist()


def uniform(*key: object) -> float:
    """A number between 0 and 1, neither of them. Equal keys give equal numbers."""
    # A hash is as good as a generator of one number, and several times as fast as seeding one.
    return (int.from_bytes(blake2b(repr(key).encode(), digest_size=6).digest()) + 0.5) / 2**48


@dataclass(frozen=True, slots=True)
class StageTime:
    """A log-normal distribution of seconds, by its mean and its coefficient of variation."""

    mean_s: float
    cv: float = 0.0
    """Standard deviation over mean; 0: always the mean."""

    def __post_init__(self) -> None:
        for name, value in (("mean_s", self.mean_s), ("cv", self.cv)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} of a stage must be a finite number >= 0; measure it again")

    def draw(self, *key: object) -> float:
        """Seconds of one occurrence. Equal keys give equal seconds, whatever was drawn before."""
        if self.cv == 0:
            return self.mean_s
        variance = math.log1p(self.cv**2)  # of the logarithm
        return self.mean_s * math.exp(math.sqrt(variance) * _NORMAL.inv_cdf(uniform(*key)) - variance / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """All stages, each without any waiting."""

    sample: StageTime
    """Sampling one document on one rollout worker."""
    request: StageTime = StageTime(0.0)
    """Fixed time of a request, in addition to its documents."""
    score: StageTime
    """Scoring one document on one feature or verifier server."""
    train: StageTime
    """One learner step."""
    publish: StageTime = StageTime(0.0)
    """Copying the weights out of the learner, which does nothing else meanwhile."""
    fetch: StageTime = StageTime(0.0)
    """From a publication to weights that one worker has received and checked, concurrently with sampling."""
    pause: StageTime = StageTime(0.0)
    """Time in which a worker loads and probes them and cannot sample."""


def longest_stage_s(
    times: StageTimes, *, rollout_workers: int, scorers: int, fresh_documents: int, documents_per_request: int
) -> float:
    """Mean seconds per step that the busiest role is at work: no schedule makes steps shorter on average.

    With F fresh documents per step in requests of R, N rollout workers and M scorers:

        max( F * (sample + request / R) / N,   F * score / M,   train + publish )

    Left out: uneven shares (three documents on two workers count as one and a half), updates of the workers, dropped
    documents. All of them can only make steps longer.
    """
    sample_s = fresh_documents * (times.sample.mean_s + times.request.mean_s / documents_per_request)
    score_s = fresh_documents * times.score.mean_s
    return max(sample_s / rollout_workers, score_s / scorers, times.train.mean_s + times.publish.mean_s)


def step_in_sequence_s(
    times: StageTimes, *, rollout_workers: int, scorers: int, fresh_documents: int, documents_per_request: int
) -> float:
    """Mean seconds of a step in which no stage begins before the one before it has ended.

        fetch + pause  +  d_N * sample + q_N * request  +  d_M * score  +  train + publish

    with d_N and q_N the documents and requests of the busiest of N workers, d_M those of the busiest of M scorers:
    the F fresh documents are cut into requests of R, and those are dealt out in turn.
    """
    whole, rest = divmod(fresh_documents, documents_per_request)
    requests = [documents_per_request] * whole + [rest] * (rest > 0)
    sampled, scored = requests[::rollout_workers], requests[::scorers]  # of the first in turn, which has most
    rollout_s = sum(sampled) * times.sample.mean_s + len(sampled) * times.request.mean_s
    learner_s = times.train.mean_s + times.publish.mean_s
    return times.fetch.mean_s + times.pause.mean_s + rollout_s + sum(scored) * times.score.mean_s + learner_s


def ideal_speedup(
    times: StageTimes, *, rollout_workers: int, scorers: int, fresh_documents: int, documents_per_request: int
) -> float:
    """Most that asynchrony can gain over the synchronous algorithm on the same processes, if stage times do not vary.

        step_in_sequence_s / longest_stage_s

    The numerator waits for every stage; the synchronous algorithm, which may score one request while it samples the
    next, takes no longer. The denominator hides everything, the workers' updates too, behind the busiest role. 1:
    there is nothing to gain.
    """
    cluster = {
        "rollout_workers": rollout_workers,
        "scorers": scorers,
        "fresh_documents": fresh_documents,
        "documents_per_request": documents_per_request,
    }
    return step_in_sequence_s(times, **cluster) / longest_stage_s(times, **cluster)
