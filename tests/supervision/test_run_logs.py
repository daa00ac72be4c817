"""Metrics and event log of a run that goes on from a checkpoint: as if what followed it had never been written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_states import make_buffer, run_state

from actors.rollout import Document
from orchestration.config import RunConfig
from orchestration.output.metrics import JsonLines, MetricsLog
from orchestration.run_logs import Logs, open_logs
from orchestration.supervision.run_state import Resumed

CONFIG = RunConfig.model_validate({"placement": {"one_process": True}})
Row = dict[str, float]


def do_steps(logs: Logs, first: int, last: int) -> None:
    """Each is a row of the metrics and two of the events."""
    for step in range(first, last + 1):
        logs.events.write({"event": "trained", "step": step})
        logs.metrics.observe("rollout/tokens", 100.0 * step)
        logs.metrics.log_step(step, {"loss/cross_entropy": 1 / step})
        logs.events.write({"event": "published", "version": step})


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def checkpoint_of(tmp_path: Path, make_document: Callable[[int], Document]) -> Callable[[Logs, int], Resumed]:
    buffer, _ = make_buffer([make_document(0)]).state()

    def checkpoint_of(logs: Logs, step: int) -> Resumed:
        state = replace(
            run_state(replace(buffer, step=step)),
            events_bytes=logs.events.size,
            metrics_bytes=logs.rows.size,
            elapsed_s=logs.metrics.elapsed_s,
            wandb_id=logs.wandb_id,
        )
        return Resumed(tmp_path / f"step-{step:06}", state, [])

    return checkpoint_of


CheckpointOf = Callable[[Logs, int], Resumed]


def test_a_job_goes_on_from_the_rows_of_its_checkpoint(tmp_path: Path, checkpoint_of: CheckpointOf) -> None:
    with open_logs(CONFIG, tmp_path, None) as logs:
        do_steps(logs, 1, 5)
        checkpoint = checkpoint_of(logs, 5)
        kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
        assert [len(data) for data in kept.values()] == [checkpoint.state.metrics_bytes, checkpoint.state.events_bytes]
        do_steps(logs, 6, 9)
        logs.events.write({"event": "claimed"})
        logs.metrics.observe("rollout/tokens", 7.0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "trai')  # the process was killed while it wrote
    with open_logs(CONFIG, tmp_path, checkpoint) as logs:
        assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
        assert logs.wandb_id == checkpoint.state.wandb_id
        do_steps(logs, 6, 7)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["rollout/tokens"] for row in rows(tmp_path / "metrics.jsonl")] == [100.0 * n for n in range(1, 8)]
    assert [row.get("step") for row in rows(tmp_path / "events.jsonl")[::2]] == [1, 2, 3, 4, 5, 6, 7]


def test_another_life_of_the_learner_begins_anew_without_a_checkpoint(tmp_path: Path) -> None:
    with open_logs(CONFIG, tmp_path, None) as logs:
        do_steps(logs, 1, 3)
        logs.metrics.observe("rollout/tokens", 7.0)
        logs.rewind(None)
        assert (logs.rows.size, logs.events.size) == (0, 0)
        do_steps(logs, 1, 2)
    assert [(row["step"], row["rollout/tokens"]) for row in rows(tmp_path / "metrics.jsonl")] == [(1, 100), (2, 200)]


def test_a_run_that_begins_again_overwrites_what_a_killed_one_left(tmp_path: Path) -> None:
    for last in (4, 2):
        with open_logs(CONFIG, tmp_path, None) as logs:
            do_steps(logs, 1, last)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_left_at_the_end_is_of_the_step_that_the_run_goes_on_from(
    tmp_path: Path, checkpoint_of: CheckpointOf
) -> None:
    """Stopped again before its first step."""
    with open_logs(CONFIG, tmp_path, None) as logs:
        do_steps(logs, 1, 5)
        checkpoint = checkpoint_of(logs, 5)
    with open_logs(CONFIG, tmp_path, checkpoint) as logs:
        logs.metrics.observe("weights/publish_s", 0.5)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_log_that_lacks_rows_of_the_checkpoint_is_refused(
    name: str, tmp_path: Path, checkpoint_of: CheckpointOf
) -> None:
    with open_logs(CONFIG, tmp_path, None) as logs:
        do_steps(logs, 1, 5)
        checkpoint = checkpoint_of(logs, 5)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1])
    expected = rf"{name} has {len(whole) - 1} bytes, at the checkpoint it had {len(whole)}: rows were removed"
    with pytest.raises(ValueError, match=expected), open_logs(CONFIG, tmp_path, checkpoint):
        pass
    assert (tmp_path / name).read_bytes() == whole[:-1]


def test_rows_are_written_behind_those_that_were_kept(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "rows.jsonl")
    sizes = [0]
    for number in range(5):
        lines.write({"row": number, "text": "x" * number})
        sizes.append(lines.size)
    assert sizes[-1] == (tmp_path / "rows.jsonl").stat().st_size
    for kept in (4, 2, 2, 0):
        lines.rewind(sizes[kept])
        assert (lines.size, [row["row"] for row in rows(tmp_path / "rows.jsonl")]) == (sizes[kept], list(range(kept)))
        lines.write({"row": -1})
        assert [row["row"] for row in rows(tmp_path / "rows.jsonl")] == [*range(kept), -1]
    lines.close()


def test_elapsed_time_goes_on() -> None:
    now = [1000.0]
    written: list[Row] = []

    class Kept:
        def write(self, row: Row) -> None:
            written.append(row)

        def close(self) -> None:
            pass

    with MetricsLog([Kept()], clock=lambda: now[0], elapsed_s=50.0) as metrics:
        now[0] = 1003.0
        assert metrics.elapsed_s == 53.0
        metrics.log_step(1, {"time/step_s": 1.0})
        metrics.rewind(0)
        now[0] = 1004.0
        metrics.log_step(1, {"time/step_s": 2.0})
    assert [row["time/elapsed_s"] for row in written] == [53.0, 54.0]


def test_elapsed_time_of_a_checkpoint_is_that_of_all_jobs(tmp_path: Path, checkpoint_of: CheckpointOf) -> None:
    with open_logs(CONFIG, tmp_path, None) as logs:
        do_steps(logs, 1, 1)
        first = checkpoint_of(logs, 1)
    later = Resumed(first.checkpoint, replace(first.state, elapsed_s=5000.0), [])
    with open_logs(CONFIG, tmp_path, later) as logs:
        do_steps(logs, 2, 2)
        assert checkpoint_of(logs, 2).state.elapsed_s >= 5000.0
    assert rows(tmp_path / "metrics.jsonl")[1]["time/elapsed_s"] >= 5000.0
