"""The table of metrics, the rows that are written, and what a person sees of them."""

import io
import json
import logging
import math
import re
import sys
from pathlib import Path

import pytest

from orchestration.config import LoggingConfig, RunConfig
from orchestration.output.metrics import METRICS, JsonLines, MetricsLog, WandbSink, metrics_page
from orchestration.output.progress import SHOWN, ProgressDisplay, headline

Row = dict[str, float]


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed = False

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def test_table_is_complete() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", name), name
        assert metric.meaning, name
        assert metric.reduction in ("mean", "sum", "max", "last"), name
        last_part = name.rsplit("/", 1)[-1]
        if last_part in ("mean", "max"):
            assert metric.reduction == last_part, f"{name} says {last_part}"
    assert set(SHOWN) <= set(METRICS)


def test_page_of_the_documentation_shows_the_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics_page(), "run: python -m orchestration.output.metrics > docs/metrics.md"
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == list(METRICS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("score/score_s", 2.0),
        ("rollout/tokens", 6.0),
        ("weights/pause_s", 3.0),
        ("time/step_s", 2.0),
    ],
)
def test_values_between_two_rows_are_reduced_as_the_table_says(name: str, expected: float) -> None:
    sink = Rows()
    log = MetricsLog([sink])
    for value in (1.0, 3.0, 2.0):
        log.observe(name, value)
    log.log_step(1, {})
    assert sink.rows[0][name] == expected


def test_counts_add_up() -> None:
    sink = Rows()
    log = MetricsLog([sink])
    log.observe("rollout/tokens", 5)
    log.observe("rollout/tokens", 7)
    log.log_step(1, {})
    assert sink.rows[0]["rollout/tokens"] == 12


def test_each_row_starts_afresh() -> None:
    sink = Rows()
    times = iter([100.0, 102.5, 110.0])
    log = MetricsLog([sink], clock=lambda: next(times))
    log.observe("rollout/tokens", 5)
    log.observe("weights/pause_s", 9)
    log.log_step(1, {"lag/max": 2})
    log.observe("rollout/tokens", 1)
    log.log_step(2, {"loss/cross_entropy": 3.5})
    assert sink.rows == [
        {"rollout/tokens": 5, "weights/pause_s": 9, "lag/max": 2, "step": 1, "time/elapsed_s": 2.5},
        {"rollout/tokens": 1, "loss/cross_entropy": 3.5, "step": 2, "time/elapsed_s": 10.0},
    ]


def test_an_evaluation_takes_nothing_from_the_steps_beside_it() -> None:
    """Workers sample while it runs: their tokens are those of the step that follows, or of a row at the end."""
    sink = Rows()
    log = MetricsLog([sink], clock=lambda: 1.0)
    with log:
        log.observe("rollout/tokens", 5)
        log.log_evaluation(0, {"eval/seconds": 9.0})
        log.observe("rollout/tokens", 2)
        log.log_step(1, {"lag/max": 3})
        log.observe("rollout/tokens", 4)
        log.observe("weights/probe_error", 0.5)
        log.log_evaluation(1, {"eval/seconds": 8.0})
    assert sink.rows == [
        {"eval/seconds": 9.0, "step": 0, "time/elapsed_s": 0.0},
        {"rollout/tokens": 7, "lag/max": 3, "step": 1, "time/elapsed_s": 0.0},
        {"eval/seconds": 8.0, "step": 1, "time/elapsed_s": 0.0},
        {"rollout/tokens": 4, "weights/probe_error": 0.5, "step": 1, "time/elapsed_s": 0.0},
    ]
    assert sink.closed
    with pytest.raises(KeyError, match="'eval/second' is not in the table"):
        log.log_evaluation(1, {"eval/second": 1.0})


def test_every_sink_gets_every_row_and_is_closed() -> None:
    sinks = [Rows(), Rows()]
    with MetricsLog(sinks) as log:
        log.log_step(3, {"eval/cfm_loss": 0.5})
        assert sinks[0].rows == sinks[1].rows
        assert sinks[0].rows[0]["eval/cfm_loss"] == 0.5
        assert not any(sink.closed for sink in sinks)
    assert all(sink.closed for sink in sinks)


