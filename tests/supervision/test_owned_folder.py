"""One process at a time runs in a folder: a second is refused, harms nothing, and follows when the first has ended."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestration.output.run_folder import LOCK, owned, remove_without_results

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
OWN = """
import sys, time
from pathlib import Path
from orchestration.output.run_folder import owned

with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.readline()
print("left", flush=True)
sys.stdin.readline()
"""
STARTS_ANOTHER = """
import subprocess, sys
from pathlib import Path
from orchestration.output.run_folder import owned

with owned(Path(sys.argv[1])):
    another = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(another.pid, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def running(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def is_owned(folder: Path) -> bool:
    """By a process that locks the file as the manual says, with no code of ours."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_second_process_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    with running(OWN, tmp_path) as first:
        assert first.stdout.readline() == "owned\n" and is_owned(tmp_path)
        with pytest.raises(FileExistsError, match=f"another process is running in {tmp_path}; wait"), owned(tmp_path):
            pytest.fail("there are two")
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "left\n" and not is_owned(tmp_path)
        with owned(tmp_path):
            assert is_owned(tmp_path)


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    with running(OWN, tmp_path) as first:
        assert first.stdout.readline() == "owned\n"
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait(DEADLINE_S) == -signal.SIGKILL
        with owned(tmp_path):
            assert is_owned(tmp_path)


def test_a_process_that_the_killed_one_started_does_not_hold_it(tmp_path: Path) -> None:
    """Ray's processes outlive a driver that is killed, for a while."""
    with running(STARTS_ANOTHER, tmp_path) as first:
        another = int(first.stdout.readline())
        try:
            os.kill(first.pid, signal.SIGKILL)
            first.wait(DEADLINE_S)
            os.kill(another, 0)
            with owned(tmp_path):
                pass
        finally:
            os.kill(another, signal.SIGKILL)


def test_it_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), owned(tmp_path):
        raise KeyboardInterrupt
    assert not is_owned(tmp_path)


def test_two_folders_are_owned_independently(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with owned(tmp_path / "a"), owned(tmp_path / "b"):
        assert is_owned(tmp_path / "a") and is_owned(tmp_path / "b")


def test_the_folder_of_a_run_that_has_no_result_yet_is_not_removed_by_another_that_was_refused(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 0\n")
    (folder / "metrics.jsonl").touch()
    with running(OWN, folder) as first:
        assert first.stdout.readline() == "owned\n"
        with pytest.raises(FileExistsError), owned(folder):
            pass
        remove_without_results(folder)
        assert sorted(path.name for path in folder.iterdir()) == [LOCK, "config.toml", "metrics.jsonl"]
        os.kill(first.pid, signal.SIGKILL)
        first.wait(DEADLINE_S)
        remove_without_results(folder)
    assert not folder.exists()


def test_a_run_that_was_owned_and_has_a_result_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    (folder / "checkpoints" / "step-000010").mkdir(parents=True)
    (folder / "checkpoints" / "step-000010" / "MANIFEST.json").write_text("{}")
    with owned(folder):
        pass
    remove_without_results(folder)
    assert (folder / "checkpoints" / "step-000010" / "MANIFEST.json").exists()
