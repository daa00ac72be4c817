"""Validation before, during and after: cross-entropy and unbiased CFM on held-out documents, with paired errors."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from actors.rollout import Document, Rollout, Ticket
from feature_server.scored_rollout import ScoredRollout
from learner.objective.reward import cfm_unbiased
from orchestration.cluster.remote import Reference
from orchestration.evaluation.intervals import clustered_mean, mean_interval
from orchestration.roles.roles import FeatureRole, LearnerRole, RolloutRole

SEED_OFFSET = 2**62  # beyond the seed of any ticket of RolloutBuffer
"""Keeps evaluation's completions apart from those of training, and equal before and after: common random numbers."""

COMPLETIONS_PER_CONTEXT = 4
"""Of each held-out context: the unbiased CFM needs two or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation of the held-out documents; values by document, in a fixed order."""

    policy_version: int
    cross_entropy: np.ndarray
    """[documents] nats per token."""
    cfm_loss: np.ndarray
    """[documents] unbiased CFM of raw features, mean over the document's groups."""
    rollouts: list[Rollout]
    """What was sampled."""
    seconds: float

    @property
    def clusters(self) -> list[str]:
        """[documents] `Document.cluster` of each."""
        return [rollout.document.cluster for rollout in self.rollouts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """After minus before, paired over documents."""

    before: float
    after: float
    delta: float
    standard_error: float
    """Of `delta`, over texts; NaN with one text."""
    low: float
    high: float
    """Bounds of the 95% interval of `delta`."""
    num_documents: int
    num_texts: int


def paired_change(before: np.ndarray, after: np.ndarray, clusters: Sequence[str]) -> Change:
    """Mean change over documents with its error, which takes documents of one cluster as dependent: `intervals`."""
    differences = after - before
    estimate, interval = clustered_mean(differences, clusters), mean_interval(differences, clusters)
    return Change(
        before=float(before.mean()),
        after=float(after.mean()),
        delta=estimate.mean,
        standard_error=estimate.standard_error,
        low=interval.low,
        high=interval.high,
        num_documents=len(differences),
        num_texts=estimate.num_clusters,
    )


Prepare = Callable[[RolloutRole, Sequence[Ticket]], AbstractAsyncContextManager[None]]
"""A context in which a worker has the weights that its tickets require: `WeightSync.prepare`."""


class Evaluator:
    """Evaluates whatever weights are newest, with the run's own workers and servers.

    They may leave meanwhile: one that is no longer in its list gets no request; `released` waits for those it has.
    """

    def __init__(
        self,
        *,
        documents: Sequence[Document],
        completions_per_context: int,
        documents_per_request: int,
        workers: Sequence[RolloutRole],
        servers: Sequence[FeatureRole],
        learner: LearnerRole,
        prepare: Prepare,
        fetch: Callable[[Reference[ScoredRollout]], Awaitable[ScoredRollout]],
        clock: Callable[[], float],
    ) -> None:
        self._documents = documents
        self._completions_per_context = completions_per_context
        self._documents_per_request = documents_per_request
        self._workers, self._servers, self._learner = workers, servers, learner
        self._prepare, self._fetch, self._clock = prepare, fetch, clock
        self._held: list[tuple[RolloutRole | FeatureRole, asyncio.Future[None]]] = []
        """Who is at work on a request of an evaluation, and what tells the end of that."""

    @property
    def num_documents(self) -> int:
        """Held-out documents it evaluates."""
        return len(self._documents)

    async def evaluate(self, policy_version: int) -> Evaluation:
        """Cross-entropy by the learner and CFM by workers and servers, concurrently; training waits."""
        start = self._clock()
        tickets = [
            Ticket(
                ticket_id=index,
                document=document,
                seed=SEED_OFFSET + index,
                completions_per_context=self._completions_per_context,
                min_policy_version=policy_version,
            )
            for index, document in enumerate(self._documents)
        ]
        size = self._documents_per_request
        requests = [tickets[i : i + size] for i in range(0, len(tickets), size)]
        queue: asyncio.Queue[tuple[int, list[Ticket]]] = asyncio.Queue()
        for index, request in enumerate(requests):
            queue.put_nowait((index, request))
        scored: dict[int, list[ScoredRollout]] = {}
        cross_entropy, _ = await asyncio.gather(
            self._learner.cross_entropy(self._documents), self._score_all(queue, scored)
        )
        in_order = [s for index in range(len(requests)) for s in scored[index]]
        return Evaluation(
            policy_version=policy_version,
            cross_entropy=np.array(cross_entropy),
            cfm_loss=np.array([float(cfm_unbiased(s.raw).mean()) for s in in_order]),
            rollouts=[s.rollout for s in in_order],
            seconds=self._clock() - start,
        )

    async def released(self, role: RolloutRole | FeatureRole) -> None:
        """Returns when a worker or server that is no longer to be used has done all that an evaluation asked of it."""
        if ends := [end for held, end in self._held if held is role]:
            await asyncio.wait(ends)

    @contextmanager
    def _holding(self, role: RolloutRole | FeatureRole) -> Iterator[None]:
        end = asyncio.get_running_loop().create_future()
        self._held.append((role, end))
        try:
            yield
        finally:
            self._held.remove((role, end))
            end.set_result(None)

    async def _score_all(
        self, queue: asyncio.Queue[tuple[int, list[Ticket]]], scored: dict[int, list[ScoredRollout]]
    ) -> None:
        while not queue.empty():  # again if all that there were at first have left
            workers = list(enumerate(self._workers))
            await asyncio.gather(*[self._score_requests(worker, index, queue, scored) for index, worker in workers])

    async def _score_requests(
        self,
        worker: RolloutRole,
        place: int,
        queue: asyncio.Queue[tuple[int, list[Ticket]]],
        scored: dict[int, list[ScoredRollout]],
    ) -> None:
        """Sample requests until none is left or the worker leaves; each is scored, by the server whose turn it is at
        the worker's `place`, while the next is sampled."""

        async def score(index: int, rollouts: list[Reference[Rollout]]) -> None:
            server = self._servers[place % len(self._servers)]
            with self._holding(server):
                scored[index] = [await self._fetch(reference) for _, reference in await server.score(rollouts)]

        scoring = []
        while worker in self._workers and not queue.empty():
            index, tickets = queue.get_nowait()
            with self._holding(worker):
                async with self._prepare(worker, tickets):
                    rollouts = [reference for _, reference in await worker.sample(tickets)]
            scoring.append(asyncio.create_task(score(index, rollouts)))
        await asyncio.gather(*scoring)
