"""Scaling a real job on a real cluster of two nodes, by the command that users run."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from own_cluster import ROOT, SMOKE, Finished, OwnCluster, kill, run, run_command, wait_for
from warm_process import run_warm
from whole_runs import rows_of

pytestmark = pytest.mark.engine


@pytest.fixture
def two_nodes(cluster: OwnCluster) -> Iterator[OwnCluster]:
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.remove_node()


def scale(cluster: OwnCluster, *arguments: str) -> Finished:
    return run_warm("orchestration/scale.py", *arguments, environment=cluster.environment)


def wait_for_workers(metrics: Path, count: int) -> None:
    def reached() -> bool:
        return any(row.get("rollout/workers") == count for row in rows_of(metrics)[-2:])

    wait_for(reached, timeout_s=200, what=f"{count} rollout workers in {metrics}")


def test_a_job_grows_onto_another_node_and_shrinks_again(two_nodes: OwnCluster, tmp_path: Path) -> None:
    cluster = two_nodes
    place = ("--logging.output-dir", str(tmp_path), "--logging.run-name", "growing")
    forever = ("--learner.num-steps", "100000", "--evaluation.documents", "0", "--asynchrony.weight-transport", "gloo")
    log = (tmp_path / "log").open("w")
    job = psutil.Popen(run_command(SMOKE, *forever, *place), cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)
    metrics = tmp_path / "growing" / "metrics.jsonl"
    try:
        wait_for(lambda: len(rows_of(metrics)) > 2, timeout_s=200, what="the first steps")
        command = [sys.executable, "orchestration/scale.py", "--rollout-workers", "2"]
        grown = run(command, environment=cluster.environment, timeout_s=200)
        assert grown.returncode == 0, grown.output
        assert "rollout worker 1 is up after" in grown.output
        wait_for_workers(metrics, 2)
        wait_for(
            lambda: "rollout worker 1: first rollout trained on" in text(tmp_path), timeout_s=200, what="its rollout"
        )

        # 1 + 0.25 + 0.5 of two CPUs, and the other node's one, are reserved now.
        for arguments, reason in (
            (("--rollout-workers", "4"), r"4 rollout workers were requested, there are 2, and .* room for 0 more"),
            (("--rollout-workers", "0"), r"0 rollout workers were requested, there are 2: a run needs at least one"),
            (("--rollout-workers", "1", "--run", "other"), r"no run 'other' is active .*:/.*/growing"),
            ((), r"nothing to change"),
        ):
            refused = scale(cluster, *arguments)
            assert refused.returncode == 1
            assert re.search(reason, refused.output), refused.output

        shrunk = scale(cluster, "--rollout-workers", "1")
        assert shrunk.returncode == 0, shrunk.output
        assert "rollout worker 1 has left after" in shrunk.output
        wait_for_workers(metrics, 1)
        steps = len(rows_of(metrics))
        wait_for(lambda: len(rows_of(metrics)) > steps + 2, timeout_s=200, what="further steps")
        assert job.poll() is None
        wait_for(
            lambda: sum("RolloutWorker" in line for line in cluster.command_lines()) == 1, timeout_s=60, what="its end"
        )
    finally:
        log.close()
        kill([*job.children(recursive=True), job] if job.is_running() else [])
    cluster.wait_until_empty()


def text(folder: Path) -> str:
    return (folder / "log").read_text()


ATTACKER = """
import os, signal, sys, time
import ray
from orchestration.cluster.control import NAMESPACE, Answer, ScaleRequest
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
(name,) = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
control = ray.get_actor(name, namespace=NAMESPACE)
request = object.__new__(ScaleRequest)
for field, value in (("rollout_workers", "many"), ("feature_servers", None)): object.__setattr__(request, field, value)
for malformed in (None, "2", {"rollout_workers": 2}, request):
    answer = ray.get(control.submit.remote(malformed), timeout=60)
    assert not answer.accepted, answer
ray.get(control.answer.remote(Answer(True, "to nobody")), timeout=60)
if sys.argv[1] == "kill":
    ray.kill(control)
print("attacked")
"""


def test_a_run_outlives_malformed_requests_and_its_control_actor(cluster: OwnCluster, tmp_path: Path) -> None:
    place = ("--logging.output-dir", str(tmp_path), "--logging.run-name", "attacked")
    forever = ("--learner.num-steps", "100000", "--evaluation.documents", "0")
    log = (tmp_path / "log").open("w")
    job = psutil.Popen(run_command(SMOKE, *forever, *place), cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)
    metrics = tmp_path / "attacked" / "metrics.jsonl"

    def more_steps() -> None:
        steps = len(rows_of(metrics))
        wait_for(lambda: len(rows_of(metrics)) > steps + 2, timeout_s=200, what="further steps")

    def attack(how: str) -> None:
        command = [sys.executable, "-c", ATTACKER, how]
        attacked = run(command, environment=cluster.environment | {"PYTHONPATH": str(ROOT)}, timeout_s=100)
        assert attacked.returncode == 0 and "attacked" in attacked.output, attacked.output

    try:
        wait_for(lambda: len(rows_of(metrics)) > 2, timeout_s=200, what="the first steps")
        attack("by requests")
        answered = scale(cluster, "--rollout-workers", "1", "--run", str(tmp_path / "attacked"))
        assert answered.returncode == 0 and "nothing to change" in answered.output, answered.output

        (control,) = [p for p in cluster.processes() if "ControlActor" in p.name()]
        control.kill()
        answered = scale(cluster, "--rollout-workers", "1")
        assert answered.returncode == 0 and "nothing to change" in answered.output, "Ray started another"

        attack("kill")
        wait_for(lambda: "the control actor was lost" in text(tmp_path), timeout_s=60, what="a warning")
        more_steps()
        assert job.poll() is None and text(tmp_path).count("the control actor was lost") == 1
        refused = scale(cluster, "--rollout-workers", "1")
        assert refused.returncode == 1 and "0 runs are active" in refused.output
    finally:
        log.close()
        kill([*job.children(recursive=True), job] if job.is_running() else [])
    cluster.wait_until_empty()
