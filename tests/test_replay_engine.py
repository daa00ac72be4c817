"""Real runs that must be equal bit for bit: several processes against one, live against replay, asynchronous at lag 0
against synchronous.

Each pair compares the digests of all published weights. The runs of one process make one call after the other, so
nothing of the timing of the first is repeated in the second; and their weights never leave the process, while those of
the first travel by memory that the worker maps, or through a channel.
"""

import json
import os
from pathlib import Path

import pytest
from own_cluster import SMOKE, own_environment, run, run_command

from actors.weights.shared_memory import SHARED_FOLDER
from orchestration.buffer.event_log import read_recording

pytestmark = pytest.mark.engine

SETTINGS = (SMOKE, "--learner.num-steps", "5", "--evaluation.documents", "0", "--learner.learning-rate", "1e-3")


def published(folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """(version, digest) of everything that a run with these arguments publishes."""
    command = run_command(
        *SETTINGS, *arguments, "--logging.output-dir", str(folder.parent), "--logging.run-name", folder.name
    )
    finished = run(command, environment=own_environment(), timeout_s=400)
    assert finished.returncode == 0, finished.output
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(row["version"], row["weights"]) for row in rows if row["event"] == "published"]


def shared_memory() -> set[str]:
    """Names of what processes of torch share now."""
    return {name for name in os.listdir(SHARED_FOLDER) if name.startswith("torch_")}


def test_a_live_run_equals_its_replay_in_one_process(tmp_path: Path) -> None:
    """Rollouts are used twice; sampling, of 48 tokens each, is slower than training, so updates fall into requests."""
    settings = ("--asynchrony.max-lag", "2", "--asynchrony.max-uses", "2", "--rollout.in-flight-updates", "keep")
    settings += ("--data.document-tokens", "72", "--data.horizon", "48", "--data.stride", "16")
    settings += ("--learner.whitening", "none", "--learner.num-steps", "7")
    before = shared_memory()
    live = published(tmp_path / "live", *settings, "--asynchrony.weight-transport", "ipc")
    assert shared_memory() <= before
    log = tmp_path / "live" / "events.jsonl"
    again = published(tmp_path / "again", *settings, "--placement.one-process", "True", "--replay", str(log))
    assert [version for version, _ in live] == list(range(8))
    assert len({digest for _, digest in live}) == 8, "some step changed nothing"
    logged, relogged = read_recording(log), read_recording(tmp_path / "again" / "events.jsonl")
    assert any(len(request.weight_steps) > 1 for request in logged.requests), "no update fell into a request"
    assert (again, relogged.requests, relogged.batches) == (live, logged.requests, logged.batches)


@pytest.mark.parametrize(
    ("asynchrony", "transport", "lags"),
    [
        (("--asynchrony.max-lag", "0"), "object_store", [0, 0, 0]),
        (("--asynchrony.mode", "exact", "--asynchrony.max-lag", "1"), "gloo", [0, 1, 1]),
    ],
    ids=["synchronous", "exact"],
)
def test_a_known_lag_gives_equal_weights_in_one_process(
    asynchrony: tuple[str, ...], transport: str, lags: list[int], tmp_path: Path
) -> None:
    asynchrony = (*asynchrony, "--learner.num-steps", "3")
    first = published(tmp_path / "first", *asynchrony, "--asynchrony.weight-transport", transport)
    second = published(tmp_path / "second", *asynchrony, "--placement.one-process", "True")
    assert len(first) == 4 and first == second
    rows = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lag/max" in row]
    assert [row["lag/mean"] for row in steps] == [row["lag/max"] for row in steps] == lags
