"""The loops with fakes for every role: order of events, weights that each one sees, and the end of a run."""

import asyncio
import json
from pathlib import Path

import pytest
from fake_roles import (
    DOCUMENTS_PER_STEP,
    Event,
    FakeLearner,
    FakeServer,
    FakeWorker,
    MakeDocument,
    let_others_run,
    make_buffer,
    run_alone,
)
from fake_roles import make_controller as controller_around

from actors.rollout import Ticket
from orchestration.loops.controller import Controller
from orchestration.output.metrics import JsonLines, MetricsLog
from orchestration.simulator.virtual_time import run_in_virtual_time


def make_controller(
    make_document: MakeDocument,
    *,
    num_steps: int,
    max_lag: int,
    lag_rule: str = "in_order",
    **others: object,
) -> Controller:
    """`others`: as fake_roles.make_controller."""
    buffer = make_buffer(make_document, num_steps=num_steps, max_lag=max_lag, lag_rule=lag_rule)
    return controller_around(buffer, push=lag_rule != "exact", **others)


def test_lag_0_is_the_synchronous_algorithm(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=3,
            max_lag=0,
        )
        await controller.run(3)

    run_alone(scenario())
    expected: list[Event] = []
    for step in range(3):
        tickets = (2 * step, 2 * step + 1)
        expected += [("receive", "worker 0", step)] if step else []
        expected += [("sample", "worker 0", step, *tickets), ("score", *tickets), ("train", *tickets)]
        expected += [("trained", step + 1), ("publish", step + 1)]
    assert events[: len(expected)] == expected
    assert set(events[len(expected) :]) <= {("receive", "worker 0", 3)}


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_several_workers_and_servers_keep_the_bound_and_the_order(max_lag: int, make_document: MakeDocument) -> None:
    events: list[Event] = []
    learner = FakeLearner(events)

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, f"worker {i}") for i in range(3)],
            servers=[FakeServer(events, f"server {i}") for i in range(2)],
            learner=learner,
            num_steps=8,
            max_lag=max_lag,
            documents_per_request=1,
        )
        await controller.run(8)

    run_alone(scenario())
    assert [event[1:] for event in events if event[0] == "train"] == [(2 * s, 2 * s + 1) for s in range(8)]
    assert max(learner.lags) <= max_lag
    for verb, first in (("sample", 3), ("score", 1)):
        handled = [ticket for event in events if event[0] == verb for ticket in event[first:]]
        assert sorted(handled) == list(range(16)), verb
    for worker in range(3):
        seen = 0
        for event in events:
            if event[:2] == ("receive", f"worker {worker}"):
                assert event[2] > seen, "pulled the same weights twice"
                seen = event[2]
            elif event[:2] == ("sample", f"worker {worker}"):
                assert event[2] == seen


@pytest.mark.parametrize(("max_lag", "overlaps"), [(0, False), (1, True)])
def test_lag_1_samples_the_next_step_while_this_one_trains(
    max_lag: int, overlaps: bool, make_document: MakeDocument
) -> None:
    """The learner's first step ends only when a worker samples step 1: without overlap this is a deadlock."""
    events: list[Event] = []

    async def scenario() -> None:
        sampling_next = asyncio.Event()

        async def notice_next(verb: str) -> None:
            if any(event[0] == "sample" and DOCUMENTS_PER_STEP in event[3:] for event in events):
                sampling_next.set()

        async def wait_for_next(verb: str) -> None:
            await sampling_next.wait()

        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, interrupt=notice_next)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events, interrupt=wait_for_next),
            num_steps=2,
            max_lag=max_lag,
        )
        async with asyncio.timeout(60 if overlaps else 0.1):
            await controller.run(2)

    if overlaps:
        run_alone(scenario())
        assert events.index(("sample", "worker 0", 0, 2, 3)) < events.index(("trained", 1))
    else:
        with pytest.raises(TimeoutError):
            run_alone(scenario())
        assert ("trained", 1) not in events


