"""Input that cannot work: the message names the value, the rule and the remedy, and nothing is left behind."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch
from own_cluster import SMOKE, Finished, OwnCluster, own_environment, run, run_command, wait_for
from transformers import AutoModelForCausalLM
from warm_process import run_warm
from whole_runs import few_texts, one_process_run

from actors.models.pretrained import EMBEDDED_FOLDER
from orchestration.command_line import parse_arguments
from orchestration.output.run_folder import NEEDED_BYTES
from orchestration.session import run_session

MIB = 2**20


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--data.stride", "5"], ["document_tokens=128", "stride=5", "multiple", "127 or 132 would fit"]),
        (
            ["--rollout.completions-per-context", "2"],
            ["learner.diversity_coef=1.0", "completions_per_context >= 3", "got 2", "set learner.diversity_coef=0"],
        ),
        (
            ["--learner.documents-per-step", "7"],
            ["learner.documents_per_step=7", "multiple of", "placement.learner.count=1", "change one of the three"],
        ),
        (["--learner.learning-rate", "-1"], ["learning_rate", "-1.0", "greater than 0"]),
        (["absent.toml"], ["absent.toml", "does not exist", "orchestration/configs/"]),
    ],
)
def test_configuration_is_refused(
    arguments: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as refusal:
        parse_arguments(arguments)
    assert missing(fragments, f"{refusal.value} {capsys.readouterr().err}") == []


def test_misspelt_key_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[learner]\nnum_stepz = 3\n")
    with pytest.raises(
        ValueError, match=r"learner\.num_stepz: there is no such key; the nearest is learner\.num_steps; see --help"
    ):
        parse_arguments([str(path)])


def test_misspelt_flag_is_refused_with_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse_arguments(["--learner.num-stepz", "3"])
    assert refusal.value.code == 2
    assert missing(["--learner.num-stepz", "--learner.num-steps"], capsys.readouterr().err) == []


def test_refused_command_starts_nothing_and_exits_with_2() -> None:
    refused = run(run_command("--data.stride", "5"), environment=own_environment(), timeout_s=120)
    assert refused.returncode == 2
    assert missing(["stride=5", "127 or 132 would fit"], refused.output) == []
    assert "Traceback" not in refused.output
    assert refused.started == []


@pytest.fixture
def refused_before_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], str]:
    """Runs a session that must be refused before Ray starts, and returns what it says."""

    def ray_starts(**_: object) -> None:
        raise AssertionError("Ray was started for a run that cannot work")

    monkeypatch.setattr(ray, "init", ray_starts)

    def refused(arguments: Sequence[str]) -> str:
        assert run_session(parse_arguments(arguments)) == 2
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("role", ["policy", "feature-model"])
def test_model_folder_that_is_not_there(
    role: str, refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path
) -> None:
    folder = tmp_path / "absent-model"
    message = refused_before_ray([f"--model.{role}", str(folder), "--logging.output-dir", str(tmp_path / "out")])
    assert missing(["no model folder at", str(folder), "save_pretrained"], message) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refused_run_leaves_its_name_free(refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    place = ["--logging.output-dir", str(tmp_path), "--logging.run-name", "again"]
    for _ in range(2):
        assert "no model folder at" in refused_before_ray(["--model.policy", str(tmp_path / "absent"), *place])
    events = tmp_path / "absent.jsonl"
    assert str(events) in refused_before_ray(["--replay", str(events), *place])
    assert list(tmp_path.iterdir()) == []


def test_hub_model_that_is_not_there(refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    message = refused_before_ray(["--model.policy", "nobody/nothing", "--logging.output-dir", str(tmp_path / "out")])
    assert missing(["'nobody/nothing'", "HF_HUB_OFFLINE is 1", "Correct the name, or give a folder"], message) == []


def test_output_folder_that_cannot_be_made(refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.touch()
    message = refused_before_ray(["--logging.output-dir", str(obstacle / "out")])
    assert missing([f"{obstacle}/out", "Not a directory", "logging.output_dir must be"], message) == []


def test_run_folder_that_is_taken(refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    message = refused_before_ray(["--logging.output-dir", str(tmp_path), "--logging.run-name", "taken"])
    assert missing([f"{tmp_path}/taken exists", "choose another logging.run_name"], message) == []


def test_nearly_full_disk(refused_before_ray: Callable[[Sequence[str]], str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size=MIB) as disk:
        message = refused_before_ray(["--logging.output-dir", str(disk)])
    assert missing(["MiB are free", str(disk), "a run needs 64", "logging.output_dir"], message) == []


def run_on(cluster: OwnCluster, *arguments: str) -> Finished:
    """A run on the shared cluster; whether it ended well or not, none of its processes may be left."""
    finished = run_warm("orchestration/run.py", SMOKE, *arguments, environment=cluster.environment)
    cluster.wait_until_empty()
    return finished


@pytest.mark.engine
def test_more_workers_than_the_cluster_holds(cluster: OwnCluster, tmp_path: Path) -> None:
    refused = run_on(cluster, "--placement.rollout.count", "3", "--logging.output-dir", str(tmp_path))
    assert refused.returncode != 0
    fragments = ["the 5 processes of this run reserve 3.75 CPUs", "1 node(s) has 2", "lower placement.*.count"]
    assert missing(fragments, refused.output) == []


@pytest.mark.engine
def test_data_file_with_a_broken_row(cluster: OwnCluster, tmp_path: Path) -> None:
    flag, path = few_texts(tmp_path)
    lines = Path(path).read_text().splitlines()
    lines[2] = '{"text": "def'
    Path(path).write_text("\n".join(lines))
    refused = run_on(cluster, flag, path, "--logging.output-dir", str(tmp_path / "out"))
    assert refused.returncode != 0
    assert missing([f"{path}, line 3", "not valid JSON", "--data.skip-broken-rows True"], refused.output) == []
    assert list((tmp_path / "out").iterdir()) == [], "nothing was measured: the run's name is free again"


@pytest.mark.engine
def test_column_that_does_not_exist(cluster: OwnCluster, tmp_path: Path) -> None:
    flag, path = few_texts(tmp_path)
    arguments = [flag, path, "--data.text-column", "content"]
    refused = run_on(cluster, *arguments, "--logging.output-dir", str(tmp_path / "out"))
    assert refused.returncode != 0
    assert missing([f"{path}, line 1", "no column 'content'", "'text'", "--data.text-column"], refused.output) == []


@pytest.mark.engine
def test_an_update_that_destroys_the_policy_ends_the_run_and_nothing_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    settings = (SMOKE, *few_texts(tmp_path), "--evaluation.documents", "0", "--learner.learning-rate", "1e30")
    failed = one_process_run(tmp_path / "destroyed", *settings).finished
    assert failed.returncode == 1, failed.output
    assert re.search(r"step 2: the (loss|gradient's norm) is (nan|inf); the step was not applied", failed.output)
    assert "Traceback" not in failed.output
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "destroyed" / "checkpoint").state_dict()
    assert all(tensor.isfinite().all() for tensor in saved.values())
    for path in (tmp_path / "destroyed").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.engine
@pytest.mark.parametrize("left", [256 * 1024, 0])
def test_disk_that_fills_up_during_a_run(left: int, tmp_path: Path) -> None:
    """From the first step on, `left` bytes are free: enough for metrics but not for weights, or for nothing."""
    rescues = tmp_path / "rescues"
    rescues.mkdir()
    with small_disk(tmp_path / "disk", size=NEEDED_BYTES + 8 * MIB) as disk:
        folder = disk / "full"
        filling = threading.Thread(target=fill_after_first_step, args=(disk, folder / "metrics.jsonl", left))
        filling.start()
        settings = (SMOKE, *few_texts(tmp_path), "--learner.num-steps", "60")
        failed = one_process_run(folder, *settings, TMPDIR=str(rescues)).finished
        filling.join()
        first_rows = (folder / "metrics.jsonl").read_text().splitlines()[:2]
        assert not (folder / "checkpoint").exists()
    assert [json.loads(row)["step"] for row in first_rows] == [0, 1]
    assert failed.returncode == 1, failed.output
    fragments = ["No space left on device", "was saved to", "Free space or change logging.output_dir", str(disk)]
    assert missing(fragments, failed.output) == [], failed.output
    rescued = re.search(r"was saved to\s+(\S+)\s+instead", failed.output)[1]
    assert Path(rescued).is_relative_to(rescues)
    tuned = AutoModelForCausalLM.from_pretrained(rescued).state_dict()
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER).state_dict()
    assert any(not torch.equal(tuned[name], base[name].to(tuned[name].dtype)) for name in base)


def missing(fragments: Sequence[str], message: str) -> list[str]:
    """Those that the message does not contain, wherever it breaks its lines and whatever frames it."""
    flat = " ".join(message.replace("│", " ").split())
    return [fragment for fragment in fragments if fragment not in flat]


@contextmanager
def small_disk(folder: Path, *, size: int) -> Iterator[Path]:
    """A file system of `size` bytes; skips the test where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_after_first_step(disk: Path, metrics: Path, left: int) -> None:
    """Wait until the run has written the metrics of a step, then leave `left` bytes free."""

    def stepped() -> bool:
        return metrics.exists() and "time/step_s" in metrics.read_text()

    wait_for(stepped, timeout_s=300, what="the metrics of a step")
    with (disk / "filler").open("wb", buffering=0) as filler:
        with pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(b"\0" * 4096)
        filler.truncate(filler.tell() - left)
