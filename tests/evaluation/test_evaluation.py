"""Evaluation: paired errors against the formula, and one result whatever the timing of workers and servers."""

import asyncio
import copy
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from actors.rollout import Document, Rollout, Ticket
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.evaluation.evaluation import Evaluation, Evaluator, paired_change
from orchestration.simulator.virtual_time import run_in_virtual_time

MakeDocument = Callable[[int], Document]
NUM_DOCUMENTS = 11
OnFailure = Callable[[object, ProcessFailure], Awaitable[None]]
COMPLETIONS = 3
T_QUANTILES = {2: 12.706, 3: 4.303, 40: 2.023}
"""97.5% quantiles of Student's t as printed tables give them, by the number of values."""


def slow_paired_change(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean of the differences, and the square root of their unbiased variance over their number."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_paired_change_is_the_formula(count: int) -> None:
    draw = random.Random(count)
    before = [draw.gauss(5, 3) for _ in range(count)]
    after = [value + draw.gauss(-1, 0.1) for value in before]
    change = paired_change(np.array(before), np.array(after), [str(index) for index in range(count)])
    assert (change.delta, change.standard_error) == pytest.approx(slow_paired_change(before, after))
    assert (change.num_documents, change.num_texts) == (count, count)
    assert (change.low + change.high) / 2 == pytest.approx(change.delta)
    assert (change.high - change.delta) / change.standard_error == pytest.approx(T_QUANTILES[count], abs=1e-3)
    assert change.before == pytest.approx(sum(before) / count)
    assert change.after == pytest.approx(sum(after) / count)


def test_documents_of_one_text_count_as_one() -> None:
    """Four copies of three documents: without their texts the error would be half as large."""
    before, after = np.array([1.0, 5.0, -3.0]), np.array([2.0, 5.5, -2.0])
    once = paired_change(before, after, ["a", "b", "c"])
    found = paired_change(np.repeat(before, 4), np.repeat(after, 4), [text for text in "abc" for _ in range(4)])
    assert (found.delta, found.standard_error) == pytest.approx((once.delta, once.standard_error))
    assert (found.low, found.high) == pytest.approx((once.low, once.high))
    assert (found.num_documents, found.num_texts) == (12, 3)


def test_a_shift_common_to_all_documents_has_no_error() -> None:
    before = np.array([1.0, 5.0, -3.0])
    change = paired_change(before, before - 0.5, ["a", "b", "b"])
    assert (change.standard_error, change.delta) == (0, -0.5)


def test_one_text_tells_nothing_about_the_error() -> None:
    change = paired_change(np.array([1.0, 3.0]), np.array([2.0, 3.0]), ["a", "a"])
    assert math.isnan(change.standard_error) and math.isnan(change.low) and math.isnan(change.high)


@dataclass
class Worker:
    """Takes `delay` turns for a request and records the requests."""

    name: str
    delay: int = 1

    def __post_init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.killed = False

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[None, Rollout]]:
        self.tickets += tickets
        for _ in range(self.delay):
            await turns(1)
            assert not self.killed, f"{self.name} was killed during a request"
        return [(None, sampled(ticket)) for ticket in tickets]


class Server:
    """Scores by features that depend on the completions alone; notes whose rollouts it saw."""

    def __init__(self, delay: int = 1, name: str = "server") -> None:
        self.ticket_ids: list[int] = []
        self.name, self.delay, self.killed = name, delay, False

    async def score(self, rollouts: Sequence[Rollout]) -> list[tuple[None, ScoredRollout]]:
        self.ticket_ids += [rollout.ticket_id for rollout in rollouts]
        for _ in range(self.delay):
            await turns(1)
            assert not self.killed, "a server was killed during a request"
        return [(None, scored(rollout)) for rollout in rollouts]


class Learner:
    async def cross_entropy(self, documents: Sequence[Document]) -> list[float]:
        await turns(3)
        return [float(document.token_ids.sum()) for document in documents]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def fetched(value: ScoredRollout) -> ScoredRollout:
    return value


def sampled(ticket: Ticket) -> Rollout:
    """Completions that depend on the ticket's seed, its document and nothing else."""
    shape = (len(ticket.document.anchors), ticket.completions_per_context, ticket.document.horizon)
    draw = np.random.default_rng([ticket.seed, int(ticket.document.token_ids[0])])
    return Rollout(
        ticket_id=ticket.ticket_id,
        document=ticket.document,
        completion_ids=draw.integers(0, 9, shape),
        completion_lengths=np.full(shape[:2], shape[2]),
        behavior_logprobs=np.zeros(shape, dtype=np.float32),
        token_versions=np.full(shape, ticket.min_policy_version),
    )