@pytest.mark.parametrize("verb", ["sample", "receive_weights", "score", "train_step", "publish"])
def test_the_first_failure_ends_the_run_with_its_own_error(verb: str, make_document: MakeDocument) -> None:
    events: list[Event] = []
    failure = ConnectionError(f"{verb} broke")

    async def hang_in_second_request(present: str) -> None:
        await let_others_run()
        if [event[:2] for event in events].count(("sample", "hanging")) == 2:
            events.append(("hangs",))
            try:
                await asyncio.Event().wait()
            finally:
                events.append(("cancelled",))

    async def fail(present: str) -> None:
        await let_others_run()
        while present == verb and ("hangs",) not in events:
            await asyncio.sleep(0)
        if present == verb:
            raise failure

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "hanging", hang_in_second_request), FakeWorker(events, "failing", fail)],
            servers=[FakeServer(events, interrupt=fail)],
            learner=FakeLearner(events, interrupt=fail),
            num_steps=20,
            max_lag=8,
            documents_per_request=1,
        )
        await controller.run(20)

    with pytest.raises(ConnectionError) as caught:
        run_alone(scenario())
    assert caught.value is failure
    assert events.count(("cancelled",)) == events.count(("hangs",)) >= 1


def test_a_batch_that_never_comes_is_reported_with_numbers(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def hang_at_ticket_3(verb: str) -> None:
        if events[-1][-1] == 3:
            await asyncio.Event().wait()

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "worker 0", hang_at_ticket_3), FakeWorker(events, "worker 1")],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=9,
            max_lag=1,
            batch_timeout_s=0.125,
            documents_per_request=1,
        )
        await controller.run(9)

    with pytest.raises(TimeoutError) as caught:
        run_alone(scenario(), run=run_in_virtual_time)
    for part in (
        "step 2 waited 0.125 s",
        "3 of 4 admitted ones are scored",
        "asynchrony.request_timeout_s",
    ):
        assert part in str(caught.value)


def test_a_slow_worker_does_not_hold_up_a_fast_one(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def dawdle(verb: str) -> None:
        await let_others_run(60)

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "slow", dawdle), FakeWorker(events, "fast")],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=30,
            max_lag=4,
            documents_per_request=1,
        )
        await controller.run(30)

    run_alone(scenario())
    requests = [event[1] for event in events if event[0] == "sample"]
    assert requests.count("slow") >= 2
    assert requests.count("fast") > 2 * requests.count("slow")


def test_supervised_fine_tuning_asks_neither_worker_nor_server(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=3,
            max_lag=1,
            without_rollouts=lambda document: (document.document_id, None),
        )
        await controller.run(3)

    run_alone(scenario())
    assert {event[0] for event in events} == {"train", "trained", "publish"}
    trained = [event[1:] for event in events if event[0] == "train"]
    assert trained == [(f"train/{2 * step}", f"train/{2 * step + 1}") for step in range(3)]


def test_exact_lag_reloads_older_weights_and_keeps_no_more_than_it_needs(make_document: MakeDocument) -> None:
    """Two workers of very different speed, so that one of them would have newer weights than its tickets ask for."""
    events: list[Event] = []
    learner = FakeLearner(events)
    kept: list[int] = []

    async def dawdle(verb: str) -> None:
        await let_others_run(40)

    async def scenario() -> None:
        async def note_publications(step: int) -> None:
            kept.append(len(controller._weight_sync._publications))

        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "slow", dawdle), FakeWorker(events, "fast")],
            servers=[FakeServer(events)],
            learner=learner,
            num_steps=9,
            max_lag=2,
            documents_per_request=1,
            lag_rule="exact",
            after_step=note_publications,
        )
        await controller._weight_sync.publish()
        await controller.run(9)

    run_alone(scenario())
    assert learner.lags == [min(2, ticket // DOCUMENTS_PER_STEP) for ticket in range(18)]
    for event in events:
        if event[0] == "sample":
            assert event[2] == max(0, event[3] // DOCUMENTS_PER_STEP - 2)
    assert max(kept) == 3


def test_a_worker_that_joins_loads_weights_before_its_first_ticket(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        async def join(step: int) -> None:
            if step == 3:
                joining = FakeWorker(events, "joining")
                joining.policy_version = None
                controller.add_worker(joining, on_trained=lambda: events.append(("first rollout",)))

        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "slow", lambda verb: let_others_run(30))],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=8,
            max_lag=2,
            documents_per_request=1,
            after_step=join,
        )
        await controller.run(8)

    run_alone(scenario())
    mine = [event for event in events if "joining" in event]
    assert mine[0] == ("receive", "joining", 3)
    assert [event[0] for event in mine].count("sample") > 1
    tickets = {ticket_id for event in mine if event[0] == "sample" for ticket_id in event[3:]}
    first = next(i for i, event in enumerate(events) if event[0] == "train" and tickets & set(event[1:]))
    assert [i for i, event in enumerate(events) if event == ("first rollout",)] == [first - 1], "once, and in time"
    assert [event[1:] for event in events if event[0] == "train"] == [(2 * s, 2 * s + 1) for s in range(8)]


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_leaves_finishes_its_request_first(busy: bool, make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        async def leave(step: int) -> None:
            if step == 3:
                await controller.remove_worker(leaver)
                events.append(("left",))

        async def dawdle(verb: str) -> None:
            await let_others_run(25 if busy else 1)

        leaver = FakeWorker(events, "leaver", dawdle)
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events, "stayer", dawdle), leaver],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=8,
            max_lag=2,
            documents_per_request=1,
            after_step=leave,
        )
        await controller.run(8)

    run_alone(scenario())
    left = events.index(("left",))
    assert events[left - 1] == ("part from", "leaver"), "the learner keeps a channel to a worker that left"
    assert not [event for event in events[left:] if "leaver" in event]
    assert [event[1:] for event in events if event[0] == "train"] == [(2 * s, 2 * s + 1) for s in range(8)]


