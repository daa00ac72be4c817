"""Validation before, during and after: cross-entropy and unbiased CFM on held-out documents, with paired errors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

import numpy as np

from actors.rollout import Document, Rollout, Ticket
from feature_server.scored_rollout import ScoredRollout
from learner.objective.reward import cfm_unbiased
from orchestration.cluster.remote import ProcessFailure, Reference, failing
from orchestration.evaluation.intervals import clustered_mean, mean_interval
from orchestration.roles.roles import FeatureRole, LearnerRole, RolloutRole
from orchestration.tasks import first_error

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


_Request = tuple[int, list[Ticket]]
"""Its place, and what is sampled together."""
_Requests = asyncio.Queue[_Request]

POLL_S = 0.1


class Evaluator:
    """Evaluates whatever weights are newest, with the run's own workers and servers.

    They may leave or fail meanwhile: one that is no longer in its list gets no request, `released` waits for those that
    a leaving one has, and what a failed one had is done by others.
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
        on_failure: Callable[[RolloutRole | FeatureRole, ProcessFailure], Awaitable[None]],
    ) -> None:
        """`on_failure`: awaited when a worker or server has failed and others do what it had."""
        self._documents = documents
        self._completions_per_context = completions_per_context
        self._documents_per_request = documents_per_request
        self._workers, self._servers, self._learner = workers, servers, learner
        self._prepare, self._fetch, self._clock, self._on_failure = prepare, fetch, clock, on_failure
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
        queue: _Requests = asyncio.Queue()
        for index, request in enumerate(requests):
            queue.put_nowait((index, request))
        scored: dict[int, list[ScoredRollout]] = {}
        with first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(self._score_all(queue, scored))
                cross_entropy = await self._learner.cross_entropy(self._documents)
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

    async def _score_all(self, queue: _Requests, scored: dict[int, list[ScoredRollout]]) -> None:
        while not queue.empty():  # again if some that there were at first have left or failed
            with first_error():
                async with asyncio.TaskGroup() as group:
                    for place, worker in enumerate(self._workers):
                        group.create_task(self._score_requests(worker, place, queue, scored))
            if not self._workers:  # others are starting in their place
                await asyncio.sleep(POLL_S)

    async def _server(self, place: int) -> FeatureRole:
        """The one whose turn it is; waits if others are starting in the place of all of them."""
        while not self._servers:
            await asyncio.sleep(POLL_S)
        return self._servers[place % len(self._servers)]

    async def _score_requests(
        self, worker: RolloutRole, place: int, queue: _Requests, scored: dict[int, list[ScoredRollout]]
    ) -> None:
        """Sample requests until none is left or the worker leaves; each is scored, by the server whose turn it is at
        the worker's `place`, while the next is sampled."""

        async def score(request: _Request, rollouts: list[Reference[Rollout]], server: FeatureRole) -> None:
            async with self._done_by(server, request, queue):
                with failing(server.name):  # a reference that is lost too
                    results = await server.score(rollouts)
                    scored[request[0]] = [await self._fetch(reference) for _, reference in results]

        with first_error():
            async with asyncio.TaskGroup() as scoring:
                while worker in self._workers and not queue.empty():
                    request = queue.get_nowait()
                    async with self._done_by(worker, request, queue):
                        async with self._prepare(worker, request[1]):
                            rollouts = [reference for _, reference in await worker.sample(request[1])]
                        scoring.create_task(score(request, rollouts, await self._server(place)))

    @asynccontextmanager
    async def _done_by(
        self, role: RolloutRole | FeatureRole, request: _Request, queue: _Requests
    ) -> AsyncIterator[None]:
        """Inside, the role is at work on a request, which is for others to do if its process fails."""
        try:
            with self._holding(role):
                yield
        except ProcessFailure as failure:
            if failure.process != role.name:
                raise
            queue.put_nowait(request)
            await self._on_failure(role, failure)
