"""A run and its replay, with roles whose every result is a digest of all that it may depend on."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from arrivals import finish
from digest_roles import STEPS, Delays, Learner, Scorer, Worker, settings

from actors.rollout import Document, WeightSteps
from orchestration.buffer.event_log import (
    LoggedRequest,
    LoggedTicket,
    Recording,
    read_recording,
    require_same_configuration,
)
from orchestration.buffer.replay_buffer import ReplayBuffer
from orchestration.buffer.schedule import Schedule, recording_of
from orchestration.config import RunConfig
from orchestration.loops.controller import Controller
from orchestration.output.metrics import JsonLines, MetricsLog
from orchestration.roles.weight_sync import WeightSync
from orchestration.simulator.virtual_time import run_in_virtual_time

MakeDocument = Callable[[int], Document]
NUM_DOCUMENTS = 17


async def nothing(step: int) -> None:
    pass


def play(config: RunConfig, log: Path, documents: list[Document], *, delays: int, num_workers: int = 3) -> Learner:
    """A whole run in virtual time; writes its event log."""

    async def run() -> Learner:
        events, waits = JsonLines(log), Delays(delays)
        schedule = Schedule(config, recording_of(config), events)
        learner, metrics = Learner(waits), MetricsLog([])
        sync = WeightSync(learner, metrics, push=not schedule.names_versions, on_publish=schedule.published)
        controller = Controller(
            buffer=schedule.buffer(documents),
            rollout_workers=[
                Worker(f"worker {i}", waits, in_flight_updates=config.rollout.in_flight_updates)
                for i in range(num_workers)
            ],
            scorers=[Scorer(waits), Scorer(waits)],
            learner=learner,
            weight_sync=sync,
            metrics=metrics,
            documents_per_request=config.rollout.documents_per_request,
            batch_timeout_s=1e6,
            after_step=nothing,
        )
        await sync.publish()
        await controller.run(config.learner.num_steps)
        events.close()
        return learner

    return run_in_virtual_time(run())


@pytest.fixture
def documents(make_document: MakeDocument) -> list[Document]:
    return [make_document(index) for index in range(NUM_DOCUMENTS)]


ASYNCHRONIES = [
    {"max_lag": 2},
    {"max_lag": 2, "lag_rule": "wait", "prefetch_steps": 1},
    {"max_lag": 1, "lag_rule": "drop"},
    {"mode": "free", "max_lag": 2},
    {"max_lag": 1, "max_uses": 2},
    {"max_lag": 1, "max_uses": 3, "max_reuse_lag": 5, "reuse_order": "uniform", "lag_rule": "drop"},
    {"max_lag": 2, "in_flight_updates": "keep"},
    {"max_lag": 3, "lag_rule": "drop", "max_uses": 2, "in_flight_updates": "keep"},
]


@pytest.mark.parametrize("asynchrony", ASYNCHRONIES, ids=json.dumps)
def test_a_replay_ends_with_the_weights_of_the_run(
    asynchrony: dict[str, object], documents: list[Document], tmp_path: Path
) -> None:
    config = settings(**asynchrony)
    live = play(config, tmp_path / "live.jsonl", documents, delays=1)
    again = config.model_copy(update={"replay": str(tmp_path / "live.jsonl")})
    for delays, num_workers in ((2, 3), (3, 1), (4, 5)):
        replayed = play(again, tmp_path / f"{delays}.jsonl", documents, delays=delays, num_workers=num_workers)
        assert replayed.batches == live.batches
        assert replayed.weights == live.weights
    # The same run with other delays is another run: the log is what makes them equal.
    other = play(config, tmp_path / "other.jsonl", documents, delays=2)
    assert other.weights != live.weights


@pytest.mark.parametrize("asynchrony", [{"max_lag": 3}, {"max_lag": 0}, {"max_lag": 2, "max_uses": 2}], ids=json.dumps)
def test_exact_lag_needs_no_log(asynchrony: dict[str, object], documents: list[Document], tmp_path: Path) -> None:
    config = settings(mode="exact", **asynchrony)
    runs = [
        play(config, tmp_path / f"{seed}.jsonl", documents, delays=seed, num_workers=workers)
        for seed, workers in ((1, 1), (2, 4), (3, 2))
    ]
    assert len({run.weights for run in runs}) == 1


def test_lag_0_is_the_synchronous_algorithm_whatever_the_policy(documents: list[Document], tmp_path: Path) -> None:
    kinds = [{"mode": "exact"}, {"lag_rule": "in_order"}]
    runs = [
        play(settings(max_lag=0, **kind), tmp_path / f"{kind}-{seed}.jsonl", documents, delays=seed, num_workers=seed)
        for kind in kinds
        for seed in (1, 3)
    ]
    assert len({run.weights for run in runs}) == 1
    assert runs[0].batches == [[(6 * step + i, 0) for i in range(6)] for step in range(12)]


def test_a_shorter_replay_is_a_prefix(documents: list[Document], tmp_path: Path) -> None:
    config = settings(max_lag=2)
    live = play(config, tmp_path / "live.jsonl", documents, delays=1)
    learner = config.learner.model_copy(update={"num_steps": 5})
    short = config.model_copy(update={"replay": str(tmp_path / "live.jsonl"), "learner": learner})
    assert play(short, tmp_path / "short.jsonl", documents, delays=9).batches == live.batches[:5]
    needed = {ticket for batch in live.batches[:5] for ticket, _ in batch}
    sampled = [{ticket.ticket_id for ticket in r.tickets} for r in read_recording(tmp_path / "live.jsonl").requests]
    again = read_recording(tmp_path / "short.jsonl")
    assert {ticket.ticket_id for request in again.requests for ticket in request.tickets} == set().union(
        *(request for request in sampled if request & needed)
    )
    assert again.batches == live.batches[:5]


def test_a_replay_that_computes_something_else_ends_at_the_first_difference(
    documents: list[Document], tmp_path: Path
) -> None:
    config = settings(max_lag=1)
    log = tmp_path / "live.jsonl"
    play(config, log, documents, delays=1)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        if row["event"] == "published" and row["version"] == 4:
            row["weights"] = "0" * 32
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RuntimeError, match=r"weights of version 4 differ .* logged 0{32}"):
        play(config.model_copy(update={"replay": str(log)}), tmp_path / "again.jsonl", documents, delays=2)


def test_a_log_of_another_configuration_is_refused_with_both_values(documents: list[Document], tmp_path: Path) -> None:
    play(settings(max_lag=1), tmp_path / "live.jsonl", documents, delays=1)
    recording = read_recording(tmp_path / "live.jsonl")
    with pytest.raises(ValueError, match=r"asynchrony.max_lag=2 \(logged: 1\)"):
        require_same_configuration(recording, settings(max_lag=2))
    more = settings(max_lag=1).model_copy(update={"learner": settings().learner.model_copy(update={"num_steps": 13})})
    with pytest.raises(ValueError, match=r"holds 12 steps, learner\.num_steps=13"):
        require_same_configuration(recording, more)
    rows = [json.loads(line) for line in (tmp_path / "live.jsonl").read_text().splitlines()]
    del rows[0]["config"]["asynchrony"]["max_uses"]
    (tmp_path / "older.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"asynchrony\.max_uses=1 \(logged: None\)"):
        require_same_configuration(read_recording(tmp_path / "older.jsonl"), settings(max_lag=1))
    elsewhere = settings(max_lag=1).model_copy(
        update={"logging": settings().logging.model_copy(update={"output_dir": "/elsewhere"})}
    )
    require_same_configuration(recording, elsewhere)


def test_a_replay_of_fewer_steps_keeps_the_warm_up(documents: list[Document], tmp_path: Path) -> None:
    """Of 12 steps 0.2 are a warm-up of 3; of 5 they would be 1, and every learning rate another."""

    def with_learner(**learner: object) -> RunConfig:
        config = settings(max_lag=1)
        return config.model_copy(update={"learner": config.learner.model_copy(update=learner)})

    play(with_learner(warmup_frac=0.2), tmp_path / "live.jsonl", documents, delays=1)
    recording = read_recording(tmp_path / "live.jsonl")
    with pytest.raises(ValueError, match=r"=5 is a warm-up of 1 steps \(logged: 3\); set .*frac=0\.5 for") as refusal:
        require_same_configuration(recording, with_learner(warmup_frac=0.2, num_steps=5))
    assert "learner.warmup_frac=0.2 of learner.num_steps=5" in str(refusal.value)
    for same in ({"warmup_frac": 0.5, "num_steps": 5}, {"warmup_frac": 2.5, "num_steps": 1}, {"warmup_frac": 0.25}):
        require_same_configuration(recording, with_learner(**same))


def test_a_setting_that_is_infinite_is_logged_as_json_and_replays(documents: list[Document], tmp_path: Path) -> None:
    open_ended = {"max_importance_weight": math.inf, "ratio_bounds": (0.5, math.inf)}
    config = settings(max_lag=1)
    config = config.model_copy(update={"learner": config.learner.model_copy(update=open_ended)})
    log = tmp_path / "live.jsonl"
    play(config, log, documents, delays=1)
    assert "Infinity" not in log.read_text()
    require_same_configuration(read_recording(log), config)
    with pytest.raises(ValueError, match=r"learner\.max_importance_weight=2\.0 \(logged: None\)"):
        require_same_configuration(read_recording(log), settings(max_lag=1))


def test_documents_that_are_gone_are_named(documents: list[Document], tmp_path: Path) -> None:
    config = settings(max_lag=1)
    play(config, tmp_path / "live.jsonl", documents, delays=1)
    again = config.model_copy(update={"replay": str(tmp_path / "live.jsonl")})
    with pytest.raises(ValueError, match="names 1 documents that the data does not hold, such as 'train/3'"):
        play(again, tmp_path / "again.jsonl", [d for d in documents if d.document_id != "train/3"], delays=1)


def test_weights_that_arrived_during_a_request_are_loaded_at_the_same_steps(
    documents: list[Document], tmp_path: Path
) -> None:
    config = settings(max_lag=3, in_flight_updates="keep")
    live = play(config, tmp_path / "live.jsonl", documents, delays=1)
    logged = read_recording(tmp_path / "live.jsonl")
    assert {len(r.weight_steps) for r in logged.requests} > {1, 2}, "no request saw several updates"
    again = config.model_copy(update={"replay": str(tmp_path / "live.jsonl")})
    assert play(again, tmp_path / "again.jsonl", documents, delays=2, num_workers=2).weights == live.weights
    # The log of the replay says the same, so it can be replayed in turn.
    relogged = read_recording(tmp_path / "again.jsonl")
    assert (relogged.requests, relogged.batches) == (logged.requests, logged.batches)


@pytest.fixture
def buffer(documents: list[Document]) -> ReplayBuffer[str]:
    """Three requests: the first is needed last, the second saw versions 3 and 1, the third has a ticket of no use."""

    def request(number: int, tickets: dict[int, int], weight_steps: WeightSteps) -> LoggedRequest:
        names = {ticket_id: documents[ticket_id].document_id for ticket_id in tickets}
        logged = [LoggedTicket(ticket_id, names[ticket_id], version) for ticket_id, version in tickets.items()]
        return LoggedRequest(number, logged, weight_steps)

    requests = [
        request(0, {0: 0}, ((0, 0),)),
        request(1, {1: 1, 2: 3}, ((0, 3), (4, 1))),
        request(2, {3: 1, 4: 1}, ((0, 1),)),
    ]
    recording = Recording(
        path=Path("events.jsonl"),
        config={},
        requests=requests,
        batches=[[(3, 0), (1, 0)], [(3, 1), (2, 0)], [(0, 0), (2, 1)]],
        digests={},
    )
    return ReplayBuffer(recording, documents, num_steps=3, completions_per_context=2, seed=0)


def test_what_a_replay_hands_out_and_when(buffer: ReplayBuffer[str]) -> None:
    """Those that are needed first, once their newest weights are published; nothing older is discarded meanwhile."""

    async def claimed() -> list[int]:
        return [ticket.ticket_id for ticket in await asyncio.wait_for(buffer.claim(1), timeout=1.0)]

    async def scenario() -> None:
        assert (buffer.num_alive, buffer.oldest_wanted_version) == (0, 0)
        assert await claimed() == [0]
        await buffer.advance(1)
        assert await claimed() == [3, 4]
        assert (buffer.num_alive, buffer.oldest_wanted_version) == (3, 0)
        await buffer.advance(2)
        with pytest.raises(TimeoutError):
            await claimed()
        await buffer.advance(3)
        assert await claimed() == [1, 2]
        assert await claimed() == []

    run_in_virtual_time(scenario())


def test_what_a_replay_holds_and_how_old_it_says_it_is(buffer: ReplayBuffer[str]) -> None:
    async def scenario() -> None:
        await buffer.advance(3)
        tickets = {t.ticket_id: t for _ in range(3) for t in await buffer.claim(1)}
        assert list(tickets) == [1, 2, 3, 4, 0]
        assert [ticket.min_policy_version for ticket in tickets.values()] == [3, 3, 1, 1, 0]
        versions = {0: 0, 1: 1, 2: 3, 3: 1, 4: 1}
        for ticket_id, ticket in tickets.items():
            steps = ticket.weight_steps
            await finish(buffer, ticket, str(ticket_id), version=versions[ticket_id], weight_steps=steps)
        with pytest.raises(RuntimeError, match="ticket 0 was not being sampled"):
            await finish(buffer, tickets[0], "again")
        assert (buffer.num_alive, buffer.num_scored, buffer.oldest_wanted_version) == (4, 4, 3)
        lags = [[(use.payload, use.lag.in_queue, use.lag.reuse) for use in await buffer.take()] for _ in range(3)]
        assert lags == [[("3", -1, 0), ("1", -1, 0)], [("3", -1, 1), ("2", -2, 0)], [("0", 2, 0), ("2", -2, 1)]]
        assert (buffer.num_alive, buffer.num_dropped, buffer.num_expired) == (0, 0, 0)

    run_in_virtual_time(scenario())


def test_a_replay_whose_request_saw_other_weights_ends(documents: list[Document], tmp_path: Path) -> None:
    """Such as a plan for an engine step that the request no longer reaches."""
    config = settings(max_lag=2, in_flight_updates="keep")
    log = tmp_path / "live.jsonl"
    play(config, log, documents, delays=1)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    row = next(row for row in rows if row["event"] == "sampled" and len(row["weights"]) == 2)
    for same in (r for r in rows if r["event"] == "sampled" and r["request"] == row["request"]):
        same["weights"][1][0] = STEPS + 3
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = rf"request of ticket {row['ticket']} saw weights at .* the log says .*\({STEPS + 3}, "
    with pytest.raises(RuntimeError, match=message):
        play(config.model_copy(update={"replay": str(log)}), tmp_path / "again.jsonl", documents, delays=2)


@pytest.mark.parametrize(("text", "reason"), [("", "not the log of a run"), ('{"event": "tr', "row 1 is not JSON")])
def test_files_that_are_no_logs_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_recording(path)
