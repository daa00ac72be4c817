"""Checkpoints against everything that may happen to files: damage, a killed process, a full disk."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestration.checkpoint.store import MANIFEST, CheckpointStore


def write(folder: Path, *, seed: int) -> None:
    """Files of several sizes in a folder and a folder inside it; one is empty."""
    data = random.Random(seed)
    (folder / "learner").mkdir()
    (folder / "empty.json").touch()
    for name, size in (("buffer.safetensors", 5000), ("learner/rank-00000.safetensors", 3000), ("a.json", 40)):
        (folder / name).write_bytes(data.randbytes(size))


def save(store: CheckpointStore, step: int, *, seed: int | None = None, score: float | None = None) -> Path:
    write(store.begin(step), seed=step if seed is None else seed)
    return store.commit(step, score=score)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_committed_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    assert store.newest() is None
    begun = store.begin(10)
    write(begun, seed=1)
    assert names(tmp_path / "checkpoints") == ["step-000010.partial"] and store.newest() is None
    written = content(begun)
    folder = store.commit(10, score=0.5)
    assert folder == tmp_path / "checkpoints" / "step-000010" == store.newest()
    assert content(folder) == written and not begun.exists()
    store.require_whole(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {name: file["size"] for name, file in manifest["files"].items()} == {
        name: len(data) for name, data in written.items()
    }


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([None] * 5, [4, 5]),
        ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
        ([3.0, 1.0, 2.0, 0.5, 5.0], [4, 5]),
        ([3.0, float("nan"), 2.0, None, float("inf")], [3, 4, 5]),
        ([float("-inf"), 1.0, 2.0, None, None], [2, 4, 5]),
    ],
)
def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, scores: list[float | None], kept: list[int]) -> None:
    for step, score in enumerate(scores, start=1):
        # A store of its own each time, as after a resume: nothing is remembered but what is on disk.
        save(CheckpointStore(tmp_path, keep_last=2), step, score=score)
    assert names(tmp_path) == [f"step-{step:06}" for step in kept]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    paths = [save(store, step) for step in (999_999, 1_000_000)]
    assert store.newest() == paths[1]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 10, seed=1)
    folder = save(store, 10, seed=2)
    assert names(tmp_path) == ["step-000010"]
    write(store.begin(99), seed=2)
    assert content(folder) == content(tmp_path / "step-000099.partial")
    store.require_whole(folder)


def test_what_was_begun_and_not_committed_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    write(store.begin(10), seed=1)
    assert list(store.begin(20).iterdir()) == []
    assert names(tmp_path) == ["step-000020.partial"]
    with pytest.raises(RuntimeError, match=r"call begin\(10\) before commit\(10\)"):
        store.commit(10, score=None)


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    for _ in range(2):
        paths = [save(store, step) for step in (10, 20, 30)]
        store.set_aside_after(10)
        assert store.newest() == paths[0]
        assert names(tmp_path) == ["step-000010", "step-000020.abandoned", "step-000030.abandoned"]
    store.set_aside_after(10)
    assert store.newest() == paths[0]


def test_no_last_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        CheckpointStore(tmp_path, keep_last=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointStore, Path, Path]:
    store = CheckpointStore(tmp_path_factory.mktemp("two"), keep_last=2)
    return store, save(store, 10), save(store, 20)


@pytest.mark.parametrize("seed", range(100))
def test_every_flipped_bit_and_every_lost_byte_is_refused_by_name(
    two: tuple[CheckpointStore, Path, Path], seed: int
) -> None:
    (store, earlier, folder), choose = two, random.Random(seed)
    store.require_whole(folder)
    path = choose.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size])
    whole = path.read_bytes()
    data = bytearray(whole)
    if choose.random() < 0.7:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    else:
        del data[choose.randrange(len(data)) :]
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        store.require_whole(folder)
    path.write_bytes(whole)
    assert str(error.value).startswith(f"{path} ") and str(error.value).endswith(f"; resume from {earlier}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.json").unlink(), "a.json is missing; there is no earlier checkpoint; start anew"),
        (lambda folder: (folder / "learner" / "b").touch(), "learner/b is not listed in MANIFEST.json"),
        (lambda folder: (folder / MANIFEST).unlink(), "MANIFEST.json is missing: the checkpoint was never finished"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "MANIFEST.json was changed after it was written"),
        (lambda folder: shutil.rmtree(folder), "MANIFEST.json is missing"),
        (lambda folder: (folder / "a.json").write_bytes(b"x" * 40), "a.json was changed after it was written"),
        (lambda folder: (folder / "a.json").write_bytes(b"x"), "a.json has 1 bytes, it was written with 40"),
    ],
)
def test_what_is_missing_or_added_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    folder = save(store, 10)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        store.require_whole(folder)


def test_a_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    folder = save(store, 10)
    folder.rename(tmp_path / "step-000020")
    with pytest.raises(ValueError, match=r"MANIFEST\.json was changed"):
        store.require_whole(tmp_path / "step-000020")


def test_a_broken_manifest_of_an_old_one_does_not_stop_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    old = save(store, 10, score=0.0)
    (old / MANIFEST).write_text("{")
    save(store, 20, score=1.0)
    assert names(tmp_path) == ["step-000020"]


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which the system is asked, of each file and folder by its inode."""
    store = CheckpointStore(tmp_path, keep_last=2)
    begun = store.begin(10)
    write(begun, seed=1)
    events: list[int | str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(os.fstat(descriptor).st_ino), sync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append(path.name), rename(path, target))[1])
    folder = store.commit(10, score=None)
    renamed = events.index("step-000010.partial")
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= set(events[:renamed])
    assert tmp_path.stat().st_ino in events[renamed:]


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestration.checkpoint import store as module