def test_admission_opens_only_when_the_weights_can_be_pulled(make_document: MakeDocument) -> None:
    events: list[Event] = []
    pullable: list[tuple[int, int]] = []

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=4,
            max_lag=1,
        )
        await controller.run(4)
        pullable.extend(controller._buffer.pullable)

    run_alone(scenario())
    assert pullable == [(step, step) for step in range(1, 5)]


def test_evaluation_between_two_steps_sees_exactly_the_published_weights(make_document: MakeDocument) -> None:
    """It shares workers with the run's own sampling, which continues meanwhile; training waits for it."""
    events: list[Event] = []

    async def take_long_to_sample(verb: str) -> None:
        await let_others_run(7 if verb == "sample" else 1)

    async def scenario() -> None:
        async def evaluate(step: int) -> None:
            events.append(("evaluate", step))
            for index, worker in enumerate(workers):
                ticket = Ticket(
                    ticket_id=-1 - index,
                    document=make_document(0),
                    seed=0,
                    completions_per_context=2,
                    min_policy_version=step,
                )
                async with controller._buffer.weight_sync.prepare(worker, [ticket]):
                    ((summary, _),) = await worker.sample([ticket])
                assert summary.min_policy_version == step
            events.append(("evaluated", step))

        workers = [FakeWorker(events, f"worker {i}", take_long_to_sample) for i in range(2)]
        controller = make_controller(
            make_document,
            workers=workers,
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=6,
            max_lag=2,
            after_step=evaluate,
            documents_per_request=1,
        )
        await controller.run(6)

    run_alone(scenario())
    milestones = [event for event in events if event[0] in ("train", "publish", "evaluate", "evaluated")]
    assert milestones == [("evaluate", 0), ("evaluated", 0)] + [
        milestone
        for step in range(1, 7)
        for milestone in (
            ("train", 2 * step - 2, 2 * step - 1),
            ("publish", step),
            ("evaluate", step),
            ("evaluated", step),
        )
    ]
    evaluated = [event for event in events if event[0] == "sample" and event[-1] < 0]
    assert evaluated == [("sample", f"worker {i}", s, -1 - i) for s in range(7) for i in range(2)]


def test_one_row_of_metrics_for_each_step(make_document: MakeDocument, tmp_path: Path) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=4,
            max_lag=0,
            metrics=MetricsLog([JsonLines(tmp_path / "metrics.jsonl")]),
        )
        await controller.run(4)

    run_alone(scenario())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["rollout/tokens"] == 10
        assert row["rollout/sample_s"] == 0.5
        assert row["score/score_s"] == 0.25
        assert row["weights/publish_s"] == 0.125
        assert row["lag/max"] == 0
        assert row["time/step_s"] >= row["time/wait_for_batch_s"] >= 0


def test_a_run_of_no_steps_ends_at_once(make_document: MakeDocument) -> None:
    events: list[Event] = []

    async def scenario() -> None:
        controller = make_controller(
            make_document,
            workers=[FakeWorker(events)],
            servers=[FakeServer(events)],
            learner=FakeLearner(events),
            num_steps=0,
            max_lag=1,
        )
        await controller.run(0)

    run_alone(scenario())
    assert events == []
