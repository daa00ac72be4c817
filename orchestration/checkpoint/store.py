"""Checkpoints of a run on disk: `step-000010`, `step-000020`, each of them whole or not there at all.

A checkpoint is written aside, in `step-000010.partial`. `commit` lists the size and checksum of every file in
MANIFEST.json, makes sure that all of it is on the disk, and only then gives the folder its name, so that a process or a
machine that stops at any moment leaves the checkpoints before it. Lifecycle: (begin -> files are written -> commit)*.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-(\d{6,})")
PARTIAL, REPLACED, ABANDONED = ".partial", ".replaced", ".abandoned"
"""Endings of folders that are no checkpoint: being written or removed, about to be replaced, and set aside."""


@dataclass(frozen=True, slots=True)
class _File:
    """What the manifest says of a file."""

    size: int
    checksum: str


class CheckpointStore:
    """The checkpoints in one folder. One process writes; its calls may come from several threads, one at a time."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        """`keep_last`: how many of the newest are kept, beside the one with the lowest score.

        Finishes a replacement that an earlier process did not.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}; the newest checkpoint is always kept")
        self._folder, self._keep_last = folder, keep_last
        folder.mkdir(parents=True, exist_ok=True)
        self._settle_replacements()

    def begin(self, step: int) -> Path:
        """An empty folder for the files of this step's checkpoint; what was begun before and not committed is removed.

        Raises: OSError as `writing`.
        """
        for left_over in self._folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(left_over)
        with self.writing(step) as folder:
            folder.mkdir()
        return folder

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Around whatever writes into the folder that `begin` has made.

        Raises: OSError, if that is what comes out, saying what is left; the folder has been removed.
        """
        folder = self._path(step, PARTIAL)
        try:
            yield folder
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._settle_replacements()
            left = self.newest()
            raise OSError(
                error.errno,
                f"cannot write the checkpoint of step {step}: {error.strerror or error}; what was there is removed, "
                f"and {'there is none before it' if left is None else f'{left} is as it was'}. Free space in",
                str(self._folder),
            ) from error

    def commit(self, step: int, *, score: float | None) -> Path:
        """Make what was written since `begin` a checkpoint, in the place of one of the same step, and remove old ones.

        Reads every file and waits for the disk. `score`: lower is better; None or not finite: none.
        Raises: OSError as `writing`; RuntimeError if the step was not begun.
        """
        partial, folder = self._path(step, PARTIAL), self._path(step)
        if not partial.is_dir():
            raise RuntimeError(f"{partial} is not there; call begin({step}) before commit({step})")
        with self.writing(step):
            files = {name: _described(partial / name) for name in _names(partial)}
            score = score if score is not None and math.isfinite(score) else None
            (partial / MANIFEST).write_bytes(_manifest(step, score, files))
            _sync_tree(partial)
            if folder.exists():
                folder.rename(self._path(step, REPLACED))
            partial.rename(folder)
            _sync(self._folder)
        self._settle_replacements()
        self._prune()
        logger.info("checkpoint of step %d: %s", step, folder)
        return folder

    def newest(self) -> Path | None:
        """The committed checkpoint of the latest step; None if there is none."""
        return max(self._checkpoints(), key=_step, default=None)

    def require_whole(self, path: Path) -> None:
        """Compare every file with the manifest.

        Raises: ValueError naming the file, what is wrong with it, and the newest earlier checkpoint.
        """
        try:
            files = _read_manifest(path)
            for name in sorted(_names(path) | files.keys()):
                _require_same(path / name, files.get(name))
        except ValueError as error:
            earlier = [other for other in self._checkpoints() if _step(other) < _step(path)]
            remedy = (
                f"resume from {max(earlier, key=_step)}" if earlier else "there is no earlier checkpoint; start anew"
            )
            raise ValueError(f"{error}; {remedy}") from error

    def set_aside_after(self, step: int) -> None:
        """A run goes on from this step: later checkpoints are of another run, and get the ending `.abandoned`."""
        for path in self._checkpoints():
            if _step(path) > step:
                aside = path.with_name(path.name + ABANDONED)
                _remove(aside)
                path.rename(aside)
        _sync(self._folder)

    def _settle_replacements(self) -> None:
        """The old checkpoint of a step goes when the new one is there, and gets its name back where it is not."""
        for aside in self._folder.glob(f"step-*{REPLACED}"):
            whole = aside.with_suffix("")
            if whole.exists():
                _remove(aside)
            else:
                aside.rename(whole)

    def _prune(self) -> None:
        """Keep the last ones and the one with the lowest score."""
        paths = sorted(self._checkpoints(), key=_step)
        scores = {path: score for path in paths if (score := _score(path)) is not None}
        best = min(scores, key=lambda path: scores[path], default=None)
        for path in paths[: -self._keep_last]:
            if path != best:
                _remove(path)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]

    def _path(self, step: int, ending: str = "") -> Path:
        return self._folder / f"step-{step:06}{ending}"


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is no checkpoint: its name must be step- and the number of the step")
    return int(match[1])


def _remove(path: Path) -> None:
    """Whatever the moment at which this ends, no half of it has the name of a checkpoint."""
    if path.exists():
        going = path.with_name(path.name + PARTIAL)
        path.rename(going)
        shutil.rmtree(going)


def _names(folder: Path) -> set[str]:
    """All files in it but the manifest, by their paths inside."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return names - {MANIFEST}


def _described(path: Path) -> _File:
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "blake2b").hexdigest()
        return _File(os.fstat(file.fileno()).st_size, checksum)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _manifest(step: int, score: float | None, files: dict[str, _File]) -> bytes:
    """The one way to write these values, so that any other byte is seen."""
    values = {"step": step, "score": score, "files": {name: asdict(files[name]) for name in sorted(files)}}
    checksum = hashlib.blake2b(json.dumps(values).encode()).hexdigest()
    return json.dumps({**values, "checksum": checksum}, indent=1, allow_nan=False).encode()


def _read_manifest(path: Path) -> dict[str, _File]:
    """Raises: ValueError naming the manifest if it is missing or is not what `commit` wrote there."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: the checkpoint was never finished")
    written = manifest.read_bytes()
    changed = f"{manifest} was changed after it was written"
    try:
        values = json.loads(written)
        files = {name: _File(**described) for name, described in values["files"].items()}
        expected = _manifest(_step(path), values["score"], files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no text, no JSON, or none of ours
        raise ValueError(changed) from error
    if written != expected:
        raise ValueError(changed)
    return files


def _require_same(path: Path, listed: _File | None) -> None:
    if listed is None:
        raise ValueError(f"{path} is not listed in {MANIFEST}")
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if (size := path.stat().st_size) != listed.size:
        raise ValueError(f"{path} has {size} bytes, it was written with {listed.size}")
    if _described(path) != listed:
        raise ValueError(f"{path} was changed after it was written: its checksum differs")


def _score(path: Path) -> float | None:
    """What was committed with it; a checkpoint whose manifest is broken has none."""
    try:
        _read_manifest(path)
    except ValueError as error:
        logger.warning("%s; it is kept only while it is among the last", error)
        return None
    return json.loads((path / MANIFEST).read_bytes())["score"]
