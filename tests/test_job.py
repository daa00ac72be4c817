"""The main job as users start it: `ray job submit` to a cluster, and plain `python` without one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from own_cluster import (
    BIN,
    PARTS_OF_A_RUN,
    SMOKE,
    Finished,
    OwnCluster,
    alive,
    own_cluster,
    own_environment,
    run,
    run_command,
    wait_for,
)
from transformers import AutoModelForCausalLM

from actors.models.pretrained import EMBEDDED_FOLDER
from orchestration.command_line import load, parse_arguments
from orchestration.config import RunConfig

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def cluster() -> Iterator[OwnCluster]:
    with own_cluster() as cluster:
        yield cluster


def submit(
    cluster: OwnCluster,
    name: str,
    *arguments: str,
    upload: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> Finished:
    """`ray job submit` of this checkout, uploaded or as the cluster's head finds it, followed to the job's end."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--submission-id", name]
    command += ["--working-dir", "."] if upload else []
    command += ["--", "python", "orchestration/run.py", *arguments]
    return run(command, environment=cluster.environment, timeout_s=400, meanwhile=meanwhile)


def status(cluster: OwnCluster, name: str) -> str:
    command = [str(BIN / "ray"), "job", "status", "--address", cluster.dashboard, name]
    return run(command, environment=cluster.environment, timeout_s=60).output


def check_results(folder: Path, *arguments: str) -> None:
    """Every file that a run of these arguments leaves, and what it says."""
    config = load(RunConfig, folder / "config.toml")
    assert config == parse_arguments([*arguments])

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "time/step_s" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert all(0 <= row["lag/max"] <= config.asynchrony.max_lag for row in training)
    assert max(row["lag/max"] for row in training) == 1, "no rollout was older than the weights it trained"
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
def test_submitted_job_leaves_its_results_and_no_process(upload: bool, cluster: OwnCluster, tmp_path: Path) -> None:
    arguments = [SMOKE, "--logging.output-dir", str(tmp_path), "--logging.run-name", "job"]
    name, seen = f"upload-{upload}", set()
    job = submit(cluster, name, *arguments, upload=upload, meanwhile=lambda: seen.update(cluster.parts_running()))
    assert job.returncode == 0, job.output
    assert seen == set(PARTS_OF_A_RUN)
    assert f"'{name}' succeeded" in status(cluster, name)
    check_results(tmp_path / "job", *arguments)
    cluster.wait_until_empty()


def test_refused_job_has_failed(cluster: OwnCluster, tmp_path: Path) -> None:
    arguments = [SMOKE, "--learner.num-stepz", "3", "--logging.output-dir", str(tmp_path)]
    job = submit(cluster, "misspelt", *arguments)
    assert job.returncode != 0
    assert "num-stepz" in job.output
    assert "'misspelt' failed" in status(cluster, "misspelt")
    assert not list(tmp_path.iterdir())
    cluster.wait_until_empty()


def test_without_a_cluster_the_run_starts_and_ends_its_own(tmp_path: Path) -> None:
    arguments = [SMOKE, "--logging.output-dir", str(tmp_path), "--logging.run-name", "local"]
    finished = run(run_command(*arguments), environment=own_environment(), timeout_s=400)
    assert finished.returncode == 0, finished.output
    check_results(tmp_path / "local", *arguments)
    assert len(finished.started) > 3, "the run had no process of its own: it joined somebody's cluster"
    wait_for(lambda: not alive(finished.started), timeout_s=20, what=lambda: alive(finished.started))