def save(folder, step, byte):
    store = module.CheckpointStore(folder, keep_last=1)
    begun = store.begin(step)
    for name in ("a", "b"):
        (begun / name).write_bytes(byte * 4000)
    store.commit(step, score=None)

def killed(folder, step, moment):
    "A process saves, and is killed at that line of the store's code. Returns how many lines it got through alive."
    reader, writer = os.pipe()
    if os.fork() == 0:
        lines = 0
        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename != module.__file__:
                return None
            lines += event == "line"
            if lines == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        save(folder, step, b"n")
        sys.settrace(None)
        os.write(writer, str(lines).encode())
        os._exit(0)
    _, status = os.wait()
    os.close(writer)
    assert os.WIFSIGNALED(status) == (moment is not None), (moment, status)
    return int(os.read(reader, 20) or 0)

root, step, moments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
save(root / "calm", 10, b"o")
num_lines = killed(root / "calm", step, None)
for index in range(moments):
    folder = root / f"killed-{index:02}"
    save(folder, 10, b"o")
    killed(folder, step, 1 + index * (num_lines - 1) // (moments - 1))
"""


@pytest.mark.parametrize("step", [10, 20])
def test_a_process_killed_at_any_of_50_moments_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """In the place of one of the same step, or after an older one, which is then removed."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step), "50"]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    old, new = (dict.fromkeys(("a", "b"), byte * 4000) for byte in (b"o", b"n"))
    found = []
    for folder in sorted(tmp_path.glob("killed-*")):
        store = CheckpointStore(folder, keep_last=1)
        newest = store.newest()
        assert newest is not None
        store.require_whole(newest)
        found.append(content(newest))
        save(store, 30, seed=3)
        assert names(folder) == ["step-000030"]
    assert len(found) == 50 and found[0] == old and found[-1] == new
    assert all(one in (old, new) for one in found)
    are_new = [one == new for one in found]
    assert are_new == sorted(are_new)


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Writing further into any file fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full_at", ["files", "manifest"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, full_at: str, step: int) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    older = save(store, 10, seed=1)
    before = content(older)
    folder = store.begin(step)
    with pytest.raises(OSError, match=rf"checkpoint of step {step}: File too large; .*{older} is as it was") as error:
        if full_at == "files":
            with store.writing(step), files_limited_to(2000):
                write(folder, seed=2)
        else:
            write(folder, seed=2)
            with files_limited_to(100):
                store.commit(step, score=None)
    assert error.value.filename == str(tmp_path)
    assert names(tmp_path) == ["step-000010"] and content(older) == before
    store.require_whole(older)
    save(store, step, seed=2)


def test_a_rename_that_fails_gives_the_old_one_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    older = save(store, 10, seed=1)
    before, rename = content(older), Path.rename

    def fails_for_new(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    write(store.begin(10), seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_for_new)
        with pytest.raises(OSError, match="No space left on device"):
            store.commit(10, score=None)
    assert names(tmp_path) == ["step-000010"] and content(older) == before
