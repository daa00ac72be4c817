"""Real runs that must be equal bit for bit: several processes against one, live against replay, asynchronous at lag 0
against synchronous.

Each pair compares the digests of all published weights. The runs of one process make one call after the other, so
nothing of the timing of the first is repeated in the second; and their weights never leave the process, while those of
the first travel by memory that the worker maps, or through a channel.
"""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from own_cluster import SMOKE, OwnCluster
from whole_runs import EXACT, LARGE_STEPS, SYNCHRONOUS, WholeRun, few_texts, one_process_run, run_on, succeeded

from actors.weights.shared_memory import SHARED_FOLDER
from orchestration.buffer.event_log import read_recording

pytestmark = pytest.mark.engine

NUM_STEPS = 10


def left_in_shared_memory() -> set[str]:
    """Names of what processes of torch shared and did not free before they ended."""
    names = {name for name in os.listdir(SHARED_FOLDER) if name.startswith("torch_")}
    return {name for name in names if not psutil.pid_exists(int(name.split("_")[1]))}


def test_a_live_run_equals_its_replay_in_one_process(cluster: OwnCluster, tmp_path: Path) -> None:
    """Rollouts are used twice. The worker may run far ahead, so it samples without a pause during the first steps, and
    their updates fall into requests, whichever of the two is faster."""
    settings = (SMOKE, *LARGE_STEPS, "--evaluation.documents", "0", "--learner.num-steps", str(NUM_STEPS))
    settings += ("--asynchrony.max-lag", "8", "--asynchrony.max-uses", "2", "--rollout.in-flight-updates", "keep")
    settings += ("--data.document-tokens", "104", "--data.horizon", "96", "--data.stride", "16")
    settings += ("--learner.whitening", "none", *few_texts(tmp_path))
    before = left_in_shared_memory()
    live = succeeded(run_on(cluster, tmp_path / "live", *settings, "--asynchrony.weight-transport", "ipc"))
    assert left_in_shared_memory() <= before
    log = live.folder / "events.jsonl"
    again = succeeded(one_process_run(tmp_path / "again", *settings, "--replay", str(log)))
    assert [version for version, _ in live.published] == list(range(NUM_STEPS + 1))
    assert len({digest for _, digest in live.published}) == NUM_STEPS + 1, "some step changed nothing"
    logged, relogged = read_recording(log), read_recording(again.folder / "events.jsonl")
    assert any(len(request.weight_steps) > 1 for request in logged.requests), "no update fell into a request"
    assert (again.published, relogged.requests, relogged.batches) == (live.published, logged.requests, logged.batches)


@pytest.mark.parametrize(
    ("settings", "lags"), [(SYNCHRONOUS, [0, 0, 0]), (EXACT, [0, 1, 1])], ids=["synchronous", "exact"]
)
def test_a_known_lag_gives_equal_weights_in_one_process(
    settings: tuple[str, ...],
    lags: list[int],
    submitted: Callable[[bool], WholeRun],
    without_cluster: WholeRun,
    tmp_path: Path,
) -> None:
    """Weights travel through the object store, or through a channel, and stay where they are in one process."""
    first = succeeded(without_cluster if settings == SYNCHRONOUS else submitted(False))
    second = succeeded(one_process_run(tmp_path / "second", *settings, *few_texts(tmp_path)))
    assert len(first.published) == 4 and first.published == second.published
    steps = [row for row in first.rows if "lag/max" in row]
    assert [row["lag/mean"] for row in steps] == [row["lag/max"] for row in steps] == lags
