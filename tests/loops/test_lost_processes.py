"""Workers and servers that fail in the middle of a run: who does what they had, and that nothing is lost or done twice.

Every run here trains on the same tickets in the same order as one without a failure, and its account, by the buffer's
counters and by the event log, is balanced.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from fake_roles import (
    DOCUMENTS_PER_STEP,
    Event,
    FakeLearner,
    FakeMember,
    FakeServer,
    FakeWorker,
    Interrupt,
    MakeDocument,
    let_others_run,
    make_buffer,
    make_controller,
    run_alone,
)

from actors.rollout import Ticket
from orchestration.buffer.accounting import audit, require_balanced
from orchestration.buffer.claims import MAX_FAILURES
from orchestration.cluster.remote import ProcessFailure, ProcessLost
from orchestration.roles.protocols import Member
from orchestration.simulator.virtual_time import run_in_virtual_time

NUM_STEPS = 8
Act = Callable[[FakeMember], Awaitable[None]]


@dataclass
class Run:
    """Two workers and two servers; each that fails is replaced by another of its kind."""

    make_document: MakeDocument
    max_lag: int = 2
    per_request: int = 2
    replaces: bool = True
    events: list[Event] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    workers: list[FakeWorker] = field(default_factory=list)
    interrupts: dict[str, Interrupt] = field(default_factory=dict)
    """By name of the member."""

    def worker(self, name: str) -> FakeWorker:
        self.workers.append(FakeWorker(self.events, name, self._interrupt(name)))
        self.workers[-1].policy_version = None
        return self.workers[-1]

    def server(self, name: str) -> FakeServer:
        return FakeServer(self.events, name, self._interrupt(name))

    def _interrupt(self, name: str) -> Interrupt:
        async def interrupt(verb: str) -> None:
            await let_others_run()
            if name in self.interrupts:
                await self.interrupts[name](verb)

        return interrupt

    async def play(self, *, num_steps: int = NUM_STEPS, **others: object) -> None:
        self.buffer = make_buffer(
            self.make_document,
            num_steps=num_steps,
            max_lag=self.max_lag,
            record=lambda row: self.rows.append(json.loads(json.dumps(row))),
        )
        self.members = [self.worker(f"worker {i}") for i in range(2)] + [self.server(f"server {i}") for i in range(2)]
        self.learner = FakeLearner(self.events, self._interrupt("learner"))
        self.controller = make_controller(
            self.buffer,
            workers=self.members[:2],
            servers=self.members[2:],
            learner=self.learner,
            documents_per_request=self.per_request,
            on_failure=self.on_failure,
            **others,
        )
        await self.controller._weight_sync.publish()
        await self.controller.run(num_steps)

    async def on_failure(self, member: Member, failure: ProcessFailure) -> None:
        self.events.append(("failed", member.name))
        if not self.replaces:
            return
        await let_others_run(10)
        name = f"{member.name}, the next"
        if isinstance(member, FakeWorker):
            self.controller.add_worker(self.worker(name), on_trained=lambda: None)
        else:
            self.controller.add_scorer(self.server(name))

    @property
    def trained(self) -> list[Event]:
        return [event[1:] for event in self.events if event[0] == "train"]

    @property
    def failed(self) -> list[str]:
        return [event[1] for event in self.events if event[0] == "failed"]

    @property
    def num_sampled(self) -> Counter[int]:
        """Ticket -> times that a worker was asked for it."""
        return Counter(ticket.ticket_id for worker in self.workers for ticket in worker.asked)

    def require_as_without_failures(self, *, num_steps: int = NUM_STEPS) -> None:
        assert self.trained == [(2 * step, 2 * step + 1) for step in range(num_steps)]
        asked: dict[int, set[tuple[int, str]]] = {}
        for ticket in (ticket for worker in self.workers for ticket in worker.asked):
            asked.setdefault(ticket.ticket_id, set()).add((ticket.seed, ticket.document.document_id))
        assert [ticket_id for ticket_id, ways in asked.items() if len(ways) > 1] == [], "sampled with another seed"
        require_balanced(self.buffer.account, audit(self.rows))
        assert self.buffer.account.trained == num_steps * DOCUMENTS_PER_STEP
        assert max(self.learner.lags) <= self.max_lag

    def require_verified_weights_first(self, name: str) -> None:
        mine = [event[0] for event in self.events if name in event and event[0] in ("receive", "sample")]
        assert mine[0] == "receive"


def failing_at(run: Run, verb: str, number: int, act: Act, name: str) -> Interrupt:
    """Act on the member when it is asked for this verb for so many times."""
    calls = Counter[str]()

    async def interrupt(present: str) -> None:
        calls[present] += 1
        if present == verb and calls[verb] == number:
            (member,) = [member for member in run.members if member.name == name]
            await act(member)

    return interrupt


async def raises(member: FakeMember) -> None:
    raise ProcessFailure(member.name, f"{member.name} failed: out of memory")


async def dies(member: FakeMember) -> None:
    """The call is lost first, then the watch over the process hears of it."""
    member.die()


async def dies_a_little_earlier(member: FakeMember) -> None:
    member.die()
    await let_others_run(1)


async def dies_earlier(member: FakeMember) -> None:
    member.die()
    await let_others_run(4)


async def dies_and_hangs(member: FakeMember) -> None:
    member.die()
    await asyncio.Event().wait()


WAYS = [raises, dies, dies_a_little_earlier, dies_earlier, dies_and_hangs]


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("act", WAYS)
@pytest.mark.parametrize(
    ("verb", "name"), [("sample", "worker 0"), ("receive_weights", "worker 0"), ("score", "server 0")]
)
def test_what_one_had_that_failed_is_done_by_others(
    verb: str, name: str, act: Act, number: int, max_lag: int, make_document: MakeDocument
) -> None:
    run = Run(make_document, max_lag, per_request=1)
    run.interrupts[name] = failing_at(run, verb, number, act, name)
    run_alone(run.play())
    assert run.failed == [name], "twice, or not at all"
    run.require_as_without_failures()
    if verb != "score":
        run.require_verified_weights_first("worker 0, the next")
        assert run.workers[-1].asked, "the replacement does its share"
        assert run.events.count(("part from", name)) == 1


@pytest.mark.parametrize("number", range(1, 9))
def test_both_workers_fail_at_once(number: int, make_document: MakeDocument) -> None:
    run = Run(make_document)

    async def both(member: FakeMember) -> None:
        for one in run.members[:2]:
            one.die()

    run.interrupts["worker 0"] = failing_at(run, "sample", (number + 1) // 2, both, "worker 0")
    run.interrupts["learner"] = failing_at(run, "train_step", number, both, "server 0")  # while some are idle
    run_alone(run.play())
    assert sorted(run.failed) == ["worker 0", "worker 1"]
    run.require_as_without_failures()


@pytest.mark.parametrize("name", ["worker 0", "worker 1", "server 0"])
def test_an_idle_one_is_missed_before_it_is_needed(name: str, make_document: MakeDocument) -> None:
    """With max_lag 0 all wait while the learner trains."""
    run = Run(make_document, max_lag=0)

    async def die(learner: FakeMember) -> None:
        (member,) = [member for member in run.members if member.name == name]
        member.die()
        await let_others_run(5)
        run.events.append(("trained on",))

    run.interrupts["learner"] = failing_at(run, "train_step", 3, die, "server 0")
    run_alone(run.play())
    assert run.events.index(("failed", name)) < run.events.index(("trained on",))
    run.require_as_without_failures()
    assert set(run.num_sampled.values()) == {1}, "no work was lost"


def test_a_failure_met_by_an_evaluation_gives_its_other_work_to_others(make_document: MakeDocument) -> None:
    """`lose` returns when that is done, and does not wait until another process has taken its place."""
    run = Run(make_document, max_lag=2)
    at_work, come = asyncio.Event(), asyncio.Event()

    async def on_failure(member: Member, failure: ProcessFailure) -> None:
        run.events.append(("failed", member.name))
        await come.wait()
        run.controller.add_worker(run.worker("worker 0, the next"), on_trained=lambda: None)

    async def hang(verb: str) -> None:
        if verb == "sample" and run.learner.version >= 3:
            at_work.set()
            await asyncio.Event().wait()

    async def evaluate(step: int) -> None:
        if step == 4:
            await at_work.wait()
            await run.controller.lose(run.members[0], run.members[0].loss)
            returned = [row["tickets"] for row in run.rows if row["event"] == "returned"]
            assert len(returned) == 1
            come.set()

    run.on_failure, run.interrupts["worker 0"] = on_failure, hang
    run_alone(run.play(after_step=evaluate))
    assert run.failed == ["worker 0"]
    run.require_as_without_failures()
    run.require_verified_weights_first("worker 0, the next")


def test_one_that_only_evaluates_is_replaced_too(make_document: MakeDocument) -> None:
    run = Run(make_document)
    stranger = FakeServer(run.events, "server of evaluations")

    async def evaluate(step: int) -> None:
        if step == 4:
            await run.controller.lose(stranger, stranger.loss)

    run_alone(run.play(after_step=evaluate))
    assert run.failed == ["server of evaluations"]


def test_a_request_whose_server_is_lost_is_not_sampled_again(make_document: MakeDocument) -> None:
    run = Run(make_document)
    run.interrupts["server 0"] = failing_at(run, "score", 1, dies, "server 0")
    run_alone(run.play())
    assert set(run.num_sampled.values()) == {1}
    assert max(Counter(t for event in run.events if event[0] == "score" for t in event[1:]).values()) == 2
    assert not [row for row in run.rows if row["event"] == "returned"]
    run.require_as_without_failures()


def test_a_request_that_loses_two_servers_is_sampled_again(make_document: MakeDocument) -> None:
    """What was sampled may be gone with its node, which no server survives."""
    run = Run(make_document, max_lag=0)
    for name in ("server 0", "server 1"):
        run.interrupts[name] = failing_at(run, "score", 1, dies, name)
    run_alone(run.play())
    assert run.num_sampled == {ticket: 2 if ticket < 2 else 1 for ticket in range(2 * NUM_STEPS)}
    assert sum(event == ("score", 0, 1) for event in run.events) == 3
    run.require_as_without_failures()


def test_a_request_that_a_server_cannot_score_is_sampled_again(make_document: MakeDocument) -> None:
    run = Run(make_document, max_lag=0)
    run.interrupts["server 0"] = failing_at(run, "score", 1, raises, "server 0")
    run_alone(run.play())
    (returned,) = [row for row in run.rows if row["event"] == "returned"]
    assert returned["error"] == "server 0 failed: out of memory"
    assert {run.num_sampled[ticket] for ticket in returned["tickets"]} == {2}
    run.require_as_without_failures()


@pytest.mark.parametrize("act", WAYS)
@pytest.mark.parametrize(("verb", "index"), [("sample", 1), ("score", 3)])
def test_one_that_fails_while_it_leaves_loses_nothing(
    verb: str, index: int, act: Act, make_document: MakeDocument
) -> None:
    run = Run(make_document, max_lag=2, per_request=1)
    at_work, leaving = asyncio.Event(), asyncio.Event()

    async def fail_when_leaving(present: str) -> None:
        if present == verb and run.learner.version >= 2:
            at_work.set()
            await leaving.wait()
            await let_others_run(3)
            await act(run.members[index])

    async def leave(step: int) -> None:
        if step == 3:
            await at_work.wait()
            leaving.set()
            remove = run.controller.remove_worker if verb == "sample" else run.controller.remove_scorer
            await remove(run.members[index])
            run.events.append(("left",))

    run.interrupts[f"{'worker' if verb == 'sample' else 'server'} 1"] = fail_when_leaving
    run_alone(run.play(after_step=leave))
    assert ("left",) in run.events and run.failed == [], "nobody is to replace it"
    run.require_as_without_failures()


@pytest.mark.parametrize("moment", ["before", "released"])
def test_one_that_has_failed_may_be_asked_to_leave(moment: str, make_document: MakeDocument) -> None:
    run = Run(make_document)

    async def leave(step: int) -> None:
        if step == 3:
            run.members[1].die()
            await let_others_run(4 if moment == "before" else 0)
            await run.controller.remove_worker(run.members[1])
            run.events.append(("left",))

    run_alone(run.play(after_step=leave))
    assert ("left",) in run.events
    run.require_as_without_failures()


# -- what is no failure of a worker -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train_step", "publish"])
def test_a_learner_that_raises_ends_the_run_with_its_error(verb: str, make_document: MakeDocument) -> None:
    run = Run(make_document)
    failure = ConnectionError("the learner broke")

    async def fail(member: FakeMember) -> None:
        raise failure

    run.interrupts["learner"] = failing_at(run, verb, 3, fail, "server 0")
    with pytest.raises(ConnectionError) as caught:
        run_alone(run.play())
    assert caught.value is failure
    assert run.failed == []


def test_a_learner_that_is_lost_ends_the_run_while_it_has_nothing_to_do(make_document: MakeDocument) -> None:
    run = Run(make_document)

    async def hang(member: FakeMember) -> None:
        run.learner.die()
        await asyncio.Event().wait()

    run.interrupts["worker 0"] = failing_at(run, "sample", 2, hang, "worker 0")
    with pytest.raises(ProcessLost, match="learner died"):
        run_alone(run.play())
    assert run.failed == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_that_meets_the_learners_failure_is_not_to_blame(number: int, make_document: MakeDocument) -> None:
    """While it receives weights, before a request or beside one."""
    run = Run(make_document)
    failure = ProcessLost("learner 0", "learner 0 died (during send_weights())")

    async def meet(member: FakeMember) -> None:
        raise failure

    run.interrupts["worker 0"] = failing_at(run, "receive_weights", number, meet, "worker 0")
    with pytest.raises(ProcessLost) as caught:
        run_alone(run.play())
    assert caught.value is failure
    assert run.failed == []


# -- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_request", [1, 2, 4])
@pytest.mark.parametrize("max_lag", [0, 2])
def test_a_document_that_kills_every_worker_is_set_aside(
    max_lag: int, per_request: int, make_document: MakeDocument
) -> None:
    run = Run(make_document, max_lag, per_request=per_request)
    poison = make_document(5).document_id
    asked: list[Ticket] = []

    def fatal(name: str) -> Interrupt:
        async def interrupt(verb: str) -> None:
            (worker,) = [worker for worker in run.workers if worker.name == name]
            if verb == "sample" and poison in [ticket.document.document_id for ticket in worker.asked[-per_request:]]:
                asked.append(worker.asked[-1])
                raise worker.loss

        return interrupt

    names = [f"worker {i}{', the next' * j}" for i in range(2) for j in range(MAX_FAILURES + 1)]
    run.interrupts = {name: fatal(name) for name in names}
    run_alone(run.play())
    assert len(run.failed) == MAX_FAILURES
    (failed,) = [row for row in run.rows if row["event"] == "failed"]
    assert failed["document"] == poison and "died" in failed["error"]
    assert sorted(ticket for step in run.trained for ticket in step) == list(range(2 * NUM_STEPS))
    assert all(set(step) == {2 * i, 2 * i + 1} for i, step in enumerate(run.trained))
    require_balanced(run.buffer.account, audit(run.rows))
    assert run.buffer.account.failed == 1


# -- who waits for what -------------------------------------------------------------------------------------------


def test_a_batch_that_never_comes_says_who_holds_what(make_document: MakeDocument) -> None:
    run = Run(make_document, max_lag=1, per_request=1)

    async def hang(member: FakeMember) -> None:
        await asyncio.Event().wait()

    run.interrupts["worker 1"] = failing_at(run, "sample", 2, hang, "worker 1")
    run.interrupts["server 0"] = failing_at(run, "score", 2, hang, "server 0")
    with pytest.raises(TimeoutError) as caught:
        run_alone(run.play(batch_timeout_s=7.0), run=run_in_virtual_time)
    found = str(caught.value)
    assert f"worker 1 samples [{run.workers[1].asked[-1].ticket_id}]" in found
    (scored,) = re.findall(r"server 0 scores \[(\d+)\]", found)
    assert ("score", int(scored)) in run.events
    for who_waits in ("rollout/admission", "score/rollouts", "learner/batch"):
        assert found.count(f"{who_waits} for 7 s") == 1


def test_a_replacement_that_takes_long_is_waited_for_while_others_work(make_document: MakeDocument) -> None:
    """The learner's patience begins anew with everything that is sampled or scored."""
    run = Run(make_document, max_lag=2, per_request=1)

    async def dawdle(verb: str) -> None:
        await asyncio.sleep(3.0)

    run.interrupts = {"worker 1": dawdle, "worker 0": failing_at(run, "sample", 1, dies, "worker 0")}
    run.replaces = False
    run_alone(run.play(batch_timeout_s=7.0), run=run_in_virtual_time)
    assert run.failed == ["worker 0"]
    run.require_as_without_failures()
