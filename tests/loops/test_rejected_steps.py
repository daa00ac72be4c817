"""Steps that the learner cannot apply, and runs that are stopped: what is trained on in their place, or later."""

import asyncio
import json
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

import pytest
from fake_roles import (
    Event,
    FakeLearner,
    FakeServer,
    FakeWorker,
    MakeDocument,
    ObservedBuffer,
    let_others_run,
    make_buffer,
    make_controller,
    run_alone,
)

from orchestration.buffer.accounting import audit, require_balanced
from orchestration.buffer.uses import Use
from orchestration.loops.controller import MAX_REJECTED_IN_A_ROW, Controller

NUM_STEPS = 8


async def undisturbed(verb: str) -> None:
    await let_others_run()


@dataclass
class Run:
    """One worker, one server; `learner` fails as the test says."""

    make_document: MakeDocument
    max_lag: int = 2
    events: list[Event] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.learner = FakeLearner(self.events)
        self.taken: list[dict[int, str]] = []
        """Ticket -> document, of each attempt at a step."""

    def buffer(self, *, first_document: int = 0) -> ObservedBuffer:
        return make_buffer(
            self.make_document,
            num_steps=NUM_STEPS,
            max_lag=self.max_lag,
            first_document=first_document,
            record=lambda row: self.rows.append(json.loads(json.dumps(row))),
        )

    def controller(self, buffer: ObservedBuffer, **others: object) -> Controller:
        self.worker = FakeWorker(self.events)
        self.worker.policy_version = None
        return make_controller(
            buffer,
            workers=[self.worker],
            servers=[FakeServer(self.events)],
            learner=self.learner,
            documents_per_request=1,
            **others,
        )

    def rejecting(self, attempts: Sequence[int]) -> None:
        """The learner cannot apply these attempts, counted from 1."""
        train_step = self.learner.train_step

        async def train(batch: Sequence[Use[Event]]) -> dict[str, float]:
            self.taken.append({use.ticket.ticket_id: use.ticket.document.document_id for use in batch})
            if len(self.taken) in attempts:
                await let_others_run(3)
                raise FloatingPointError(f"loss of attempt {len(self.taken)} is nan")
            return await train_step(batch)

        self.learner.train_step = train

    @property
    def trained(self) -> list[Event]:
        return [event[1:] for event in self.events if event[0] == "train"]


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("attempts", [[1], [3], [3, 4], [2, 3, 4], [1, 2, 3, 5, 6, 7]])
def test_a_step_that_cannot_be_applied_is_taken_again_with_other_documents(
    attempts: list[int], max_lag: int, make_document: MakeDocument
) -> None:
    run = Run(make_document, max_lag)
    told: list[tuple[int, dict[int, str]]] = []

    async def on_rejected(step: int, batch: Sequence[Use[Event]]) -> None:
        told.append((step, {use.ticket.ticket_id: use.ticket.document.document_id for use in batch}))

    async def scenario() -> None:
        buffer = run.buffer()
        controller = run.controller(buffer, on_rejected=on_rejected)
        await controller._weight_sync.publish()
        assert await controller.run(NUM_STEPS) == NUM_STEPS
        require_balanced(buffer.account, audit(run.rows))
        assert (buffer.account.trained, buffer.account.failed) == (2 * NUM_STEPS, 2 * len(attempts))

    run.rejecting(attempts)
    run_alone(scenario())
    rejected = [run.taken[attempt - 1] for attempt in attempts]
    applied = [batch for attempt, batch in enumerate(run.taken, start=1) if attempt not in attempts]
    assert [batch for _, batch in told] == rejected
    assert [step for step, _ in told] == [1 + sum(b not in rejected for b in run.taken[: a - 1]) for a in attempts]
    assert [set(batch) for batch in applied] == [{2 * step, 2 * step + 1} for step in range(NUM_STEPS)]
    documents = [document for batch in run.taken for document in batch.values()]
    assert len(set(documents)) == len(documents), "a document of a step that failed came again"


