"""The main job as users start it: `ray job submit` to a cluster, and plain `python` without one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_cluster import BIN, PARTS_OF_A_RUN, SMOKE, OwnCluster, alive, run, wait_for
from transformers import AutoModelForCausalLM
from whole_runs import WholeRun, succeeded

from actors.models.pretrained import EMBEDDED_FOLDER
from orchestration.command_line import load, parse_arguments
from orchestration.config import RunConfig

pytestmark = pytest.mark.engine


def status(cluster: OwnCluster, name: str) -> str:
    command = [str(BIN / "ray"), "job", "status", "--address", cluster.dashboard, name]
    return run(command, environment=cluster.environment, timeout_s=60).output


def check_results(job: WholeRun) -> None:
    """Every file that a run leaves, and what it says."""
    folder = job.folder
    config = load(RunConfig, folder / "config.toml")
    assert config == parse_arguments(job.arguments).without_run_name

    rows = job.rows
    training = [row for row in rows if "time/step_s" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert all(0 <= row["lag/max"] <= config.asynchrony.max_lag for row in training)
    assert max(row["lag/max"] for row in training) == config.asynchrony.max_lag, "no rollout reached the lag bound"
    errors = [row["weights/probe_error"] for row in rows if "weights/probe_error" in row]
    assert errors and max(errors) < 1e-4
    assert [row["step"] for row in rows if "eval/cfm_loss" in row] == [0, 3]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["cross_entropy"]["delta"] != 0
    samples = (folder / "samples.md").read_text()
    assert "policy version 0" in samples and "policy version 3" in samples

    tuned = AutoModelForCausalLM.from_pretrained(folder / "checkpoint").state_dict()
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER).state_dict()
    assert tuned.keys() == base.keys()
    assert all(tensor.isfinite().all() for tensor in tuned.values())
    assert any(not torch.equal(tuned[name], base[name].to(tuned[name].dtype)) for name in base)


@pytest.mark.parametrize("upload", [True, False])
def test_submitted_job_leaves_its_results_and_no_process(
    upload: bool, cluster: OwnCluster, submitted: Callable[[bool], WholeRun]
) -> None:
    job = succeeded(submitted(upload))
    assert job.seen == set(PARTS_OF_A_RUN)
    assert f"'{job.folder.name}' succeeded" in status(cluster, job.folder.name)
    check_results(job)
    cluster.wait_until_empty()


def test_refused_job_has_failed(cluster: OwnCluster, tmp_path: Path) -> None:
    arguments = [SMOKE, "--learner.num-stepz", "3", "--logging.output-dir", str(tmp_path)]
    job = cluster.submit("misspelt", *arguments, upload=True)
    assert job.returncode != 0
    assert "num-stepz" in job.output
    assert "'misspelt' failed" in status(cluster, "misspelt")
    assert not list(tmp_path.iterdir())
    cluster.wait_until_empty()


def test_without_a_cluster_the_run_starts_and_ends_its_own(without_cluster: WholeRun) -> None:
    started = succeeded(without_cluster).finished.started
    check_results(without_cluster)
    assert len(started) > 3, "the run had no process of its own: it joined an existing cluster"
    wait_for(lambda: not alive(started), timeout_s=60, what=lambda: alive(started))
