"""Where a run's folder lies, and which folders are refused before anything starts."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from orchestration.config import LoggingConfig, RunConfig
from orchestration.output.run_folder import NEEDED_BYTES, make_run_folder, remove_without_results


def make(output_dir: Path | str, run_name: str | None = "first") -> Path:
    return make_run_folder(RunConfig(logging=LoggingConfig(output_dir=str(output_dir), run_name=run_name)))


def test_a_folder_is_made_with_its_parents_and_can_be_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b" / "first"
    assert (folder / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("name", ["../escaped", "/tmp/elsewhere", "a/b", "..", ".", "", "name/"])
def test_a_name_that_leads_out_of_the_output_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"run_name='.*' must be the name of a folder, without a path"):
        LoggingConfig(run_name=name)


def test_a_run_without_a_name_is_named_after_its_start(tmp_path: Path) -> None:
    folder = make(tmp_path, run_name=None)
    assert folder.parent == tmp_path
    assert folder.name.replace("-", "").isdigit()


def test_an_earlier_run_is_never_overwritten(tmp_path: Path) -> None:
    earlier = make(tmp_path)
    (earlier / "metrics.jsonl").write_text("kept\n")
    with pytest.raises(FileExistsError, match=r"first exists; choose another logging\.run_name"):
        make(tmp_path)
    assert (earlier / "metrics.jsonl").read_text() == "kept\n"


@pytest.mark.parametrize("parent", ["file", "file/below", "/proc/async-ebft"])
def test_a_place_that_cannot_be_written_is_named(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / parent  # an absolute path stays itself
    with pytest.raises(OSError, match=r"logging\.output_dir must be a folder") as refusal:
        make(place)
    assert str(place / "first") in str(refusal.value)
    assert not isinstance(refusal.value, FileExistsError)


def test_a_nearly_full_disk_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=NEEDED_BYTES))
    make(tmp_path, "enough")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * 2**20))
    with pytest.raises(OSError, match=r"only 3 MiB are free for .*/too-little, a run needs 64;"):
        make(tmp_path, "too-little")
    assert not (tmp_path / "too-little").exists(), "its name is free again"


def test_a_folder_without_results_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "config.toml").write_text("seed = 0\n")
    (folder / "events.jsonl").touch()
    remove_without_results(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint/model.safetensors", "summary.json"])
def test_a_folder_with_a_result_is_kept(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("kept\n")
    remove_without_results(folder)
    assert (folder / name).read_text() == "kept\n"


def test_relative_outputs_of_an_unpacked_job_go_to_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray deletes the folder that it unpacked a job into."""
    unpacked = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    unpacked.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(unpacked)
    assert make("outputs") == tmp_path / "home" / "async-ebft" / "outputs" / "first"
    assert make(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "first"
    assert make("~/mine") == tmp_path / "home" / "mine" / "first"
    assert list(unpacked.iterdir()) == []


def test_relative_outputs_of_other_runs_stay_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make("outputs")
    assert folder == tmp_path / "outputs" / "first"
    assert folder.is_absolute(), "a worker may have another working directory"