def test_too_many_in_a_row_end_the_run(make_document: MakeDocument) -> None:
    run = Run(make_document)
    told: list[int] = []

    async def on_rejected(step: int, batch: Sequence[Use[Event]]) -> None:
        told.append(step)

    async def scenario() -> None:
        controller = run.controller(run.buffer(), on_rejected=on_rejected)
        await controller._weight_sync.publish()
        await controller.run(NUM_STEPS)

    run.rejecting(range(3, 100))
    with pytest.raises(FloatingPointError, match="4 batches in a row, the last: loss of attempt 6 is nan"):
        run_alone(scenario())
    assert told == [3] * (MAX_REJECTED_IN_A_ROW + 1)
    assert run.learner.version == 2


# -- stop ---------------------------------------------------------------------------------------------------------


MOMENTS = ["before the run", "before the first step", "waits", "trains", "publishes", "evaluates", "is always busy"]


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_stopped_goes_on_in_another(moment: str, max_lag: int, make_document: MakeDocument) -> None:
    """Nothing that had arrived is sampled again, and nothing is trained on twice."""
    run = Run(make_document, max_lag)

    async def scenario() -> None:
        buffer = run.buffer()
        controller = run.controller(buffer, after_step=lambda step: after_step(controller, step))
        Stop(run, controller).at(moment)
        await controller._weight_sync.publish()
        if moment == "before the run":
            controller.stop()
        steps_done = await controller.run(NUM_STEPS)
        assert steps_done == run.learner.version < NUM_STEPS
        if moment in ("trains", "publishes"):
            assert steps_done == 3, "the step that was begun is finished, and no other"
        state, payloads = buffer.state()
        require_balanced(buffer.account, audit(run.rows))
        arrived = {told.ticket.ticket_id for told in state.arrived}
        asked = len(run.worker.asked)
        assert state.step == steps_done and len(state.arrived) == buffer.num_scored
        second = run.buffer(first_document=buffer.account.issued)
        second.restore(state, payloads)
        following = run.controller(second)
        await following._weight_sync.publish()
        assert await following.run(NUM_STEPS, steps_done=steps_done) == NUM_STEPS
        again = {ticket.ticket_id for ticket in run.worker.asked}
        assert not again & arrived and asked + len(again) >= 2 * NUM_STEPS
        require_balanced(second.account, audit(run.rows))
        assert second.account.trained == 2 * NUM_STEPS

    async def after_step(controller: Controller, step: int) -> None:
        if (moment, step) == ("before the first step", 0):
            controller.stop()
            await asyncio.Event().wait()  # an evaluation that takes long
        if (moment, step) == ("evaluates", 3):
            controller.stop()
            await asyncio.Event().wait()

    run_alone(scenario())
    assert run.trained == [(2 * step, 2 * step + 1) for step in range(NUM_STEPS)]


@dataclass
class Stop:
    """Calls `stop` once, in the middle of something."""

    run: Run
    controller: Controller

    def at(self, moment: str) -> None:
        learner, worker = self.run.learner, self.run.worker
        if moment == "waits":
            worker._interrupt = self.when("sample", lambda: len(worker.asked) == 6)
        elif moment == "trains":
            learner._interrupt = self.when("train_step", lambda: learner.version == 2)
        elif moment == "publishes":
            learner._interrupt = self.when("publish", lambda: learner.version == 3)
        elif moment == "is always busy":
            self.run.learner._interrupt = self.slowly

    def when(self, verb: str, is_time: object) -> Awaitable[None]:
        done: list[str] = []

        async def interrupt(present: str) -> None:
            await let_others_run(2)
            if present == verb and is_time() and not done:
                done.append(present)
                self.controller.stop()
                await let_others_run(5)

        return interrupt

    async def slowly(self, verb: str) -> None:
        """Every batch is there before it is needed, so that the learner waits for nothing."""
        await let_others_run(200)
        if verb == "train_step" and self.run.learner.version == 2:
            self.controller.stop()


def test_a_stop_takes_effect_though_every_batch_is_there_in_time(make_document: MakeDocument) -> None:
    run = Run(make_document)

    async def scenario() -> None:
        controller = run.controller(run.buffer())
        Stop(run, controller).at("is always busy")
        await controller._weight_sync.publish()
        assert await controller.run(NUM_STEPS) == 3

    run_alone(scenario())