def test_what_was_left_is_not_written_after_an_error() -> None:
    """Where a disk is full, that would fail as well, and hide what ended the run."""
    sink = Rows()
    with pytest.raises(OSError, match="the checkpoint was saved elsewhere"), MetricsLog([sink]) as log:
        log.observe("rollout/tokens", 5)
        raise OSError("the checkpoint was saved elsewhere")
    assert (sink.rows, sink.closed) == ([], True)


def test_a_name_that_is_not_in_the_table_is_an_error() -> None:
    log = MetricsLog([])
    for write in (
        lambda: log.observe("rollout/token", 1),
        lambda: log.observe("rollout/token", 1),
        lambda: log.log_step(1, {"rollout/token": 1}),
    ):
        with pytest.raises(KeyError, match=r"'rollout/token' is not in the table of orchestration/output/metrics\.py"):
            write()


def test_rows_are_on_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    log = MetricsLog([JsonLines(path)])
    for step in (1, 2):
        log.log_step(step, {"optim/grad_norm": 0.1 * step})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(step + 1)), "rows of an earlier part are kept"
        assert rows[-1]["optim/grad_norm"] == 0.1 * step


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog([JsonLines(path)])
    log.log_step(1, {"optim/grad_norm": math.inf, "loss/cross_entropy": math.nan, "lag/max": 2})
    log.log_evaluation(1, {"eval/cfm_loss": -math.inf})
    events = JsonLines(path)
    events.write({"nested": {"weights": (1, -math.inf)}, "names": ["inf", None], "num": 3, "is": True})
    step, evaluation, event = (
        json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()
    )
    assert (step["optim/grad_norm"], step["loss/cross_entropy"], step["lag/max"]) == (None, None, 2)
    assert evaluation["eval/cfm_loss"] is None
    assert event == {"nested": {"weights": [1, None]}, "names": ["inf", None], "num": 3, "is": True}


def test_a_full_disk_is_reported_with_the_file() -> None:
    with pytest.raises(OSError, match=r"cannot write metrics: No space left.*'/dev/full'"):
        MetricsLog([JsonLines(Path("/dev/full"))]).log_step(1, {})


def test_headline_shows_the_telling_numbers_of_a_row() -> None:
    row = {
        "time/step_s": 2.0,
        "rollout/tokens": 300.0,
        "loss/cross_entropy": 1.23456,
        "reward/total/mean": 0.5,
        "optim/learning_rate": 0.1,
    }
    assert headline(row) == "CE 1.235  reward +0.5000  step s 2.0  150 tok/s"
    assert headline({"time/step_s": 0.0, "rollout/tokens": 300.0}) == "step s 0.0"


def test_outside_of_a_terminal_each_step_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), ProgressDisplay(7) as display:
        display.write({"step": 3, "time/step_s": 2.0, "loss/cross_entropy": 1.5})
        display.write({"step": 3, "eval/cross_entropy": 1.4})
    assert [record.getMessage() for record in caplog.records] == ["step 3/7  CE 1.500  step s 2.0"]
    assert "".join(capsys.readouterr()) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_display_is_live_and_leaves_stdout_alone(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with caplog.at_level(logging.INFO), ProgressDisplay(7) as display:
        display.write({"step": 3, "time/step_s": 2.0, "loss/cross_entropy": 1.5})
    assert "step 3/7" in terminal.getvalue()
    assert "CE 1.500" in terminal.getvalue()
    assert caplog.records == []
    assert capsys.readouterr().out == ""


@pytest.mark.engine
def test_wandb_offline_keeps_the_rows_in_the_run_folder(tmp_path: Path) -> None:
    config = RunConfig(logging=LoggingConfig(wandb="offline"))
    sink = WandbSink(config, tmp_path, run_id="0123abcd")
    sink.write({"step": 1.0, "time/step_s": 2.0})
    sink.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 0
