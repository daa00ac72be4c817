"""Whole runs that several tests check, each for something else; conftest.py starts each of them once."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from own_cluster import SMOKE, Finished, OwnCluster, own_environment, run, run_command
from warm_process import run_warm

LARGE_STEPS = ("--learner.learning-rate", "1e-3")
SYNCHRONOUS = (SMOKE, *LARGE_STEPS, "--asynchrony.max-lag", "0")
EXACT = (SMOKE, *LARGE_STEPS, "--asynchrony.mode", "exact", "--asynchrony.max-lag", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run that has ended."""

    finished: Finished
    arguments: list[str]
    """After `run.py`."""
    folder: Path
    seen: set[str]
    """Those of PARTS_OF_A_RUN that were processes on the cluster meanwhile."""

    @property
    def rows(self) -> list[dict[str, float]]:
        """Of metrics.jsonl."""
        return rows_of(self.folder / "metrics.jsonl")

    @property
    def published(self) -> list[tuple[int, str]]:
        """(version, digest) of everything that was published."""
        rows = rows_of(self.folder / "events.jsonl")
        return [(row["version"], row["weights"]) for row in rows if row["event"] == "published"]


def few_texts(folder: Path) -> tuple[str, str]:
    """The setting for a data file of short texts, written into this folder and alike in every one: the default texts
    take seconds to tokenise, in each run anew."""
    path = folder / "texts.jsonl"
    texts = [f"def function_{index}(x):\n    return x + {index}\n" * 8 for index in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return "--data.source", str(path)


def submitted_run(cluster: OwnCluster, folder: Path, *arguments: str, upload: bool) -> WholeRun:
    """A job on the cluster, submitted from this checkout."""
    arguments, seen = with_folder(folder, *arguments), set()
    job = cluster.submit(folder.name, *arguments, upload=upload, meanwhile=lambda: seen.update(cluster.parts_running()))
    return WholeRun(finished=job, arguments=arguments, folder=folder, seen=seen)


def local_run(folder: Path, *arguments: str) -> WholeRun:
    """`python orchestration/run.py` without a cluster."""
    return _run(folder, arguments, lambda args: run(run_command(*args), environment=own_environment(), timeout_s=400))


def run_on(
    cluster: OwnCluster,
    folder: Path,
    *arguments: str,
    meanwhile: Callable[[psutil.Process], None] = lambda process: None,
) -> WholeRun:
    """A run that joins the cluster as its driver; none of its processes may be left, whatever `meanwhile` does."""

    def start(arguments: list[str]) -> Finished:
        environment = cluster.environment
        return run_warm("orchestration/run.py", *arguments, environment=environment, meanwhile=meanwhile)

    ended = _run(folder, arguments, start)
    cluster.wait_until_empty()
    return ended


def one_process_run(folder: Path, *arguments: str, **variables: str) -> WholeRun:
    """The same in one process, without Ray."""
    arguments = (*arguments, "--placement.one-process", "True")
    environment = own_environment(**variables)
    return _run(folder, arguments, lambda args: run_warm("orchestration/run.py", *args, environment=environment))


def succeeded(run: WholeRun) -> WholeRun:
    """The run itself. Raises: AssertionError with its output if it failed."""
    assert run.finished.returncode == 0, run.finished.output
    return run


def with_folder(folder: Path, *arguments: str) -> list[str]:
    """The arguments and the run's folder."""
    return [*arguments, "--logging.output-dir", str(folder.parent), "--logging.run-name", folder.name]


def rows_of(path: Path) -> list[dict[str, float]]:
    """Of a JSONL file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _run(folder: Path, arguments: tuple[str, ...], start: Callable[[list[str]], Finished]) -> WholeRun:
    arguments = with_folder(folder, *arguments)
    return WholeRun(finished=start(arguments), arguments=arguments, folder=folder, seen=set())