def features(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, n, G] of the completions and [B, G] of the ground truth: their token ids."""
    document = rollout.document
    truth = np.stack([document.token_ids[a : a + document.horizon] for a in document.anchors])
    return torch.tensor(rollout.completion_ids, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64)


def scored(rollout: Rollout) -> ScoredRollout:
    return ScoredRollout(rollout=rollout, raw=gram_statistics(*features(rollout)), whitened=None, score_s=0.0)


def slow_cfm(rollout: Rollout) -> float:
    """Mean over groups and over pairs of distinct completions of <phi_j - phi_y, phi_k - phi_y>."""
    completions, truth = features(rollout)
    products = [
        float((group[j] - target) @ (group[k] - target))
        for group, target in zip(completions, truth, strict=True)
        for j in range(len(group))
        for k in range(len(group))
        if j != k
    ]
    return sum(products) / len(products)


async def end_evaluation(role: Worker | Server, failure: ProcessFailure) -> None:
    raise failure


def make_evaluator(
    make_document: MakeDocument,
    workers: Sequence[Worker],
    servers: Sequence[Server],
    *,
    documents_per_request: int = 2,
    on_failure: OnFailure = end_evaluation,
) -> Evaluator:
    return Evaluator(
        documents=[make_document(index) for index in range(NUM_DOCUMENTS)],
        completions_per_context=COMPLETIONS,
        documents_per_request=documents_per_request,
        workers=workers,
        servers=servers,
        learner=Learner(),
        prepare=lambda worker, tickets: nullcontext(),
        fetch=fetched,
        clock=iter(range(100)).__next__,
        on_failure=on_failure,
    )


def evaluate(
    make_document: MakeDocument,
    workers: Sequence[Worker],
    servers: Sequence[Server],
    *,
    versions: Sequence[int] = (0,),
    documents_per_request: int = 2,
) -> list[Evaluation]:
    async def scenario() -> list[Evaluation]:
        evaluator = make_evaluator(make_document, workers, servers, documents_per_request=documents_per_request)
        return [await evaluator.evaluate(version) for version in versions]

    return asyncio.run(scenario())


@pytest.mark.parametrize("delays", [[1], [1, 9], [9, 1], [5, 1, 2]])
@pytest.mark.parametrize("documents_per_request", [1, 2, 20])
def test_results_keep_the_order_of_the_documents_whatever_is_slow(
    delays: list[int], documents_per_request: int, make_document: MakeDocument
) -> None:
    workers = [Worker(f"worker {index}", delay) for index, delay in enumerate(delays)]
    (evaluation,) = evaluate(
        make_document, workers, [Server()], versions=[4], documents_per_request=documents_per_request
    )
    documents = [make_document(index) for index in range(NUM_DOCUMENTS)]
    assert [r.document.document_id for r in evaluation.rollouts] == [d.document_id for d in documents]
    assert evaluation.cross_entropy.tolist() == [float(d.token_ids.sum()) for d in documents]
    assert evaluation.cfm_loss.tolist() == pytest.approx([slow_cfm(r) for r in evaluation.rollouts])
    assert len(set(evaluation.cfm_loss.tolist())) > NUM_DOCUMENTS / 2, "the oracle tells documents apart"
    assert evaluation.policy_version == 4
    assert evaluation.seconds == 1
    assert all(rollout.min_policy_version == 4 for rollout in evaluation.rollouts)


def test_requests_are_shared_among_the_workers(make_document: MakeDocument) -> None:
    workers = [Worker("slow", 30), Worker("fast", 1), Worker("fast too", 1)]
    evaluate(make_document, workers, [Server()], documents_per_request=1)
    asked = [len(worker.tickets) for worker in workers]
    assert sum(asked) == NUM_DOCUMENTS
    assert min(asked) >= 1
    assert asked[0] < min(asked[1:])


def test_before_and_after_use_the_same_random_numbers(make_document: MakeDocument) -> None:
    """Also when other workers answer: what is compared are the weights."""
    one, several = [Worker("alone")], [Worker("slow", 7), Worker("fast")]
    before = evaluate(make_document, one, [Server()], versions=[0, 3])
    (after,) = evaluate(make_document, several, [Server(), Server()], versions=[9], documents_per_request=3)
    for evaluation in (*before, after):
        assert evaluation.cfm_loss.tolist() == before[0].cfm_loss.tolist()
        for found, expected in zip(evaluation.rollouts, before[0].rollouts, strict=True):
            assert np.array_equal(found.completion_ids, expected.completion_ids)
    first, second = one[0].tickets[:NUM_DOCUMENTS], one[0].tickets[NUM_DOCUMENTS:]
    assert [ticket.seed for ticket in first] == [ticket.seed for ticket in second]
    assert len({ticket.seed for ticket in first}) == NUM_DOCUMENTS
    assert {ticket.completions_per_context for ticket in first + second} == {COMPLETIONS}


@pytest.mark.parametrize(("num_workers", "num_servers"), [(1, 1), (3, 2), (2, 3), (4, 1)])
def test_workers_take_turns_with_the_servers(num_workers: int, num_servers: int, make_document: MakeDocument) -> None:
    workers = [Worker(f"worker {index}") for index in range(num_workers)]
    servers = [Server() for _ in range(num_servers)]
    evaluate(make_document, workers, servers, documents_per_request=1)
    for index, server in enumerate(servers):
        of_its_workers = [ticket.ticket_id for worker in workers[index::num_servers] for ticket in worker.tickets]
        assert sorted(server.ticket_ids) == sorted(of_its_workers)


@dataclass
class Leaving:
    """An evaluation from which one role is taken while it works, and killed as soon as it is released."""

    make_document: MakeDocument
    workers: list[Worker]
    servers: list[Server]

    def __post_init__(self) -> None:
        self.killed: list[Worker | Server] = []

    async def play(self, roles: list[Worker] | list[Server], *, after: int) -> Evaluation:
        """The newest of `roles` leaves after some turns."""
        evaluator = make_evaluator(self.make_document, self.workers, self.servers)
        evaluation = asyncio.create_task(evaluator.evaluate(0))
        await turns(after)
        leaving = roles.pop()
        await evaluator.released(leaving)
        leaving.killed = True
        self.killed.append(leaving)
        return await evaluation


@pytest.mark.parametrize("after", range(0, 60, 3))
@pytest.mark.parametrize("leaves", ["worker", "server"])
def test_who_leaves_during_an_evaluation_ends_when_its_requests_are_done(
    leaves: str, after: int, make_document: MakeDocument
) -> None:
    """A request on a killed one raises."""
    workers = [Worker(f"worker {index}", delay=7) for index in range(3)]
    servers = [Server(delay=9) for _ in range(2)]
    leaving = Leaving(make_document, workers, servers)
    found = asyncio.run(leaving.play(workers if leaves == "worker" else servers, after=after))
    (expected,) = evaluate(make_document, [Worker("alone")], [Server()])
    assert found.cfm_loss.tolist() == expected.cfm_loss.tolist()
    assert found.cross_entropy.tolist() == expected.cross_entropy.tolist()
    assert len(leaving.killed) == 1


def test_an_evaluation_ends_with_workers_that_came_when_all_others_left(make_document: MakeDocument) -> None:
    workers = [Worker("first", delay=7)]

    async def replaced() -> Evaluation:
        playing = asyncio.create_task(Leaving(make_document, workers, [Server()]).play(workers, after=3))
        await turns(4)
        workers.append(Worker("second"))
        return await playing

    (expected,) = evaluate(make_document, [Worker("alone")], [Server()])
    assert asyncio.run(replaced()).cfm_loss.tolist() == expected.cfm_loss.tolist()


class LostWorker(Worker):
    """Dies in the middle of one of its requests."""

    def __init__(self, name: str, dies_at: int, *, lost: bool = True) -> None:
        super().__init__(name, delay=3)
        self.dies_at, self.kind = dies_at, ProcessLost if lost else ProcessFailure

    async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[None, Rollout]]:
        self.dies_at -= 1
        await turns(2)
        if self.dies_at <= 0:
            raise self.kind(self.name, f"{self.name} died")
        return await super().sample(tickets)


class LostServer(Server):
    """Likewise, of one that scores."""

    def __init__(self, name: str, dies_at: int) -> None:
        super().__init__(3, name)
        self.dies_at = dies_at

    async def score(self, rollouts: Sequence[Rollout]) -> list[tuple[None, ScoredRollout]]:
        self.dies_at -= 1
        await turns(2)
        if self.dies_at <= 0:
            raise ProcessLost(self.name, f"{self.name} died")
        return await super().score(rollouts)


@dataclass
class Replacing:
    """What the loops do about a failure: it is dropped at once, and another comes a while later."""

    workers: list[Worker]
    servers: list[Server]
    after: int

    def __post_init__(self) -> None:
        self.failed: list[str] = []
        self.coming: list[asyncio.Task[None]] = []

    async def on_failure(self, role: Worker | Server, failure: ProcessFailure) -> None:
        self.failed.append(failure.process)
        roles = self.workers if isinstance(role, Worker) else self.servers
        if role in roles:
            roles.remove(role)
            self.coming.append(asyncio.create_task(self._come(roles, type(role).__mro__[1])))

    async def _come(self, roles: list[Worker] | list[Server], kind: type[Worker] | type[Server]) -> None:
        await asyncio.sleep(self.after)
        roles.append(kind(name="the next"))


FAILING = [
    pytest.param([LostWorker("worker 0", 1)], [], id="the only worker"),
    pytest.param([LostWorker("worker 0", 2), Worker("worker 1", 5)], [], id="one of two workers"),
    pytest.param([LostWorker("worker 0", 2, lost=False), Worker("worker 1", 5)], [], id="one raises"),
    pytest.param([LostWorker("worker 0", 2), LostWorker("worker 1", 2)], [], id="both workers"),
    pytest.param([], [LostServer("server 0", 1)], id="the only server"),
    pytest.param([], [LostServer("server 0", 3), Server()], id="one of two servers"),
    pytest.param([], [LostServer("server 0", 1), LostServer("server 1", 1)], id="both servers"),
    pytest.param([LostWorker("worker 0", 3)], [LostServer("server 0", 2)], id="a worker and a server"),
]


@pytest.mark.parametrize("after", [0, 50])
@pytest.mark.parametrize(("workers", "servers"), FAILING)
def test_what_one_had_that_failed_is_evaluated_by_others(
    workers: list[Worker], servers: list[Server], after: int, make_document: MakeDocument
) -> None:
    """In virtual time, in which waiting for others costs nothing."""
    workers, servers = (copy.deepcopy(workers) or [Worker("worker 0")]), (copy.deepcopy(servers) or [Server()])
    doomed = [role.name for role in (*workers, *servers) if isinstance(role, LostWorker | LostServer)]
    replacing = Replacing(workers, servers, after)
    evaluator = make_evaluator(make_document, workers, servers, on_failure=replacing.on_failure)
    found = run_in_virtual_time(evaluator.evaluate(0))
    assert set(replacing.failed) == set(doomed)
    (expected,) = evaluate(make_document, [Worker("alone")], [Server()])
    assert found.cfm_loss.tolist() == expected.cfm_loss.tolist()
    assert [r.ticket_id for r in found.rollouts] == list(range(NUM_DOCUMENTS))


def test_rollouts_wait_for_a_server_when_all_are_gone(make_document: MakeDocument) -> None:
    """The last one is lost by the run while workers sample for the evaluation: they need not sample again."""
    workers, servers = [Worker("worker 0", 20)], [Server()]

    async def scenario() -> Evaluation:
        evaluating = asyncio.create_task(make_evaluator(make_document, workers, servers).evaluate(0))
        await turns(10)
        servers.clear()
        await asyncio.sleep(60.0)
        assert not evaluating.done()
        servers.append(Server(name="the next"))
        return await evaluating

    found = run_in_virtual_time(scenario())
    assert [r.ticket_id for r in found.rollouts] == list(range(NUM_DOCUMENTS))
    assert len(workers[0].tickets) == NUM_DOCUMENTS


def test_a_failure_of_the_learner_is_not_the_workers(make_document: MakeDocument) -> None:
    """As when it is lost while it sends the weights that are to be evaluated."""
    failure = ProcessLost("learner 0", "learner 0 died")

    class Unprepared(Worker):
        async def sample(self, tickets: Sequence[Ticket]) -> list[tuple[None, Rollout]]:
            raise failure

    replacing = Replacing([Unprepared("worker 0")], [Server()], 1)
    evaluator = make_evaluator(make_document, replacing.workers, replacing.servers, on_failure=replacing.on_failure)
    with pytest.raises(ProcessLost) as caught:
        run_in_virtual_time(evaluator.evaluate(0))
    assert caught.value is failure and replacing.failed == []


@pytest.mark.parametrize("run_seed", [0, 1, 2**32 - 1])
def test_training_and_evaluation_never_share_a_seed(run_seed: int, make_document: MakeDocument) -> None:
    worker, document = Worker("worker 0"), make_document(0)
    evaluate(make_document, [worker], [Server()])
    buffer: RolloutBuffer[None] = RolloutBuffer(
        lambda count: [document] * count,
        pool=ReusePool(documents_per_step=20_000, max_uses=1, max_reuse_lag=None, order="fifo", seed=0),
        num_steps=1,
        lag_rule="in_order",
        max_lag=0,
        prefetch_steps=0,
        completions_per_context=COMPLETIONS,
        seed=run_seed,
    )
    training = {ticket.seed for ticket in asyncio.run(buffer.claim(20_000))}
    assert len(training) == 20_000
    assert training.isdisjoint(ticket.seed for ticket in worker.tickets)
